"""What the velocity depends on beside latents and time: text, masks, control branches; plain values, no networks.

A new kind of condition is one field of `Conditions` and one module that consumes it (arXiv 2511.00062).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Rope = tuple[Tensor, Tensor]
KeysValues = tuple[Tensor, ...]  # of a text; those of an image follow where the network has image context
Projected = tuple[Tensor, ...]  # text [B, L, context_dim], and image tokens [B, M, width] where there are any


@dataclass(frozen=True)
class TextContext:
    """What cross-attention needs of one text (and one image): for each block normalised keys and values
    [B, L, heads, dim]. context: the projected text and image that other networks beside this one take theirs from."""

    layers: tuple[KeysValues, ...]
    context: "Projected"

    @staticmethod
    def batched(texts: Sequence["TextContext"]) -> "TextContext":
        """Several texts of one length as one batch, in that order."""
        layers = zip(*(text.layers for text in texts), strict=True)
        return TextContext(
            tuple(tuple(torch.cat(parts) for parts in zip(*each, strict=True)) for each in layers),
            tuple(torch.cat(parts) for parts in zip(*(text.context for text in texts), strict=True)),
        )

    @property
    def batch(self) -> int:
        return self.layers[0][0].shape[0]

    @property
    def length(self) -> int:
        return self.layers[0][0].shape[1]


@dataclass(frozen=True)
class Conditions:
    """Everything but latents and time that the velocity depends on.

    text: [B or 1, L, text_width], or the `TextContext` that `DiT.encode_text` made of it.
    frame_mask: [B or 1, 1, T, H, W], 1 where the latent frame is given; None for none.
    padding_mask: [B or 1, 1, rows, columns] at any resolution (resized to H, W, nearest), 1 where the picture is
    padding; None for none. Only for a network whose config has it.
    fps: frame rate of the video, for a network with rope_fps_modulation; others do not use it.
    image: tokens of a reference image [B or 1, M, image_context], for a network with image context and a text that is
    not encoded yet; None for none (zeros, which the network does see).
    controls: control branches that act on this pass, each with its signal and its weight.
    actions: [B or 1, T - 1, values], what is done before each latent frame but the first, for a network that has them;
    None for no terms of actions at all, which is not the same as actions of zero.
    """

    text: Tensor | TextContext
    frame_mask: Tensor | None = None
    padding_mask: Tensor | None = None
    fps: float | None = None
    image: Tensor | None = None
    controls: "Sequence[Control]" = ()
    actions: Tensor | None = None


class Control(Protocol):
    """A control branch with its signal and weight (see nn.control): what it adds to the base's tokens, by block."""

    def residuals(self, state: "BaseState") -> Iterable[tuple[int, Tensor]]:
        """(block index, [B, T, H, W, D] that is added after that block)."""
        ...


@dataclass(frozen=True)
class BaseState:
    """What control branches share with the base in one forward pass: its embedded tokens [B, T, H, W, D], frame mask
    and padding channels [B, 1, T, H, W] (latent size), time embedding and shared modulation, projected text, rope."""

    tokens: Tensor
    masks: Tensor
    embedding: Tensor
    shared: Tensor | None
    context: Projected
    rope: Rope
