"""The control branch's task: the base frozen, a branch beside it learns to follow one kind of control video.

The objective is the base's own (`train.flow`); only the branch has gradients, through the frozen blocks. The control
video of a clip is made of its pixels (edge, blur) or of the simulator's truth (depth, seg), and goes through the same
VAE. Branch block i begins as base block i, its projections at zero, so that step 0 is the base model (specification of
training, section 2.4).
"""

import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from orrery.control.blur import BLUR_PRESETS, blur_map
from orrery.control.depth import depth_map
from orrery.control.edge import EDGE_PRESETS, edge_map
from orrery.control.inputs import TRUTH
from orrery.control.segmentation import seg_map
from orrery.data.clips import Clip, ClipDataset, read_truth
from orrery.errors import InputError
from orrery.nn.control import ActiveControl, ControlBranch, ControlConfig
from orrery.nn.dit import Conditions, TextContext
from orrery.nn.vae import VAE
from orrery.train.checkpoint import write_text
from orrery.train.export import model_card
from orrery.train.flow import FlowTask
from orrery.train.loop import Randomness
from orrery.train.networks import compile_regions, compiles
from orrery.train.recipe import BranchRecipe, ControlRecipe
from orrery.train.sheets import save_sheet, to_uint8
from orrery.weights.config import read_config
from orrery.weights.sources import find_model
from orrery.weights.store import load_model, model_hash, part_hash, save_control


class ControlClips(ClipDataset):
    """The control videos of a dataset's clips, in their place.

    Args:
        clips: whose. recipe: which kind, and how strong.
    """

    def __init__(self, clips: ClipDataset, recipe: BranchRecipe) -> None:
        super().__init__(clips.root, clips.entries)
        self.recipe = recipe

    def _read(self, entry: Any) -> Clip:
        folder, kind = self.root / entry.id, self.recipe.kind
        if kind == "depth":
            frames = depth_map(read_truth(folder / TRUTH[kind]).astype(np.float32))
        elif kind == "seg":
            frames = seg_map(read_truth(folder / TRUTH[kind]), seed=zlib.crc32(entry.id.encode()))
        else:
            frames = self._of_pixels(super()._read(entry).frames, np.random.default_rng(zlib.crc32(entry.id.encode())))
        return Clip(frames, None, entry.caption)

    def _of_pixels(self, frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        kind, strength = self.recipe.kind, self.recipe.strength
        if strength != "random":
            return edge_map(frames, strength) if kind == "edge" else blur_map(frames, strength)
        if kind == "edge":
            low = int(rng.integers(20, 100))
            return edge_map(frames, (low, low + int(rng.integers(50, 150))))
        return blur_map(frames, (int(rng.integers(1, 5)), int(rng.integers(4, 18))))


class ControlTask(FlowTask):
    """Batches of latents with those of their control video, the velocity loss, held-out loss, samples.

    Args:
        recipe: the checked recipe. train, heldout: clips. random: where every random number comes from.
    """

    recipe: ControlRecipe

    def __init__(
        self, recipe: ControlRecipe, train: ClipDataset, heldout: ClipDataset, random: Randomness, device: torch.device
    ) -> None:
        _check_strength(recipe.control)
        self.files = find_model(recipe.base, controls=())
        self.frozen = load_model(self.files, device)
        self.base = nn.ModuleDict({"transformer": self.frozen.transformer, "text": self.frozen.text})
        if compiles(recipe.compile, device):
            compile_regions(self.base)
        super().__init__(recipe, train, heldout, random, device)
        name = f"{self.vae_hash} {recipe.control.kind} {recipe.control.strength}"
        self.control = self._cached(ControlClips(train, recipe.control), name, recipe.latents.mirror)
        self.held_control = self._cached(ControlClips(self.shown, recipe.control), name, mirror=False)
        self._without: dict[str, float] = {}

    def _open_vae(self) -> tuple[VAE, str]:
        return self.frozen.vae, part_hash(self.files, "vae")

    def _networks(self) -> nn.ModuleDict:
        torch.manual_seed(self.recipe.seed)
        control = self.recipe.control
        try:
            config = ControlConfig(control.blocks, control.every, control.channels)
            branch = ControlBranch(self.frozen.transformer.config, config)
        except ValueError as error:
            raise InputError(f"recipe: control: {error}") from None
        return nn.ModuleDict({"branch": branch.initialise(self.frozen.transformer)})

    def _base(self, model: nn.Module) -> nn.Module:
        return self.base

    def _conditions(
        self, model: nn.Module, text: Tensor | TextContext, mask: Tensor | None, control: Tensor | None
    ) -> Conditions:
        if isinstance(model, _Without) or control is None:
            return Conditions(text, mask)
        branch: ControlBranch = model["branch"]  # type: ignore[index]
        return Conditions(text, mask, controls=[ActiveControl(branch, control)])

    def _control(self, indices: np.ndarray, sides: np.ndarray) -> Tensor:
        return self.control.latents[indices, sides]

    def _held_control(self, indices: list[int]) -> Tensor:
        return self.held_control.latents[indices, 0].float().to(self.device)

    def plain(self, name: str) -> bool:
        """The embedder of the control video is a first layer too."""
        return super().plain(name) or "control_embedder." in name

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Held-out velocity loss as `FlowTask.validate`, and beside it the base's own, without control."""
        if not self._without:
            self._without = super().validate(_Without())
        return super().validate(model) | {"without": self._without["loss"]}

    @torch.no_grad()
    def sheet(self, model: nn.Module, path: Path) -> None:
        """For each shown clip: the truth, its control video, what is imagined from caption and control, and from the
        caption alone."""
        indices = list(range(min(self.recipe.validation.sheet, len(self.held))))
        truth = [self.heldout[i].frames[: self.recipe.data.frames] for i in indices]
        control = ControlClips(self.shown, self.recipe.control)
        clips = [self.vae.decode(self.sample(each, indices, 0)).cpu().numpy() for each in (model, _Without())]
        rows: list[np.ndarray] = []
        for i in indices:
            rows += [truth[i], control[i].frames[: self.recipe.data.frames]]
            rows += [to_uint8(each[i]) for each in clips]
        save_sheet(path, rows)

    def export(self, model: nn.Module, directory: Path, training: dict[str, Any]) -> None:
        """Put the branch into a model directory: the base's own, or a copy of it that is made where there is none."""
        training = training | {"data": self.data, "validation": self.validate(model)}
        control, looks = self.recipe.control, self.recipe.data.looks
        training |= {"base": model_hash(self.files), "looks": ", ".join(looks) or "all"}
        if control.kind in ("edge", "blur"):
            training |= {"strength": control.strength}
        if not (directory / "config.json").is_file():
            if self.files.folder is None:
                raise InputError(f"a branch of {self.recipe.base!r} needs a model folder to be put into: --export DIR")
            shutil.copytree(self.files.folder, directory, dirs_exist_ok=True)
        save_control(directory, control.kind, model["branch"], training)  # type: ignore[index]
        write_text(directory / "README.md", model_card(directory.name, read_config(directory)))


class _Without(nn.Module):
    """In place of a branch: none."""


def _check_strength(recipe: BranchRecipe) -> None:
    presets = {"edge": list(EDGE_PRESETS), "blur": list(BLUR_PRESETS)}.get(recipe.kind, [])
    if recipe.strength not in ("random", *presets):
        allowed = ", ".join(["random", *presets])
        raise InputError(f"recipe: control.strength = {recipe.strength!r} for {recipe.kind}; allowed: {allowed}")
