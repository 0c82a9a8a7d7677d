"""Where in space and time a control counts: masks as users give them, and the weight maps that the network takes.

Specification of Transfer, sections 1.3 and 2. There weights are scaled down to a sum of at most 1 only where a mask is
given, although the documentation says it of all; here it is done on both paths, once each.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from orrery.control.inputs import Source, check_aspect, check_length, is_image, load, name_of, resized
from orrery.errors import InputError
from orrery.video import Video

THRESHOLD = 127.5  # of a mask video, after resizing

Grid = tuple[int, int, int]


def read_mask(
    source: Source, size: tuple[int, int], frames: int, *, trim: bool = False, camera: str | None = None
) -> np.ndarray:
    """A mask for `frames` frames at `size` (height, width): [T, H, W] float32 in 0..1.

    Args:
        source: a video (its brightest colour, resized, is 1 above `THRESHOLD` and else 0: compressed files hold no
            exact values); an image, for all frames, or an array [T, H, W] or [H, W] (for all frames), whose soft values
            are kept: bool, floats in 0..1, or whole numbers of 0 and 1 or up to 255.
        trim: of a longer one take the first `frames`. camera: which array of an .npz that holds several.

    Raises:
        InputError: not readable, or another length, shape or range.
    """
    name = name_of(source)
    loaded = load(source, "mask", camera)
    if isinstance(loaded, Video):
        video = not is_image(source)
        soft = loaded.frames.max(-1)
        mask = _fitted(soft if video else soft[0], name, size, frames, trim)
        mask = (mask > THRESHOLD).astype(np.float32) if video else mask.astype(np.float32) / 255
    else:
        mask = _fitted(_soft(loaded, name), name, size, frames, trim)
    return mask


def read_guidance(
    source: Source,
    size: tuple[int, int],
    frames: int,
    *,
    labels: Sequence[int] | None = None,
    trim: bool = False,
    camera: str | None = None,
) -> np.ndarray:
    """The mask of guided generation, where the input's own content is kept: [T, H, W] float32 in 0..1.

    Args:
        source: a video or an image (first colour, soft values kept), or an array or .npz as `read_mask` takes it; with
            `labels` an array of whole numbers: 1 where one of them stands, else 0.

    Raises:
        InputError: as `read_mask`; labels for something that holds none.
    """
    name = name_of(source)
    loaded = load(source, "guidance mask", camera)
    if isinstance(loaded, Video):
        if labels is not None:
            raise InputError(f"labels {list(labels)} were given for {name}, a picture; they belong to an array")
        first = loaded.frames[..., 0]
        return _fitted(first[0] if is_image(source) else first, name, size, frames, trim).astype(np.float32) / 255
    if labels is None:
        return _fitted(_soft(loaded, name), name, size, frames, trim)
    if loaded.dtype.kind not in "iu":
        raise InputError(f"labels {list(labels)} were given for {name} of {loaded.dtype}; they need whole numbers")
    return _fitted(np.isin(loaded, labels).astype(np.float32), name, size, frames, trim, "nearest")


def _soft(array: np.ndarray, name: str) -> np.ndarray:
    """An array's values in 0..1, float32."""
    kind = array.dtype.kind
    low, high = (float(array.min()), float(array.max())) if array.size and kind in "biuf" else (math.nan, math.nan)
    if not (low >= 0 and high <= (255 if kind in "iu" else 1)):
        allowed = "bool, floats in 0..1 or whole numbers in 0..255"
        labels = "; for labels say which of them count" if kind in "iu" else ""
        raise InputError(f"{name} holds {array.dtype} from {low:g} to {high:g}; a mask is {allowed}{labels}")
    return array.astype(np.float32) / (255 if kind in "iu" and high > 1 else 1)


def _fitted(
    mask: np.ndarray, name: str, size: tuple[int, int], frames: int, trim: bool, how: str = "linear"
) -> np.ndarray:
    """mask [T, H, W], or [H, W] for all frames, checked, and resized to [frames, *size]."""
    if mask.ndim not in (2, 3) or not mask.size:
        raise InputError(f"{name} is {list(mask.shape)}; a mask is [T, H, W], or [H, W] for all frames")
    constant = mask.ndim == 2
    mask = mask[None] if constant else mask
    check_length(name, frames if constant else len(mask), frames, trim)
    check_aspect(name, mask.shape[1:], size)
    mask = resized(mask[:frames], size, how)
    return np.repeat(mask, frames, axis=0) if constant else mask


def normalised(weights: Sequence[float]) -> list[float]:
    """Weights of controls, one a control, scaled down so that their sum is at most 1 (arXiv 2511.00062; the published
    code documents it and leaves it out where there is no mask). Scaled once: what sums to 1 or less stays as it is.

    Raises:
        InputError: a weight below 0 or not finite, or none above 0.
    """
    _check_weights(weights)
    total = max(1.0, math.fsum(weights))
    return [float(weight) / total for weight in weights]


def weight_maps(
    masks: Sequence[np.ndarray | None],
    weights: Sequence[float],
    grid: Grid,
    device: torch.device | str | None = None,
) -> Tensor:
    """How much each of n controls counts at each token: [n, 1, T', H', W'] float32, at most 1 in sum everywhere.

    Args:
        masks: one a control: [T, H, W] in 0..1, or None for everywhere.
        weights: one a control.
        grid: (T', H', W'), the tokens: latent frames, latent height and width over the patch.

    Each mask goes to the grid by `to_grid` and is multiplied by its weight; then the maps are divided by their sum
    wherever it is above 1.

    Raises:
        InputError: not as many weights as masks, weights that `normalised` refuses, a mask of another shape or range.
    """
    if len(masks) != len(weights):
        raise InputError(f"{len(masks)} masks for {len(weights)} weights; each needs both (no mask: None)")
    _check_weights(weights)
    maps = torch.empty(len(masks), 1, *grid, device=device)
    for index, (mask, weight) in enumerate(zip(masks, weights, strict=True)):
        maps[index] = weight * (1.0 if mask is None else to_grid(mask, grid, device)[0])
    return maps / maps.sum(0).clamp(min=1)


def guidance_mask(mask: np.ndarray, grid: Grid, device: torch.device | str | None = None) -> Tensor:
    """[1, 1, T', H', W'] float32 over the latents, grid (T', H', W'), of a mask [T, H, W] from `read_guidance`.

    Each group of four frames is resized to one latent frame, the first frame alone to the first (`to_grid`).

    Raises:
        InputError: a mask of another shape or range.
    """
    return to_grid(mask, grid, device)[None]


def to_grid(mask: np.ndarray, grid: Grid, device: torch.device | str | None = None) -> Tensor:
    """mask [T, H, W] in 0..1 -> [1, T', H', W'] float32: the first frame alone, for the first latent frame sees no
    other, and the rest, both by trilinear interpolation without antialiasing, `align_corners` False.

    Raises:
        InputError: a mask of another shape or range, or with fewer frames than the grid.
    """
    if mask.ndim != 3 or not mask.size or not bool((mask >= 0).all() and (mask <= 1).all()):
        raise InputError(f"a mask must be [T, H, W] with values in 0..1, got {mask.dtype} {list(mask.shape)}")
    if min(grid) < 1 or (grid[0] == 1) != (len(mask) == 1) or len(mask) < grid[0]:
        raise InputError(f"a mask of {len(mask)} frames does not go onto a grid of {grid[0]} latent frames")
    volume = torch.from_numpy(np.ascontiguousarray(mask)).to(device)[None, None].float()
    parts = [_interpolated(volume[:, :, :1], (1, *grid[1:]))]
    if grid[0] > 1:
        parts.append(_interpolated(volume[:, :, 1:], (grid[0] - 1, *grid[1:])))
    return torch.cat(parts, dim=2)[0]


def _interpolated(volume: Tensor, size: Any) -> Tensor:
    return F.interpolate(volume, size, mode="trilinear", align_corners=False)


def _check_weights(weights: Sequence[float]) -> None:
    if not len(weights):
        raise InputError("no weights were given; each control needs one")
    if any(not math.isfinite(weight) or weight < 0 for weight in weights):
        raise InputError(f"control weights are {list(weights)}; each must be a number from 0")
    if not any(weights):
        raise InputError(f"control weights are {list(weights)}; at least one must be above 0")
