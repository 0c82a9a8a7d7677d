"""The action task: a model post-trained to predict what a robot's actions do.

A batch is windows out of the middle of episodes, with the actions before each latent frame; the first 1 to `given`
latent frames are given, a little noisy, because in a rollout they are the model's own work. The text is zeros, as
published. Validation also asks with the actions of another window: a model that answers the same ignores its actions,
the classic failure, and the numbers say so while it trains.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from orrery.data.episodes import Episodes, open_episodes
from orrery.data.order import ShuffledOrder
from orrery.errors import InputError
from orrery.flow.conditioning import FrameCondition
from orrery.flow.noise import numpy_noise
from orrery.flow.path import interpolate, sample_times, velocity_target
from orrery.flow.rolling import roll_on
from orrery.flow.schedule import shift_schedule
from orrery.nn.dit import Conditions, DiT
from orrery.train.encoded import Encoded, choose_episodes, encode_episodes
from orrery.train.export import model_card
from orrery.train.flow import NOISE_SEED, generated_error
from orrery.train.loop import Randomness
from orrery.train.recipe import ActionRecipe
from orrery.train.sheets import save_sheet, to_uint8
from orrery.weights.catalogue import CATALOGUE
from orrery.weights.config import ActionConfig, ModelConfig, Sampling
from orrery.weights.sources import find_model
from orrery.weights.store import Model, load_model, model_hash, part_hash, save_model, save_transformer

LEAST_STD = 1e-3
CHECKED_AT = (0.3, 0.5, 0.7, 0.9)  # times of the flow at which action sensitivity is asked


@dataclass(frozen=True)
class ActionBatch:
    """x0, noise [B, C, T, H, W]; actions [B, T - 1, values], normalised; t [B]; count [B] given frames; blur [B], how
    much noise given frames get."""

    x0: Tensor
    noise: Tensor
    actions: Tensor
    t: Tensor
    count: Tensor
    blur: Tensor


class ActionTask:
    """Batches of windows, the velocity loss, held-out loss, action sensitivity, rollouts (see `loop.Task`).

    Args:
        recipe: the checked recipe. random: where every random number comes from.
    """

    def __init__(self, recipe: ActionRecipe, random: Randomness, device: torch.device) -> None:
        self.recipe, self.random, self.device = recipe, random, device
        self.files = find_model(recipe.base, controls=())
        self.base = load_model(self.files)
        self.vae = self.base.vae.to(device)
        self.source = open_episodes(recipe.data.root, recipe.data.camera)
        train, held = choose_episodes(self.source, recipe.data, recipe.out)
        self.config = _config(recipe, self.base.config, self.source, train)
        self.train, self.held = (self._encoded(indices) for indices in (train, held))
        self.model: nn.Module = nn.ModuleDict({"transformer": self._network()}).to(device).train()
        self.text = torch.zeros(1, 1, self.config.transformer.text_width, device=device)
        self.clips = recipe.batch
        self.order = ShuffledOrder(len(self.train), recipe.seed)

    def _encoded(self, indices: list[int]) -> Encoded:
        assert self.config.actions is not None
        return encode_episodes(
            self.source,
            indices,
            self.vae,
            part_hash(self.files, "vae"),
            self.config.actions,
            self.config.resolution,
            self.recipe.out / "latents",
        )

    def _network(self) -> DiT:
        """The base's transformer with the blocks that are kept; new action embedders add nothing at first."""
        torch.manual_seed(self.recipe.seed)
        network, base = DiT(self.config.transformer), self.base.transformer
        kept = self.recipe.blocks or range(base.config.depth)
        if base.config.actions != self.config.transformer.actions:
            for embedder in (network.action_embedder_B_D, getattr(network, "action_embedder_B_3D", None)):
                if embedder is not None:
                    nn.init.zeros_(embedder.fc2.weight)
        blocks = {f"blocks.{block}.": f"blocks.{place}." for place, block in enumerate(kept)}
        wanted = network.state_dict()
        for key, value in base.state_dict().items():
            head, _, tail = key.partition(".")
            if head == "blocks":
                number, _, rest = tail.partition(".")
                key = blocks.get(f"blocks.{number}.", "left out ") + rest
            if key in wanted and wanted[key].shape == value.shape:
                wanted[key] = value.float()
        network.load_state_dict(wanted)
        return network

    def plain(self, name: str) -> bool:
        """Embeddings, first and last layers, and everything that makes modulation are AdamW's."""
        parts = ("x_embedder.", "final_layer.", "t_embedder.", "adaln_modulation", "action_embedder")
        return any(part in name for part in parts)

    def batch(self) -> ActionBatch:
        """The next windows, and everything drawn for them."""
        window, loss, rng, generator = self.recipe.window, self.recipe.loss, self.random.numpy, self.random.torch
        indices = self.order.take(self.recipe.batch)
        length = window.latents
        if length > 2 and rng.random() < window.shorter:
            length = int(rng.integers(2, length))
        starts = [
            0 if rng.random() < window.start else int(rng.integers(0, self.train.latents[i].shape[1] - length + 1))
            for i in indices
        ]
        x0, actions = self._windows(self.train, indices, starts, length)
        count = torch.from_numpy(rng.integers(1, min(window.given, length - 1) + 1, len(indices)))
        blur = torch.rand(len(indices), generator=generator) * window.noise
        blur = torch.where(torch.rand(len(indices), generator=generator) < 0.5, blur, 0.0)
        t = sample_times(len(indices), loss.shift, generator, loss.distribution, loss.high_noise_fraction)
        batch = ActionBatch(x0, torch.randn(x0.shape, generator=generator), actions, t, count, blur)
        return ActionBatch(**{name: value.to(self.device) for name, value in vars(batch).items()})

    def _windows(self, part: Encoded, indices: list[int], starts: list[int], length: int) -> tuple[Tensor, Tensor]:
        pairs = list(zip(indices, starts, strict=True))
        x0 = torch.stack([part.latents[i][:, s : s + length] for i, s in pairs]).float()
        return x0, torch.stack([part.actions[i][s : s + length - 1] for i, s in pairs])

    def loss(self, model: nn.Module, batch: ActionBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean of `generated_error`; also logged where one latent frame is new and where all but one are."""
        v, mask, target = self._velocity(model, batch)
        errors = generated_error(v, target, mask)
        new = batch.x0.shape[2] - batch.count
        parts = {"loss_next": errors[new == 1], "loss_more": errors[new > 1]}
        return errors.mean(), {name: part.mean() for name, part in parts.items() if len(part)}

    def _velocity(self, model: nn.Module, batch: ActionBatch) -> tuple[Tensor, Tensor, Tensor]:
        """(velocity, mask of the given frames, true velocity)."""
        blurred = batch.x0 + batch.blur.view(-1, 1, 1, 1, 1) * batch.noise.roll(1, 0)
        given = FrameCondition(blurred, batch.count, self.recipe.loss.conditional_timestep)
        x_t = given.replace(interpolate(batch.x0, batch.noise, batch.t))
        conditions = Conditions(self.text, given.mask, actions=batch.actions)
        v = model["transformer"](x_t, given.timesteps(1000 * batch.t), conditions)  # type: ignore[index]
        return v, given.mask, velocity_target(batch.x0, batch.noise)

    @torch.no_grad()
    def validate(self, model: nn.Module) -> dict[str, float]:
        """Held-out velocity loss for 1 and for `given` given frames, the same with the actions of the next window
        (`shuffled`), how far the prediction moves with them in units of the true velocity (`sensitivity`), and the
        squared latent error of a rollout over its frames (`rollout`; `copied`: of the first frame, standing still)."""
        length, most = self.config.actions.window, self.config.actions.given  # type: ignore[union-attr]
        count = min(self.recipe.validation.clips, len(self.held))
        rng = np.random.default_rng(NOISE_SEED)
        indices = list(range(count))
        starts = [int(rng.integers(0, self.held.latents[i].shape[1] - length + 1)) for i in indices]
        x0, actions = self._windows(self.held, indices, starts, length)
        noise = torch.cat([numpy_noise(NOISE_SEED + i, x0[:1].shape) for i in indices])
        sums: dict[str, list[float]] = {}
        for given in (1, most):
            for moment in CHECKED_AT:
                t, counts, still = torch.full((count,), moment), torch.full((count,), given), torch.zeros(count)
                batch = ActionBatch(x0, noise, actions, t, counts, still)
                batch = ActionBatch(**{name: value.to(self.device) for name, value in vars(batch).items()})
                v, mask, target = self._velocity(model, batch)
                other, _, _ = self._velocity(model, replace(batch, actions=batch.actions.roll(1, 0)))
                scale = generated_error(torch.zeros_like(target), target, mask).mean()
                sums.setdefault(f"loss_given{given}", []).append(float(generated_error(v, target, mask).mean()))
                sums.setdefault("shuffled", []).append(float(generated_error(other, target, mask).mean()))
                moved = (generated_error(other, v, mask).mean() / scale).sqrt()
                sums.setdefault("sensitivity", []).append(float(moved))
        found = {name: float(np.mean(values)) for name, values in sums.items()}
        found["loss"] = float(np.mean([found["loss_given1"], found[f"loss_given{most}"]]))
        return found | self._rollout_errors(model, count)

    def _rollout_errors(self, model: nn.Module, count: int) -> dict[str, float]:
        steps = min(self.recipe.validation.rollout, *(each.shape[1] - 1 for each in self.held.latents[:count]))
        truth = torch.stack([each[:, : steps + 1] for each in self.held.latents[:count]]).float().to(self.device)
        actions = torch.stack([each[:steps] for each in self.held.actions[:count]]).to(self.device)
        errors = {"rollout": self.rollout(model, truth[:, :, :1], actions)}
        errors["rollout_shuffled"] = self.rollout(model, truth[:, :, :1], actions.roll(1, 0))
        errors["copied"] = truth[:, :, :1].expand_as(truth)
        return {name: float((each - truth)[:, :, 1:].square().mean()) for name, each in errors.items()}

    @torch.no_grad()
    def rollout(self, model: nn.Module, first: Tensor, actions: Tensor) -> Tensor:
        """Latents [B, C, 1 + n, H, W]: the first [B, C, 1, H, W] and what follows under actions [B, n, values]."""
        schedule = shift_schedule(self.recipe.validation.sample_steps, self.recipe.loss.shift, exact_times=True)
        transformer, latents = model["transformer"], first  # type: ignore[index]
        text = transformer.encode_text(self.text)
        for step in range(actions.shape[1]):
            past = latents[:, :, -self.recipe.window.given :]
            done = actions[:, step + 1 - past.shape[2] : step + 1]
            noise = torch.cat([numpy_noise(NOISE_SEED + 1000 * i + step, first[:1].shape) for i in range(len(first))])
            network = partial(_told, transformer, text, done)
            told = self.recipe.loss.conditional_timestep
            latents = torch.cat([latents, roll_on(network, past, noise.to(first), schedule, told)], dim=2)
        return latents

    @torch.no_grad()
    def sheet(self, model: nn.Module, path: Path) -> None:
        """For each shown episode: the truth, the rollout from its first frame, and that with another's actions."""
        shown = list(range(min(self.recipe.validation.sheet, len(self.held))))
        steps = min(self.recipe.validation.rollout, *(self.held.latents[i].shape[1] - 1 for i in shown))
        first = torch.stack([self.held.latents[i][:, :1] for i in shown]).float().to(self.device)
        actions = torch.stack([self.held.actions[i][:steps] for i in shown]).to(self.device)
        truth = torch.stack([self.held.latents[i][:, : steps + 1] for i in shown]).float().to(self.device)
        clips = [truth, *(self.rollout(model, first, each) for each in (actions, actions.roll(1, 0)))]
        frames = [self.vae.decode(each).cpu().numpy() for each in clips]
        save_sheet(path, [to_uint8(each[row]) for row in range(len(shown)) for each in frames], every=4)

    def export(self, model: nn.Module, directory: Path, training: dict[str, Any]) -> None:
        """Write the transformer and the config to a model directory; VAE and text encoder too, where they are not those
        of a named model, which it then shares."""
        training = training | {"base": f"{self.recipe.base} {model_hash(self.files)}", "episodes": len(self.train)}
        config = replace(self.config, training=training | {"validation": self.validate(model)})
        directory.parent.mkdir(parents=True, exist_ok=True)
        transformer = model["transformer"]  # type: ignore[index]
        card = model_card(directory.name, config)
        if config.shared:
            save_transformer(directory, transformer, config, card)
        else:
            save_model(directory, Model(config, transformer, self.base.vae, self.base.text), card)

    def state(self) -> dict[str, Any]:
        """The data position."""
        return {"order": self.order.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore `state()`."""
        self.order.load_state(state["order"])


def _shared_with(name: str) -> dict[str, str]:
    """The parts that an embedded model of that name lends; of a folder, none."""
    entry = CATALOGUE.get(name)
    return {"vae": name, "text": name} if entry is not None and entry.folder is not None else {}


def _told(transformer: DiT, text: Any, actions: Tensor, x: Tensor, times: Tensor, mask: Tensor) -> Tensor:
    return transformer(x, times, Conditions(text, mask, actions=actions))


def _config(recipe: ActionRecipe, base: ModelConfig, episodes: Episodes, train: list[int]) -> ModelConfig:
    """The base's config with these actions, and the statistics of the training episodes."""
    names, scale, window = episodes.action_names, recipe.scale, recipe.window
    if scale and len(scale) != len(names):
        raise InputError(f"recipe: scale has {len(scale)} numbers, an action has {len(names)}: {', '.join(names)}")
    actions = np.concatenate([episodes.actions(i) for i in train]).astype(np.float64)
    if not np.isfinite(actions).all():
        raise InputError(f"{recipe.data.root}: an action is not finite; `orrery check-data` says where")
    scaled = actions * (scale or 1.0)
    blocks = recipe.blocks or tuple(range(base.transformer.depth))
    if max(blocks) >= base.transformer.depth:
        raise InputError(f"recipe: blocks names {max(blocks)}; allowed are 0 to {base.transformer.depth - 1}")
    try:
        told = ActionConfig(
            names=tuple(names),
            mean=tuple(scaled.mean(0).round(6).tolist()),
            std=tuple(np.maximum(scaled.std(0), LEAST_STD).round(6).tolist()),
            scale=scale,
            low=tuple(actions.min(0).round(6).tolist()),
            high=tuple(actions.max(0).round(6).tolist()),
            window=window.latents,
            given=window.given,
            handover=window.handover,
        )
        return replace(
            base,
            transformer=replace(base.transformer, depth=len(blocks), actions=len(names) * base.vae.temporal_factor),
            sampling=Sampling(
                shift=recipe.loss.shift,
                exact_times=True,
                steps=recipe.validation.sample_steps,
                guidance=recipe.validation.guidance,
                conditional_timestep=recipe.loss.conditional_timestep,
            ),
            fps=float(episodes.fps),
            frames=1 + (window.latents - 1) * base.vae.temporal_factor,
            any_length=True,
            shared=base.shared or _shared_with(recipe.base),
            controls={},
            actions=told,
            training={},
        )
    except ValueError as error:
        raise InputError(f"recipe: {error}") from None
