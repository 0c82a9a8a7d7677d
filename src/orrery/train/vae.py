"""The VAE's task: reconstruct clips through normally distributed latents.

Loss = L1 + L2 (moving things weighted up) + a sharpness term (Sobel gradients or spectrum, L1) + a small KL, which only
keeps the latents bounded: the transformer sees them normalised by the per-channel mean and std measured at the end.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from orrery.data.clips import Clip, ClipDataset
from orrery.data.order import ShuffledOrder
from orrery.errors import InputError
from orrery.nn.vae import PRESETS, VAE, VAEConfig
from orrery.train.export import export_vae, seeds_by_scene
from orrery.train.loop import Randomness
from orrery.train.networks import compiles, configure
from orrery.train.recipe import VAELossRecipe, VAERecipe
from orrery.train.sheets import save_sheet, to_uint8
from orrery.video import to_pixels


def build_vae(recipe: VAERecipe) -> VAE:
    """The recipe's VAE with freshly drawn weights; the same seed draws the same weights."""
    config: VAEConfig = configure(PRESETS, recipe.vae.preset, recipe.vae.override, "vae")
    torch.manual_seed(recipe.seed)
    return VAE(config)


def sobel(x: Tensor) -> tuple[Tensor, Tensor]:
    """Horizontal and vertical Sobel gradients of [..., H, W]: each [..., H - 2, W - 2], 1 for a ramp of 1 a pixel."""
    smooth_y = (x[..., :-2, :] + 2 * x[..., 1:-1, :] + x[..., 2:, :]) / 4
    smooth_x = (x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]) / 4
    return (smooth_y[..., 2:] - smooth_y[..., :-2]) / 2, (smooth_x[..., 2:, :] - smooth_x[..., :-2, :]) / 2


def reconstruction_loss(
    decoded: Tensor, frames: Tensor, foreground: Tensor | None, recipe: VAELossRecipe
) -> dict[str, Tensor]:
    """The unweighted terms l1, l2 and sharpness, each a scalar.

    Args:
        decoded, frames: [B, 3, T, H, W] in [-1, 1].
        foreground: [B, 1, T, H, W] in 0..1 or None; a pixel's weight is 1 + (recipe.foreground - 1) foreground, divided
            by the weights' mean.
    """
    error = decoded.float() - frames
    weight = None
    if foreground is not None:
        weight = 1 + (recipe.foreground - 1) * foreground
        weight = weight / weight.mean()
    size = error.abs()
    weighted = size if weight is None else size * weight
    terms = {"l1": weighted.mean(), "l2": (weighted * size).mean()}
    if recipe.sharpness == "sobel":
        horizontal, vertical = sobel(error)
        edges = horizontal.abs() + vertical.abs()
        terms["sharpness"] = (edges if weight is None else edges * weight[..., 1:-1, 1:-1]).mean()
    elif recipe.sharpness == "fft":
        terms["sharpness"] = (torch.fft.rfft2(error, norm="ortho").abs()).mean()
    return terms


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp logvar) || N(0, 1)), the mean over latent elements."""
    mean, logvar = mean.float(), logvar.float().clamp(-30, 20)
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


def psnr(decoded: Tensor, frames: Tensor, mask: Tensor | None = None) -> Tensor:
    """PSNR in dB per clip of [B, 3, T, H, W] in [-1, 1], over the pixels of `mask` [B, 1, T, H, W] where given."""
    squared = (decoded.clamp(-1, 1) - frames).square() / 4
    if mask is None:
        mse = squared.mean(dim=(1, 2, 3, 4))
    else:
        mse = (squared * mask).sum(dim=(1, 2, 3, 4)) / (3 * mask.sum(dim=(1, 2, 3, 4))).clamp(min=1)
    return -10 * torch.log10(mse.clamp(min=1e-10))


class VAETask:
    """Batches of clips, the loss, held-out PSNR, reconstruction sheets (see `orrery.train.loop.Task`).

    Args:
        recipe: the checked recipe. train, heldout: clips. random: where every random number comes from.
    """

    def __init__(
        self, recipe: VAERecipe, train: ClipDataset, heldout: ClipDataset, random: Randomness, device: torch.device
    ) -> None:
        self.recipe, self.train, self.heldout, self.random, self.device = recipe, train, heldout, random, device
        self.model: nn.Module = build_vae(recipe).to(device).train()
        self.clips = recipe.batch
        self.order = ShuffledOrder(len(train), recipe.seed)
        self._terms = reconstruction_loss
        if compiles(recipe.compile, device):
            self._terms = torch.compile(reconstruction_loss, dynamic=False)

    def plain(self, name: str) -> bool:
        """First and last layers (they meet pixels) are AdamW's."""
        return name.startswith(("encoder.conv1.", "decoder.head.2."))

    def batch(self) -> tuple[Tensor, Tensor | None]:
        """frames [B, 3, T, H, W] in [-1, 1], foreground [B, 1, T, H, W] or None, on the device."""
        rng, frames = self.random.numpy, self.recipe.data.frames
        if frames > 5 and rng.random() < self.recipe.subclip:
            frames = 4 * int(rng.integers(1, frames // 4)) + 1
        pixels, masks = [], []
        for index in self.order.take(self.recipe.batch):
            clip = self.train[index]
            start = int(rng.integers(0, len(clip.frames) - frames + 1))
            flip = rng.random() < self.recipe.flip
            window = clip.frames[start : start + frames]
            pixels.append(window[:, :, ::-1] if flip else window)
            if clip.foreground is not None:
                mask = clip.foreground[start : start + frames]
                masks.append(mask[:, :, ::-1] if flip else mask)
        batch = to_pixels(np.stack(pixels)).to(self.device)
        return batch, stack_masks(masks, len(pixels), self.device)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor | None]) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the recipe's terms, and the terms."""
        assert isinstance(model, VAE)
        frames, foreground = batch
        mean, logvar = model.moments(frames)
        noise = torch.randn(mean.shape, generator=self.random.torch).to(mean.device)
        latents = mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * noise
        recipe = self.recipe.loss
        terms = self._terms(model.decode_raw(latents), frames, foreground, recipe)
        terms["kl"] = kl_divergence(mean, logvar)
        weights = {"l1": recipe.l1, "l2": recipe.l2, "sharpness": recipe.sharpness_weight, "kl": recipe.kl}
        return torch.stack([weights[name] * term for name, term in terms.items()]).sum(), terms

    def _heldout(self, count: int) -> tuple[Tensor, Tensor | None]:
        clips = [self.heldout[i] for i in range(min(count, len(self.heldout)))]
        frames = to_pixels(np.stack([clip.frames[: self.recipe.data.frames] for clip in clips]))
        masks = [clip.foreground[: self.recipe.data.frames] for clip in clips if clip.foreground is not None]
        return frames.to(self.device), stack_masks(masks, len(clips), self.device)

    @torch.no_grad()
    def validate(self, model: nn.Module) -> dict[str, float]:
        """PSNR in dB of held-out clips, the mean over clips: all pixels, moving things alone, and each scene's."""
        assert isinstance(model, VAE)
        frames, masks = self._heldout(self.recipe.validation.clips)
        whole, moving = [], []
        for start in range(0, len(frames), 4):
            part = slice(start, start + 4)
            decoded = model.decode_raw(model.moments(frames[part])[0]).float()
            whole.append(psnr(decoded, frames[part]))
            if masks is not None:
                moving.append(psnr(decoded, frames[part], masks[part]))
        values = torch.cat(whole)
        found = {"psnr": float(values.mean())}
        if moving:
            found["psnr_foreground"] = float(torch.cat(moving).mean())
        scenes = [entry.scene for entry in self.heldout.entries[: len(values)]]
        if len(set(scenes)) > 1:
            for scene in sorted(set(scenes)):
                found[f"psnr_{scene}"] = float(values[[each == scene for each in scenes]].mean())
        return found

    @torch.no_grad()
    def sheet(self, model: nn.Module, path: Path) -> None:
        """Truth and reconstruction below each other, for the first held-out clips."""
        assert isinstance(model, VAE)
        frames, _ = self._heldout(self.recipe.validation.sheet)
        decoded = model.decode_raw(model.moments(frames)[0]).float()
        pairs = zip(frames.cpu().numpy(), decoded.cpu().numpy(), strict=True)
        save_sheet(path, [to_uint8(clip) for pair in pairs for clip in pair])

    @torch.no_grad()
    def latent_statistics(self, model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Per-channel mean and std of the un-normalised latents over the recipe's number of training clips."""
        assert isinstance(model, VAE)
        total: Tensor | float = 0.0
        square: Tensor | float = 0.0
        count = 0
        clips = min(self.recipe.statistics_clips, len(self.train))
        indices = np.linspace(0, len(self.train) - 1, clips).astype(int)
        for index in indices:
            frames = to_pixels(self.train[int(index)].frames[None, : self.recipe.data.frames]).to(self.device)
            mean = model.moments(frames)[0].double()
            total, square = total + mean.sum(dim=(0, 2, 3, 4)), square + mean.square().sum(dim=(0, 2, 3, 4))
            count += mean[:, 0].numel()
        assert isinstance(total, Tensor) and isinstance(square, Tensor)
        center = total / count
        spread = (square / count - center.square()).clamp(min=1e-8).sqrt()
        return tuple(center.tolist()), tuple(spread.tolist())

    def export(self, model: nn.Module, directory: Path, training: dict[str, Any]) -> None:
        """Measure the latents' statistics, and write the VAE that normalises by them."""
        assert isinstance(model, VAE)
        exported = VAE(replace(model.config, latent_mean=(), latent_std=()))
        exported.load_state_dict(model.state_dict())
        exported.with_statistics(*self.latent_statistics(model))
        training = training | {"data": seeds_by_scene(self.train.entries), "validation": self.validate(model)}
        export_vae(exported, directory, training)

    def state(self) -> dict[str, Any]:
        """The data position."""
        return {"order": self.order.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore `state()`."""
        self.order.load_state(state["order"])


def stack_masks(masks: list[np.ndarray], clips: int, device: torch.device) -> Tensor | None:
    """[B, 1, T, H, W] float32 out of bool masks, or None unless every clip has one."""
    if not masks or len(masks) != clips:
        return None
    return torch.from_numpy(np.stack(masks)).to(device).float().unsqueeze(1)


def check_clip(clip: Clip, name: str, frames: int, size: tuple[int, int]) -> None:
    """Refuse a clip that the recipe does not describe.

    Raises:
        InputError: too few frames, or another size.
    """
    count, height, width = clip.frames.shape[:3]
    if count < frames:
        raise InputError(f"{name} has {count} frames; the recipe's data.frames = {frames} needs at least as many")
    if (height, width) != size:
        raise InputError(f"{name} is {height}x{width}; the recipe's data.size = {list(size)} must agree")
