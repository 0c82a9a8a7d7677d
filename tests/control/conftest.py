"""A small clip with the contents of a natural one, made here: light, texture, things that move, noise."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from orrery.video import Video

_spec = importlib.util.spec_from_file_location("control_networks", Path(__file__).with_name("networks.py"))
networks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(networks)


def natural(frames: int = 6, height: int = 48, width: int = 80) -> np.ndarray:
    rng = np.random.default_rng(3)
    y, x = np.mgrid[:height, :width]
    light = 90 + 60 * np.sin(x / 17) * np.cos(y / 23)
    texture = rng.normal(0, 14, (height, width))
    out = np.empty((frames, height, width, 3), np.uint8)
    for t in range(frames):
        picture = (light + texture)[..., None] * [1.0, 0.9, 0.7] + rng.normal(0, 2, (height, width, 3))
        picture[10:26, 8 + 3 * t : 26 + 3 * t] = [200, 40, 30]
        picture[(y - 34) ** 2 + (x - 60 + 2 * t) ** 2 < 80] = [30, 60, 210]
        out[t] = np.clip(picture, 0, 255)
    return out


@pytest.fixture(scope="session")
def clip() -> Video:
    return Video(natural(), 10)


@pytest.fixture(scope="session")
def depth_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return networks.save_depth(tmp_path_factory.mktemp("depth"))


@pytest.fixture(scope="session")
def metric_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return networks.save_depth(tmp_path_factory.mktemp("metric"), "metric")


@pytest.fixture(scope="session")
def detector_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return networks.save_detector(tmp_path_factory.mktemp("detector"))


@pytest.fixture(scope="session")
def tracker_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return networks.save_tracker(tmp_path_factory.mktemp("tracker"))
