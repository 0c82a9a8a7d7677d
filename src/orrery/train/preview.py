"""The preview decoder's task: a tiny network learns what the VAE's decoder makes of the same latents.

The VAE is frozen. Latents of the clips are cached on the disk, as for the transformer; the VAE's picture of each is
made when it is first asked for and kept as 8-bit pixels, up to the recipe's `data.cache_gb`.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from orrery.data.clips import ClipDataset
from orrery.data.latents import cache_latents
from orrery.data.order import ShuffledOrder
from orrery.nn.preview import PRESETS, Preview, PreviewConfig
from orrery.nn.vae import VAE
from orrery.train.export import seeds_by_scene
from orrery.train.loop import Randomness
from orrery.train.networks import configure
from orrery.train.recipe import PreviewRecipe, VAELossRecipe
from orrery.train.sheets import save_sheet, to_uint8
from orrery.train.vae import psnr, reconstruction_loss
from orrery.video import to_pixels
from orrery.weights.preview import PREVIEW, check_fits, save_preview
from orrery.weights.sources import find_model
from orrery.weights.store import load_part, part_hash

TERMS = VAELossRecipe(sharpness="none")


class PreviewTask:
    """Batches of latents with the VAE's pictures of them, the loss, held-out PSNR (see `orrery.train.loop.Task`).

    Args:
        recipe: the checked recipe. train, heldout: clips. random: where every random number comes from.

    Raises:
        InputError: a preview decoder of another factor or with other channels than the VAE.
    """

    def __init__(
        self, recipe: PreviewRecipe, train: ClipDataset, heldout: ClipDataset, random: Randomness, device: torch.device
    ) -> None:
        self.recipe, self.random, self.device = recipe, random, device
        config: PreviewConfig = configure(PRESETS, recipe.preview.preset, recipe.preview.override, "preview")
        files = find_model(recipe.base, controls=())
        check_fits(config, files.config.vae, "recipe: preview")
        vae = load_part(files, "vae")
        assert isinstance(vae, VAE)
        self.vae, self.vae_hash = vae.to(device), part_hash(files, "vae")
        seen = max(recipe.validation.clips, recipe.validation.sheet)
        self.heldout = ClipDataset(heldout.root, heldout.entries[:seen], cache_gb=0.2)
        self.latents = self._cached(train, recipe.latents.mirror)  # [N, M, C, T, h, w]
        self.held = self._cached(self.heldout, mirror=False)[:, 0]
        torch.manual_seed(recipe.seed)
        self.model: nn.Module = Preview(config).to(device).channels_last().train()
        self.clips = recipe.batch
        self.order = ShuffledOrder(len(train), recipe.seed)
        self.data = seeds_by_scene(train.entries) + ("; each mirrored too" if recipe.latents.mirror else "")
        self._pictures: dict[tuple[int, int], Tensor] = {}
        self._room = recipe.data.cache_gb * 1e9

    def _cached(self, dataset: ClipDataset, mirror: bool) -> Tensor:
        recipe = self.recipe
        folder, frames, batch = recipe.out / "latents", recipe.data.frames, recipe.latents.batch
        return cache_latents(
            folder, dataset, lambda x: self.vae.encode(x.to(self.device)), self.vae_hash, frames, mirror, batch
        ).latents

    def plain(self, name: str) -> bool:
        """First and last layers (they meet latents and pixels) are AdamW's."""
        return name.startswith("decoder.1.") or name.startswith(f"decoder.{len(self.model.decoder) - 1}.")  # type: ignore[arg-type]

    def batch(self) -> tuple[Tensor, Tensor]:
        """Latents [B, C, T, h, w] and the VAE's pictures of them without their noise, [B, 3, F, H, W] in [-1, 1]."""
        clips = self.order.take(self.recipe.batch)
        sides = self.random.numpy.integers(0, self.latents.shape[1], len(clips)).tolist()
        latents = self.latents[clips, sides].float()
        pictures = torch.stack([self._picture(clip, side) for clip, side in zip(clips, sides, strict=True)])
        level = torch.rand(len(latents), 1, 1, 1, 1, generator=self.random.torch) * self.recipe.loss.noise
        noise = torch.randn(latents.shape, generator=self.random.torch)
        return (latents + level * noise).to(self.device), pictures.to(self.device).float() / 127.5 - 1

    @torch.no_grad()
    def _picture(self, clip: int, side: int) -> Tensor:
        """[3, F, H, W] uint8, on the CPU."""
        found = self._pictures.get((clip, side))
        if found is None:
            decoded = self.vae.decode(self.latents[clip, side][None].float().to(self.device))[0]
            found = ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().cpu()
            if found.nbytes <= self._room:
                self._room -= found.nbytes
                self._pictures[clip, side] = found
        return found

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the recipe's terms, and the terms."""
        assert isinstance(model, Preview)
        latents, pictures = batch
        terms = reconstruction_loss(model.decode(latents).float(), pictures, None, TERMS)
        recipe = self.recipe.loss
        return recipe.l1 * terms["l1"] + recipe.l2 * terms["l2"], terms

    def _decoded(self, model: nn.Module, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Truth, the VAE's pictures and the preview of held-out clips: [N, 3, F, H, W] each, in [-1, 1], on the CPU."""
        assert isinstance(model, Preview)
        count = min(count, len(self.heldout))
        truth = to_pixels(np.stack([self.heldout[i].frames[: self.recipe.data.frames] for i in range(count)]))
        pairs = []
        for latents in self.held[:count].float().split(4):
            latents = latents.to(self.device)
            pairs.append([network.decode(latents).float().clamp(-1, 1).cpu() for network in (self.vae, model)])
        vae, preview = (torch.cat(clips) for clips in zip(*pairs, strict=True))
        return truth, vae, preview

    @torch.no_grad()
    def validate(self, model: nn.Module) -> dict[str, float]:
        """PSNR in dB of held-out clips: `psnr` of the preview against the VAE's pictures; against the true frames
        (`psnr_truth`), and the VAE's own (`vae_truth`)."""
        truth, vae, preview = self._decoded(model, self.recipe.validation.clips)
        pairs = {"psnr": (preview, vae), "psnr_truth": (preview, truth), "vae_truth": (vae, truth)}
        return {name: float(psnr(*pair).mean()) for name, pair in pairs.items()}

    @torch.no_grad()
    def sheet(self, model: nn.Module, path: Path) -> None:
        """Truth, the VAE's picture and the preview below each other, for the first held-out clips."""
        clips = zip(*self._decoded(model, self.recipe.validation.sheet), strict=True)
        save_sheet(path, [to_uint8(video.numpy()) for three in clips for video in three])

    def export(self, model: nn.Module, directory: Path, training: dict[str, Any]) -> None:
        """Put the preview decoder into `directory`: beside the VAE's weights it is found. fp16."""
        assert isinstance(model, Preview)
        training = training | {"data": self.data, "validation": self.validate(model)}
        directory.mkdir(parents=True, exist_ok=True)
        save_preview(directory / PREVIEW, model, self.vae.config, training)

    def state(self) -> dict[str, Any]:
        """The data position."""
        return {"order": self.order.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore `state()`."""
        self.order.load_state(state["order"])
