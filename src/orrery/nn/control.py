"""Control branches beside a frozen transformer (Cosmos-Transfer2.5): a few of its own blocks that see a control video
and add, every so many base blocks, what they make of it.

One class serves every modality, and any number of branches share one base pass. A branch embeds the control latents
(padded to `channels`, with the base's frame and padding masks), adds the base's embedded tokens through `before_proj`,
and runs through its blocks; what block k gives, through `after_proj`, is added after base block `every` * k, scaled by
the branch's weight. Both projections begin at zero. Parameter names are the published ones. Specification of Transfer,
section 1.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from orrery.nn.dit import BaseState, Block, DiT, DiTConfig, PatchEmbedding


@dataclass(frozen=True)
class ControlConfig:
    """blocks: of the branch. every: base blocks from one to the next that it acts on. channels: of the control latents
    after padding (the published branches have room for eight modalities of 16)."""

    blocks: int = 4
    every: int = 7
    channels: int = 128

    def __post_init__(self) -> None:
        for name in ("blocks", "every", "channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def places(self) -> tuple[int, ...]:
        """The base blocks that the branch acts on: 0, 7, 14, 21."""
        return tuple(range(0, self.blocks * self.every, self.every))


class ControlBlock(Block):
    """A block of the base with the projections around it; `before_proj` in the first one only."""

    def __init__(self, config: DiTConfig, first: bool):
        super().__init__(config)
        self.before_proj = nn.Linear(config.width, config.width) if first else None
        self.after_proj = nn.Linear(config.width, config.width)


class ControlBranch(nn.Module):
    """The branch of one modality, beside a base of config `base`.

    >>> branch = ControlBranch(net.config, ControlConfig()).initialise(net)
    >>> control = ActiveControl(branch, latents, weight=0.7)
    >>> net(x, t, Conditions(text, controls=[control]))
    """

    def __init__(self, base: DiTConfig, config: ControlConfig):
        super().__init__()
        if config.places[-1] >= base.depth:
            raise ValueError(f"a branch at base blocks {config.places} needs a deeper base than {base.depth} blocks")
        if config.channels < base.latent_channels:
            raise ValueError(f"control latents have {base.latent_channels} channels, channels is {config.channels}")
        self.base, self.config = base, config
        masks = base.input_channels - base.latent_channels
        self.control_embedder = PatchEmbedding(config.channels + masks, base.patch, base.width)
        self.control_blocks = nn.ModuleList(ControlBlock(base, first=index == 0) for index in range(config.blocks))
        self.init_weights()

    def init_weights(self) -> None:
        """Zeros in the projections, so that a new branch adds nothing; the embedder as the base's."""
        embedder = cast(nn.Linear, self.control_embedder.proj[1])
        std = float(embedder.in_features) ** -0.5
        nn.init.trunc_normal_(embedder.weight, std=std, a=-3 * std, b=3 * std)
        for layer in self.zero_initialised():
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def zero_initialised(self) -> list[nn.Linear]:
        """The projections around the blocks."""
        blocks = [cast(ControlBlock, block) for block in self.control_blocks]
        first = [block.before_proj for block in blocks if block.before_proj is not None]
        return first + [block.after_proj for block in blocks]

    def initialise(self, net: DiT) -> "ControlBranch":
        """Control block i becomes base block i, as training begins; returns self."""
        for mine, theirs in zip(self.control_blocks, net.blocks, strict=False):
            mine.load_state_dict(theirs.state_dict(), strict=False)
        return self

    def forward(self, latents: Tensor, state: BaseState) -> Iterator[Tensor]:
        """What the branch would add after each of its places: [B, T, H, W, D] each, one after the other.

        latents: of the control video [B or 1, at most `channels`, T, H, W].
        """
        x = self.control_embedder(self._input(latents, state))
        for block in cast("list[ControlBlock]", self.control_blocks):
            if block.before_proj is not None:
                x = block.before_proj(x) + state.tokens
            x = block(x, state.embedding, state.shared, block.keys_values(state.context), state.rope)
            yield block.after_proj(x)

    def _input(self, latents: Tensor, state: BaseState) -> Tensor:
        batch, channels = state.masks.shape[0], self.config.channels
        size = list(state.masks.shape[2:])
        if latents.ndim != 5 or latents.shape[0] not in (1, batch) or list(latents.shape[2:]) != size:
            raise ValueError(f"control latents must be [{batch} or 1, C, *{size}], got {list(latents.shape)}")
        if latents.shape[1] > channels:
            raise ValueError(f"control latents have {latents.shape[1]} channels, this branch takes at most {channels}")
        padding = state.masks.new_zeros(()).expand(batch, channels - latents.shape[1], *size)
        return torch.cat([latents.to(state.masks.dtype).expand(batch, -1, -1, -1, -1), padding, state.masks], dim=1)


@dataclass(frozen=True)
class ActiveControl:
    """A branch with its signal: what `Conditions.controls` holds.

    weight: a number, or a map [B or 1, T, H/patch, W/patch] over the token grid. A number of 0 leaves the branch out:
    the base's own velocity, bit for bit.
    """

    branch: ControlBranch
    latents: Tensor
    weight: float | Tensor = 1.0

    def residuals(self, state: BaseState) -> Iterator[tuple[int, Tensor]]:
        """(block index, weighted [B, T, H, W, D]), one after the other, so that few are held at once."""
        weight = self.weight
        if not isinstance(weight, Tensor):
            if weight == 0:
                return
            weight = torch.tensor(float(weight), device=state.tokens.device)
        elif weight.shape[0] not in (1, state.tokens.shape[0]) or weight.shape[1:] != state.tokens.shape[1:4]:
            grid = list(state.tokens.shape[:4])
            raise ValueError(f"a weight map must be {grid} (or a batch of 1), got {list(weight.shape)}")
        else:
            weight = weight[..., None]
        weight = weight.to(state.tokens.dtype)
        hints = self.branch(self.latents, state)
        for place in self.branch.config.places:
            yield place, weight * next(hints)  # no name keeps it alive while the next block computes
