"""Episodes of a robot: video and what was done in it, one interface over every format on disk."""

from pathlib import Path
from typing import Protocol

import numpy as np

from orrery.data.clips import read_index
from orrery.errors import InputError
from orrery.video import Video


class Episodes(Protocol):
    """A dataset of episodes that share frame rate and action.

    fps: frames a second. action_names: of the A numbers of an action. ids: one name an episode, in order.
    """

    fps: float
    action_names: tuple[str, ...]
    ids: list[str]

    def __len__(self) -> int: ...

    def frames(self, index: int) -> np.ndarray:
        """[T, H, W, 3] uint8."""
        ...

    def actions(self, index: int) -> np.ndarray:
        """[T - 1, A] float32; row t acts between frames t and t + 1."""
        ...

    def text(self, index: int) -> str:
        """What the episode is about; may be empty."""
        ...


class ClipEpisodes:
    """The dataset that `orrery sim SCENE --clips N` writes, for a scene with actions."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self.entries = read_index(self.root)
        self.ids = [entry.id for entry in self.entries]
        self.fps = self.entries[0].fps
        import json

        meta = json.loads((self.root / self.ids[0] / "meta.json").read_text(encoding="utf-8"))
        self.action_names = tuple(meta.get("action_names", ()))
        if not self.action_names:
            raise InputError(f"{self.root}: its clips have no actions; scenes that do are push, drive and tabletop")

    def __len__(self) -> int:
        return len(self.ids)

    def frames(self, index: int) -> np.ndarray:
        return Video.read(self.root / self.ids[index] / "rgb.mp4").frames

    def actions(self, index: int) -> np.ndarray:
        path = self.root / self.ids[index] / "actions.npy"
        try:
            actions = np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read {path}: {error}") from None
        return actions[: self.entries[index].frames - 1].astype(np.float32)

    def text(self, index: int) -> str:
        return self.entries[index].caption


def open_episodes(root: Path, camera: str | None = None) -> Episodes:
    """The episodes of a folder, whichever format they are in: clips of `orrery sim`, LeRobot or Bridge.

    Args:
        camera: which, where a dataset has several; clips have one.

    Raises:
        InputError: no folder, or none of the formats; no such camera, or several and none named.
    """
    from orrery.data.bridge import BridgeEpisodes
    from orrery.data.lerobot import LeRobotEpisodes

    root = Path(root)
    if (root / "index.jsonl").is_file():
        if camera is not None:
            raise InputError(f"{root} has clips of `orrery sim`: camera is {camera!r}; allowed: none, they have one")
        return ClipEpisodes(root)
    if (root / "meta/info.json").is_file():
        return LeRobotEpisodes(root, camera)
    if (root / "annotation").is_dir():
        return BridgeEpisodes(root, camera=camera)
    raise InputError(
        f"no episodes at {root}: allowed are a folder with index.jsonl (`orrery sim`), with meta/info.json (LeRobot) "
        "or with annotation/ (Bridge)"
    )
