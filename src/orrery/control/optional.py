"""Libraries that only control signals need, imported when they are asked for."""

from typing import Any

from orrery.errors import InputError


def opencv() -> Any:
    """The module cv2.

    Raises:
        InputError: it is not installed.
    """
    try:
        import cv2
    except ImportError as error:
        raise InputError("edge, blur and resizing of controls need OpenCV: pip install 'orrery[control]'") from error
    return cv2
