"""The decoder's task: a shared VAE learns to draw one model's pictures, from latents that stay as they are.

The encoder is frozen, so a transformer that was trained on its latents goes on as before. A window is one frame encoded
by itself and the latents that follow it in its episode, which is how a rollout begins its stream; latents get a little
noise, because later they are a model's own work.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from orrery.data.episodes import open_episodes
from orrery.data.order import ShuffledOrder
from orrery.errors import InputError
from orrery.nn.vae import VAE
from orrery.train.checkpoint import write_atomically, write_text
from orrery.train.encoded import choose_episodes, latents_of
from orrery.train.export import model_card
from orrery.train.loop import Randomness
from orrery.train.recipe import DecoderRecipe, VAELossRecipe
from orrery.train.sheets import save_sheet, to_uint8
from orrery.train.vae import psnr, reconstruction_loss
from orrery.video import Video, to_pixels
from orrery.weights.config import read_config
from orrery.weights.decoder import PREFIX, save_decoder
from orrery.weights.parts import DECODER
from orrery.weights.sources import find_model
from orrery.weights.store import load_part, part_hash

APART = 25  # of 255: a pixel that differs from the empty scene by more is of a thing
SCENE = 64  # episodes whose first frames make the empty scene


class DecoderTask:
    """Windows of latents and their frames, the reconstruction loss, held-out PSNR (see `loop.Task`).

    Args:
        recipe: the checked recipe. random: where every random number comes from.
    """

    def __init__(self, recipe: DecoderRecipe, random: Randomness, device: torch.device) -> None:
        self.recipe, self.random, self.device = recipe, random, device
        files = find_model(recipe.base, controls=())
        vae = load_part(files, "vae")
        assert isinstance(vae, VAE)
        self.frozen, self.vae_hash, self.factor = vae.to(device), part_hash(files, "vae"), vae.temporal_factor
        if recipe.frames % self.factor != 1:
            raise InputError(f"recipe: frames = {recipe.frames}; allowed: {self.factor}k + 1")
        self.source = open_episodes(recipe.data.root, recipe.data.camera)
        self.train, self.held = choose_episodes(self.source, recipe.data, recipe.out)
        self.model: nn.Module = self._tuned().to(device).train()
        firsts = [self._frames(i, 0, 1)[0] for i in self.train[:SCENE]]
        self.scene = torch.from_numpy(np.median(np.stack(firsts), axis=0)).float().to(device)
        self.clips = recipe.batch
        self.order = ShuffledOrder(len(self.train), recipe.seed)

    def _tuned(self) -> VAE:
        """A copy of the VAE, of which the recipe's parts have gradients."""
        vae = VAE(self.frozen.config)
        vae.load_state_dict(self.frozen.state_dict())
        parts = tuple(self.recipe.parts)
        for name, parameter in vae.named_parameters():
            parameter.requires_grad_(name.startswith(PREFIX) and name.startswith(parts))
        for part in parts:
            if not any(name.startswith(part) and name.startswith(PREFIX) for name, _ in vae.named_parameters()):
                raise InputError(f"recipe: parts has {part!r}, which is no part of the VAE's decoder")
        return vae

    def _frames(self, index: int, start: int, count: int) -> np.ndarray:
        """Frames [T, H, W, 3] of an episode at the recipe's size, T up to `count`."""
        frames = self.source.frames(index)[start : start + count]
        same = frames.shape[1:3] == self.recipe.size
        return frames if same else Video(frames, 1.0).resize(*self.recipe.size).frames

    def plain(self, name: str) -> bool:
        """Everything is AdamW's: small changes to what is there."""
        return True

    def batch(self) -> tuple[Tensor, Tensor]:
        """Latents [B, C, T, h, w] and frames [B, 3, F, H, W] in [-1, 1]."""
        rng, generator = self.random.numpy, self.random.torch
        pairs = [self._window(i, rng) for i in (self.train[j] for j in self.order.take(self.recipe.batch))]
        latents, frames = (torch.cat(each) for each in zip(*pairs, strict=True))
        noise = torch.randn(latents.shape, generator=generator) * self.recipe.loss.noise
        level = torch.rand(len(latents), 1, 1, 1, 1, generator=generator)
        return latents + (noise * level).to(self.device), frames

    @torch.no_grad()
    def _window(self, index: int, rng: np.random.Generator | None) -> tuple[Tensor, Tensor]:
        size, count = self.recipe.size, self.recipe.frames // self.factor
        latents = latents_of(self.source, index, self.frozen, self.vae_hash, size, self.recipe.out / "latents")
        last = latents.shape[1] - count - 1
        if last < 0:
            raise InputError(f"episode {self.source.ids[index]} is shorter than frames = {self.recipe.frames}")
        start = 0 if rng is None else int(rng.integers(0, last + 1))
        frames = to_pixels(self._frames(index, start * self.factor, self.recipe.frames)[None]).to(self.device)
        first = self.frozen.encode(frames[:, :, :1])
        rest = latents[None, :, start + 1 : start + 1 + count].float().to(self.device)
        return torch.cat([first, rest], dim=2), frames

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the recipe's terms, and the terms."""
        assert isinstance(model, VAE)
        latents, frames = batch
        recipe = self.recipe.loss
        mask = None
        if recipe.foreground > 1:
            levels = (frames.permute(0, 2, 3, 4, 1) + 1) * 127.5
            mask = ((levels - self.scene).abs().amax(-1) > APART).float()[:, None]
        weights = {"l1": recipe.l1, "l2": recipe.l2, "sharpness": recipe.sharpness_weight}
        terms = reconstruction_loss(
            model.decode(latents).float(),
            frames,
            mask,
            VAELossRecipe(foreground=recipe.foreground, sharpness=recipe.sharpness),
        )
        return torch.stack([weights[name] * term for name, term in terms.items()]).sum(), terms

    @torch.no_grad()
    def validate(self, model: nn.Module) -> dict[str, float]:
        """PSNR in dB of held-out windows, and with the decoder as it was (`before`)."""
        assert isinstance(model, VAE)
        rows: dict[str, list[Tensor]] = {"psnr": [], "before": []}
        for index in self.held[: self.recipe.validation.clips]:
            latents, frames = self._window(index, None)
            for name, vae in (("psnr", model), ("before", self.frozen)):
                rows[name].append(psnr(vae.decode(latents).float(), frames))
        return {name: float(torch.cat(values).mean()) for name, values in rows.items()}

    @torch.no_grad()
    def sheet(self, model: nn.Module, path: Path) -> None:
        """Truth, the decoder as it was, and as it is, for the first held-out episodes."""
        assert isinstance(model, VAE)
        rows = []
        for index in self.held[: self.recipe.validation.sheet]:
            latents, frames = self._window(index, None)
            clips = [frames, self.frozen.decode(latents), model.decode(latents)]
            rows += [to_uint8(clip[0].float().cpu().numpy()) for clip in clips]
        save_sheet(path, rows)

    def export(self, model: nn.Module, directory: Path, training: dict[str, Any]) -> None:
        """Put the tuned weights into the model folder `directory`, which shares this VAE; where none is there, the
        weights alone."""
        parts = tuple(self.recipe.parts)
        weights = {name: value for name, value in model.state_dict().items() if name.startswith(parts)}
        if not (directory / "config.json").is_file():
            directory.mkdir(parents=True, exist_ok=True)
            half = {name: value.half().contiguous() for name, value in weights.items()}
            write_atomically(directory / DECODER, lambda temporary: save_file(half, temporary))
            return
        save_decoder(directory, weights, training | {"episodes": len(self.train), "validation": self.validate(model)})
        write_text(directory / "README.md", model_card(directory.name, read_config(directory)))

    def state(self) -> dict[str, Any]:
        """The data position."""
        return {"order": self.order.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore `state()`."""
        self.order.load_state(state["order"])
