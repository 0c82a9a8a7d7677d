"""The transformer's task: rectified flow on cached latents, text encoder trained along.

x_t = (1 - t) x0 + t eps, the network predicts eps - x0 (spec training.md, section 1). 0, 1 or 2 first latent frames are
given: put in place clean, marked in the mask channel, told their own time, and left out of the loss.
"""

import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from orrery.data.clips import ClipDataset
from orrery.data.latents import LatentCache, cache_latents
from orrery.data.order import ShuffledOrder
from orrery.errors import InputError
from orrery.flow.conditioning import FrameCondition, sample_counts
from orrery.flow.guidance import guided_velocity, one_by_one
from orrery.flow.noise import numpy_noise
from orrery.flow.path import interpolate, sample_times, velocity_target
from orrery.flow.schedule import shift_schedule
from orrery.flow.solvers import solve
from orrery.nn.dit import PRESETS as DIT_PRESETS
from orrery.nn.dit import Conditions, DiT, TextContext
from orrery.nn.text import PRESETS as TEXT_PRESETS
from orrery.nn.text import TextEncoder, word_tokenizer
from orrery.nn.vae import VAE
from orrery.train.checkpoint import write_text
from orrery.train.export import export_model, load_vae, seeds_by_scene, vae_training
from orrery.train.loop import Randomness
from orrery.train.networks import configure
from orrery.train.recipe import ControlRecipe, FlowRecipe
from orrery.train.report import duration
from orrery.train.sheets import save_sheet, to_uint8

NOISE_SEED = 20_000  # validation noise of held-out clip i comes from this seed + i


@dataclass(frozen=True)
class FlowBatch:
    """S = clips * draws samples: x0, noise [S, C, T, H, W]; t [S]; count [S] given frames; tokens [clips, L];
    keep [S, 1, 1], 0 where the text is dropped; control [S, C, T, H, W] where a control branch is trained."""

    x0: Tensor
    noise: Tensor
    t: Tensor
    count: Tensor
    tokens: Tensor
    keep: Tensor
    control: Tensor | None = None


def generated_error(v: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error of the velocity over the generated frames, per sample [S].

    Args:
        v, target: [S, C, T, H, W]. mask: [S, 1, T, H, W], 1 on given frames.

    The official code overwrites the velocity of given frames by the true one and divides by all elements, so its loss
    (and gradient) shrinks by the share of given frames, n / T; here the denominator counts generated elements only,
    and a clip weighs the same whatever it was given. A sample with nothing to generate counts 0.
    """
    generated = 1 - mask
    squared = (v.float() - target).square() * generated
    count = generated.sum(dim=(1, 2, 3, 4)) * v.shape[1]
    return squared.sum(dim=(1, 2, 3, 4)) / count.clamp(min=1)


class FlowTask:
    """Batches of latents, the velocity loss, held-out loss, samples (see `orrery.train.loop.Task`).

    Args:
        recipe: the checked recipe. train, heldout: clips. random: where every random number comes from.
    """

    def __init__(
        self,
        recipe: FlowRecipe | ControlRecipe,
        train: ClipDataset,
        heldout: ClipDataset,
        random: Randomness,
        device: torch.device,
    ) -> None:
        self.recipe, self.heldout, self.random, self.device = recipe, heldout, random, device
        vae, self.vae_hash = self._open_vae()
        self.vae = vae.to(device)
        seen = max(recipe.validation.clips, recipe.validation.sheet)
        self.shown = ClipDataset(heldout.root, heldout.entries[:seen])
        self.cache = self._cached(train, self.vae_hash, recipe.latents.mirror)
        self.held = self._cached(self.shown, self.vae_hash, mirror=False)
        self.model: nn.Module = self._networks().to(device).train()
        self.clips = recipe.batch * recipe.loss.draws
        self.order = ShuffledOrder(len(train), recipe.seed)
        text = self._base(self.model)["text"]  # type: ignore[index]
        assert isinstance(text, TextEncoder)
        self.tokenizer = text.reader.tokenizer
        sides = range(self.cache.latents.shape[1])
        whole = [[pair[side] for pair in self.cache.captions] for side in sides]
        short = [[caption.rpartition(", ")[0] or caption for caption in captions] for captions in whole]
        # [cut, side, clip, L]
        self.tokens = torch.stack([torch.stack([text.tokenize(c) for c in group]) for group in (whole, short)])
        self.held_tokens = text.tokenize([pair[0] for pair in self.held.captions])
        self.fps = heldout.entries[0].fps
        self.data = seeds_by_scene(train.entries) + ("; each mirrored too" if recipe.latents.mirror else "")

    def _open_vae(self) -> tuple[VAE, str]:
        """The frozen VAE, and a name of its weights."""
        assert isinstance(self.recipe, FlowRecipe)
        return load_vae(self.recipe.latents.vae)

    def _cached(self, dataset: ClipDataset, vae_hash: str, mirror: bool) -> LatentCache:
        recipe = self.recipe
        meter = _CacheMeter()
        return cache_latents(
            recipe.out / "latents",
            dataset,
            lambda pixels: self.vae.encode(pixels.to(self.device)),
            vae_hash,
            recipe.data.frames,
            mirror,
            recipe.latents.batch,
            meter,
        )

    def _tokenizer(self) -> Tokenizer:
        """The run's tokenizer: made of its captions once, then kept in OUT/tokenizer.json."""
        path = self.recipe.out / "tokenizer.json"
        captions = [caption for pair in self.cache.captions + self.held.captions for caption in pair]
        if not path.exists():
            write_text(path, word_tokenizer(captions).to_str(pretty=True) + "\n")
        return Tokenizer.from_file(str(path))

    def _networks(self) -> nn.ModuleDict:
        """What is trained."""
        recipe = self.recipe
        assert isinstance(recipe, FlowRecipe)
        torch.manual_seed(recipe.seed)
        text_config = configure(TEXT_PRESETS, recipe.text.preset, recipe.text.override, "text")
        config = configure(DIT_PRESETS, recipe.transformer.preset, recipe.transformer.override, "transformer")
        try:
            text = TextEncoder(text_config, self._tokenizer())
            transformer = DiT(replace(config, text_dim=text_config.text_dim))
        except ValueError as error:
            raise InputError(f"recipe: {error}") from None
        return nn.ModuleDict({"transformer": transformer, "text": text.requires_grad_(not recipe.text.frozen)})

    def _base(self, model: nn.Module) -> nn.Module:
        """Where `transformer` and `text` are, for a model that is trained."""
        return model

    def _conditions(
        self, model: nn.Module, text: Tensor | TextContext, mask: Tensor | None, control: Tensor | None
    ) -> Conditions:
        return Conditions(text, mask)

    def _control(self, indices: np.ndarray, sides: np.ndarray) -> Tensor | None:
        """Control latents of these training clips."""
        return None

    def _held_control(self, indices: list[int]) -> Tensor | None:
        """Control latents of these held-out clips."""
        return None

    def plain(self, name: str) -> bool:
        """Embeddings, first and last layers, and everything that makes modulation out of time are AdamW's."""
        parts = ("x_embedder.", "final_layer.", "t_embedder.", "adaln_modulation", "embed_tokens.")
        return any(part in name for part in parts)

    def batch(self) -> FlowBatch:
        """The next clips, each as it is or mirrored, and everything drawn for them."""
        recipe, rng, generator = self.recipe.loss, self.random.numpy, self.random.torch
        indices = np.array(self.order.take(self.recipe.batch))
        sides = rng.integers(0, self.cache.latents.shape[1], len(indices))
        x0 = self.cache.latents[indices, sides].float().repeat_interleave(recipe.draws, dim=0)
        control = self._control(indices, sides)
        if control is not None:
            control = control.float().repeat_interleave(recipe.draws, dim=0)
        cut = (rng.random(len(indices)) < recipe.caption_cut).astype(int)
        tokens = self.tokens[cut, sides, indices]
        samples = len(x0)
        condition = recipe.condition
        if rng.random() < recipe.midstream:
            # A chained chunk begins with latents from the middle of a clip, each 4 frames; a clip's first holds only 1.
            x0, condition = x0[:, :, 1:], (0.0, 0.5, 0.5)
            control = None if control is None else control[:, :, 1:]
        keep = torch.rand(samples, 1, 1, generator=generator) >= recipe.text_dropout
        batch = FlowBatch(
            x0=x0,
            noise=torch.randn(x0.shape, generator=generator),
            t=sample_times(samples, recipe.shift, generator, recipe.distribution, recipe.high_noise_fraction),
            count=sample_counts(samples, condition, generator),
            tokens=tokens,
            keep=keep.float(),
            control=control,
        )
        moved: dict[str, Any] = {
            name: value if value is None else value.to(self.device) for name, value in vars(batch).items()
        }
        return FlowBatch(**moved)

    def loss(self, model: nn.Module, batch: FlowBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean of `generated_error` over the samples; also logged for early and late times apart."""
        text = self._base(model)["text"](batch.tokens)  # type: ignore[index]
        text = text.repeat_interleave(self.recipe.loss.draws, dim=0) * batch.keep
        errors = self._errors(model, batch.x0, batch.noise, batch.t, batch.count, text, batch.control)
        late = batch.t > 0.5
        parts = {}
        for name, part in (("loss_early", errors[~late]), ("loss_late", errors[late])):
            if len(part):
                parts[name] = part.mean()
        return errors.mean(), parts

    def _errors(
        self,
        model: nn.Module,
        x0: Tensor,
        noise: Tensor,
        t: Tensor,
        count: Tensor,
        text: Tensor,
        control: Tensor | None = None,
    ) -> Tensor:
        given = FrameCondition(x0, count, self.recipe.loss.conditional_timestep)
        assert given.mask is not None
        x_t = given.replace(interpolate(x0, noise, t))
        conditions = self._conditions(model, text, given.mask, control)
        v = self._base(model)["transformer"](x_t, given.timesteps(1000 * t), conditions)  # type: ignore[index]
        return generated_error(v, velocity_target(x0, noise), given.mask)

    @torch.no_grad()
    def validate(self, model: nn.Module) -> dict[str, float]:
        """Held-out velocity loss at the recipe's times and at noise fixed per clip, for 0, 1 and 2 given frames."""
        recipe = self.recipe
        count = min(recipe.validation.clips, len(self.held))
        x0 = self.held.latents[:count, 0].float().to(self.device)
        noise = torch.cat([numpy_noise(NOISE_SEED + i, x0[:1].shape) for i in range(count)]).to(self.device)
        text = self._base(model)["text"](self.held_tokens[:count])  # type: ignore[index]
        control = self._held_control(list(range(count)))
        table = np.zeros((3, len(recipe.validation.times)))
        for given in range(3):
            counts = torch.full((count,), given, device=self.device)
            for column, moment in enumerate(recipe.validation.times):
                t = torch.full((count,), moment, device=self.device)
                table[given, column] = float(self._errors(model, x0, noise, t, counts, text, control).mean())
        found = {"loss": float(table.mean())}
        found |= {f"loss_given{given}": float(table[given].mean()) for given in range(3)}
        return found | {f"loss_t{t:g}": float(table[:, i].mean()) for i, t in enumerate(recipe.validation.times)}

    @torch.no_grad()
    def sample(self, model: nn.Module, indices: list[int], given: int) -> Tensor:
        """Held-out clips imagined from their caption and `given` latent frames: latents [N, C, T, H, W]."""
        recipe = self.recipe
        x0 = self.held.latents[indices, 0].float().to(self.device)
        noise = torch.cat([numpy_noise(NOISE_SEED + i, x0[:1].shape) for i in indices]).to(self.device)
        text = self._base(model)["text"](self.held_tokens[indices])  # type: ignore[index]
        condition = FrameCondition(x0, given, recipe.loss.conditional_timestep)
        transformer = self._base(model)["transformer"]  # type: ignore[index]
        control = self._held_control(indices)
        texts = [text, torch.zeros_like(text)] if recipe.validation.guidance > 0 else [text]
        told = [transformer.encode_text(each) for each in texts]
        conditions = [self._conditions(model, each, condition.mask, control) for each in told]
        networks = [partial(transformer, conditions=c) for c in conditions]
        velocity = guided_velocity(one_by_one(networks), condition, noise, recipe.validation.guidance)
        schedule = shift_schedule(recipe.validation.sample_steps, recipe.loss.shift, exact_times=True)
        return solve(velocity, noise, schedule)

    @torch.no_grad()
    def sheet(self, model: nn.Module, path: Path) -> None:
        """For each shown clip: the truth, then what is imagined from 0, 1 and 2 given latent frames."""
        indices = list(range(min(self.recipe.validation.sheet, len(self.held))))
        truth = [self.heldout[i].frames[: self.recipe.data.frames] for i in indices]
        imagined = [self.vae.decode(self.sample(model, indices, given)).cpu().numpy() for given in range(3)]
        rows = []
        for i in indices:
            rows += [truth[i], *(to_uint8(clips[i]) for clips in imagined)]
        save_sheet(path, rows)

    def export(self, model: nn.Module, directory: Path, training: dict[str, Any]) -> None:
        """Write a model directory with the transformer, the text encoder and the VAE."""
        assert isinstance(self.recipe, FlowRecipe)
        training = training | {"data": self.data, "validation": self.validate(model)}
        training |= {"vae": vae_training(self.recipe.latents.vae)}
        export_model(self.recipe, model, self.vae, self.fps, directory, training)

    def state(self) -> dict[str, Any]:
        """The data position."""
        return {"order": self.order.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore `state()`."""
        self.order.load_state(state["order"])


class _CacheMeter:
    """Prints how far encoding is, at most every ten seconds; silent when all came from the disk at once."""

    def __init__(self) -> None:
        self._clock = time.monotonic
        self._begin = self._last = self._clock()

    def __call__(self, done: int, total: int) -> None:
        now = self._clock()
        if now - self._last > 10:
            self._last = now
            left = (now - self._begin) / done * (total - done)
            print(f"encoding clips: {done}/{total}  ETA {duration(left)}", file=sys.stderr, flush=True)
