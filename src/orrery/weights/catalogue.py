"""The models that have a name. Any other model is named by its folder."""

from dataclasses import dataclass
from difflib import get_close_matches
from os import PathLike
from pathlib import Path

from orrery.errors import InputError

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class ModelEntry:
    """A named model: one line about it, and the folder it lies in."""

    name: str
    summary: str
    folder: Path

    @property
    def available(self) -> bool:
        """Its weights are on this machine."""
        return (self.folder / "config.json").is_file()


CATALOGUE = {
    entry.name: entry
    for entry in (
        ModelEntry(
            "mini",
            "orrery-mini: small worlds of falling and pushed things, trained by us in MuJoCo; inside the package",
            _HERE / "mini",
        ),
    )
}


def find_model(name_or_path: str | PathLike[str]) -> Path:
    """The folder of a model, by name or by path. A name wins over a folder of that name (write ./NAME for the folder).

    Raises:
        InputError: neither a name of the catalogue nor a folder with a config.json; or its weights are not here.
    """
    entry = CATALOGUE.get(str(name_or_path))
    if entry is not None:
        if not entry.available:
            raise InputError(f"the weights of model {entry.name!r} are missing: {entry.folder} holds no config.json")
        return entry.folder
    if not str(name_or_path):
        raise InputError(f"the model is {str(name_or_path)!r}; allowed are {', '.join(CATALOGUE)}, or a model's folder")
    folder = Path(name_or_path)
    if (folder / "config.json").is_file():
        return folder
    if folder.is_dir():
        raise InputError(f"{folder} is not a model: it holds no config.json")
    close = get_close_matches(str(name_or_path), CATALOGUE, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise InputError(
        f"unknown model {str(name_or_path)!r}{hint}; allowed are {', '.join(CATALOGUE)}, or the folder of a model"
    )
