"""How a generation fits into memory: the peak of each stage, and where the networks live meanwhile.

Made before anything is loaded. Stages run one after the other: text encoder, VAE (for a start), transformer, VAE. Three
placements, in this order of preference:

    resident   all networks stay on the device
    stages     one network at a time on the device, read from its files when its turn comes
    blocks     the same, and the transformer's blocks stay on the host and visit the device in turn

Everything stays resident only where the VAE needs no tiles for it: tiles are close to the whole picture, not equal. A
text encoder that is too large for the device runs on the CPU. Guidance runs as one batch of two where that fits,
otherwise one after the other.
"""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import torch

from orrery.errors import InputError
from orrery.nn.control import ActiveControl, ControlBranch, ControlConfig
from orrery.nn.dit import Conditions, DiT, DiTConfig
from orrery.nn.empty import shapes_only
from orrery.nn.offload import device_bytes as blocks_on_device
from orrery.nn.quantise import quantise
from orrery.nn.rope import cached_rope_table
from orrery.nn.text import PAD, TextConfig, TextEncoder, word_tokenizer
from orrery.nn.vae import VAE, VAEConfig
from orrery.nn.vae_tiling import TILE
from orrery.weights import ModelConfig
from orrery.world.memory import parameter_bytes, peak_bytes

GIB = 2**30
PLACEMENTS = ("resident", "stages", "blocks")
CONTEXT = GIB * 6 // 10  # what CUDA takes for itself
MARGIN = 0.08  # of the device: workspaces, fragmentation
LATENTS_HELD = 8  # by the solver and guidance, in float32; three more of a step cache are within the margin
SMALL = 2**28  # bytes of weights: such a model is resident wherever there is room for ten times that
PIXELS_AT_ONCE = 2**21  # decoded together: bounds the VAE's memory


@dataclass(frozen=True)
class Shape:
    """What is generated, as far as memory goes: pixels (H, W), frames drawn at once, given frames, texts (2 with
    guidance), the config of each control branch that acts on it, and a way of `nn.quantise` for the weights, if any."""

    size: tuple[int, int]
    frames: int
    given: int = 0
    texts: int = 2
    controls: tuple[ControlConfig, ...] = ()
    quantise: str | None = None


@dataclass(frozen=True)
class Needs:
    """Bytes: weights of each network, and the peak of each stage beyond them. streamed: of the transformer where its
    blocks stay on the host, but for so many: 0, 1, ... all of them."""

    text: int
    text_peak: int
    transformer: int
    streamed: tuple[int, ...]
    transformer_peak: int
    batch_peak: int
    vae: int
    vae_peak: int
    tile_peak: int


@dataclass(frozen=True)
class Plan:
    """Where everything goes. capacity: bytes of the device that may be used. peaks: bytes on the device in each stage.
    fits: whether the largest of them is within the capacity. resident: blocks that stay on the device with "blocks"."""

    placement: str
    text_on_cpu: bool
    tiled: bool
    side_by_side: bool
    capacity: float
    peaks: dict[str, int]
    resident: int = 0

    @property
    def peak(self) -> int:
        """The most that is on the device at any time."""
        return max(self.peaks.values())

    @property
    def fits(self) -> bool:
        """Whether there is room."""
        return self.peak <= self.capacity

    def __str__(self) -> str:
        extras = ["text encoder on the CPU"] * self.text_on_cpu + ["VAE in tiles"] * self.tiled
        extras.append("guidance in one batch" if self.side_by_side else "guidance one by one")
        extras += [f"{self.resident} blocks stay"] * bool(self.resident)
        return f"{self.placement}, {', '.join(extras)}; peak {self.peak / GIB:.1f} of {self.capacity / GIB:.1f} GiB"


def device_bytes(device: torch.device) -> int:
    """Memory of a device: of a GPU all of it, of the CPU all that the machine has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def make_plan(
    config: ModelConfig,
    shape: Shape,
    memory: float,
    dtype: torch.dtype,
    vae_dtype: torch.dtype,
    cuda: bool = True,
    placement: str | None = None,
) -> Plan:
    """The first placement that fits; the last one if none does.

    Args:
        memory: bytes of the device.
        dtype, vae_dtype: of transformer and text encoder, and of the VAE.
        cuda: a GPU, whose driver takes a share; on a CPU there is nothing to offload from.
        placement: this one, whether it fits or not.
    """
    if placement not in (None, *PLACEMENTS):
        raise InputError(f"placement is {placement!r}; allowed are {', '.join(PLACEMENTS)}")
    capacity = memory * (1 - MARGIN) - (CONTEXT if cuda else 0)
    needs = measure(config, shape, dtype, vae_dtype)
    choices = (placement,) if placement else PLACEMENTS if cuda else PLACEMENTS[:2]
    plans = [_placed(needs, shape, choice, capacity, cuda) for choice in choices]
    exact = [plan for plan in plans if plan.placement != "resident" or not plan.tiled or placement]
    return next((plan for plan in exact if plan.fits), plans[-1])


def _placed(needs: Needs, shape: Shape, placement: str, capacity: float, cuda: bool) -> Plan:
    resident = placement == "resident"
    text_on_cpu = cuda and not resident and needs.text + needs.text_peak > capacity
    weights = 0 if text_on_cpu else needs.text
    others = weights + needs.transformer + needs.vae if resident else 0
    transformer, stay = needs.transformer, 0
    if placement == "blocks":
        # From all but two blocks on nothing is saved. One batch of guidance is worth more than blocks that stay: it
        # halves how often the others come.
        most = max(1, len(needs.streamed) - 3)
        peaks_wanted = [needs.batch_peak] * (shape.texts == 2) + [needs.transformer_peak]
        fitting = (n for peak in peaks_wanted for n in reversed(range(most)) if needs.streamed[n] + peak <= capacity)
        stay = next(fitting, 0)
        transformer = needs.streamed[stay]
    base = others or transformer
    side_by_side = shape.texts == 2 and base + needs.batch_peak <= capacity
    tiled = (others or needs.vae) + needs.vae_peak > capacity
    peaks = {
        "text encoder": (others or weights) + (0 if text_on_cpu else needs.text_peak),
        "transformer": base + (needs.batch_peak if side_by_side else needs.transformer_peak),
        "VAE": (others or needs.vae) + (needs.tile_peak if tiled else needs.vae_peak),
    }
    return Plan(placement, text_on_cpu, tiled, side_by_side, capacity, peaks, stay)


def measure(config: ModelConfig, shape: Shape, dtype: torch.dtype, vae_dtype: torch.dtype) -> Needs:
    """Weights and peaks of a model at a size, from its networks on the meta device. A second of work at any size."""
    return _measure(config.transformer, config.vae, config.text, shape, dtype, vae_dtype)


@lru_cache(maxsize=32)
def _measure(
    transformer: DiTConfig, vae: VAEConfig, text: TextConfig, shape: Shape, dtype: torch.dtype, vae_dtype: torch.dtype
) -> Needs:
    with shapes_only():
        encoder = TextEncoder(dataclasses.replace(text, pad_token=PAD), word_tokenizer(["word"])).to(dtype)
        network, autoencoder = DiT(transformer).to(dtype), VAE(vae).to(vae_dtype)
        height, width = (side // autoencoder.spatial_factor for side in shape.size)
        size = ((shape.frames - 1) // autoencoder.temporal_factor + 1, height, width)
        branches = [ControlBranch(transformer, control).to(dtype) for control in shape.controls]
        _round((network, *branches), shape.quantise)
        one, all_texts = (
            _transformer_peak(transformer, text.length, size, dtype, shape, batch) for batch in (1, shape.texts)
        )
        text_peak = _text_peak(encoder, dtype, shape.texts)
        blocks = sum(parameter_bytes(block, dtype) for block in network.blocks)
        whole_peak, tile_peak = (_vae_peak(autoencoder, size, shape.given, vae_dtype, tiled) for tiled in (False, True))
    weights = sum(parameter_bytes(each, dtype) for each in (network, *branches))
    return Needs(
        text=parameter_bytes(encoder, dtype),
        text_peak=text_peak,
        transformer=weights,
        streamed=tuple(weights - blocks + blocks_on_device(network.blocks, n) for n in range(transformer.depth + 1)),
        transformer_peak=one,
        batch_peak=all_texts,
        vae=parameter_bytes(autoencoder, vae_dtype),
        vae_peak=whole_peak,
        tile_peak=tile_peak,
    )


def _round(networks: Sequence[DiT | ControlBranch], how: str | None, keep: Sequence[int] | None = None) -> None:
    """Quantise the weights of all of them, where there is a way to."""
    for network in networks if how is not None else ():
        quantise(network, cast(str, how), keep=keep)


def _text_peak(encoder: TextEncoder, dtype: torch.dtype, texts: int) -> int:
    """Of one prompt after the other, with the embeddings of those before."""
    tokens = torch.empty(1, encoder.config.length, dtype=torch.int64)
    kept = encoder.config.length * encoder.config.text_dim * dtype.itemsize
    return peak_bytes(lambda: encoder(tokens)) + (texts - 1) * kept


def _transformer_peak(
    config: DiTConfig,
    length: int,
    size: tuple[int, int, int],
    dtype: torch.dtype,
    shape: Shape,
    batch: int,
) -> int:
    """Of one step: the forward pass, all texts (their embeddings; their keys and values in all blocks, of a batch as
    they are and put together), and what the solver holds.

    The pass is measured with two blocks, or as many as control branches act on: more add nothing to its peak.
    """
    controls, texts = shape.controls, shape.texts
    cached_rope_table.cache_clear()  # a table that an earlier measurement made would not be counted
    depth = min(config.depth, max([2, *(control.blocks for control in controls)]))
    small = dataclasses.replace(config, depth=depth)
    network = DiT(small).to(dtype)
    signal = torch.empty(1, config.latent_channels, *size)
    branches = [ControlBranch(small, dataclasses.replace(control, every=1)).to(dtype) for control in controls]
    _round((network, *branches), shape.quantise, keep=())  # a weight is whole again while it is used
    active = [ActiveControl(branch, signal) for branch in branches]
    latents = torch.empty(batch, config.latent_channels, *size)
    text = torch.empty(batch, length, config.text_width, dtype=dtype)
    conditions = Conditions(network.encode_text(text), torch.empty(1, 1, *size), controls=active)
    forward = peak_bytes(lambda: network(latents, torch.empty(batch, size[0]), conditions))
    keys_values = config.depth * 2 * length * config.width * (2 if batch > 1 else 1)
    texts_held = texts * (keys_values + length * config.text_width) * dtype.itemsize
    controls_held = len(controls) * signal.nbytes
    return forward + texts_held + controls_held + LATENTS_HELD * latents[:1].numel() * 4


def _vae_peak(vae: VAE, size: tuple[int, int, int], given: int, dtype: torch.dtype, tiled: bool) -> int:
    """Of streamed decoding (after two chunks every cache is full) and of encoding the given frames: the whole picture,
    or a tile latent by latent, as `decode_tiled` and `encode_tiled` do."""
    factor, whole = vae.spatial_factor, size[1:]
    rows, columns = (min(side, limit) for side, limit in zip(whole, TILE)) if tiled else whole
    chunk = 1 if tiled else latents_at_once(vae, whole)
    latents = torch.empty(1, vae.config.latent_channels, min(3 * chunk, size[0]), rows, columns, dtype=dtype)

    def decode() -> None:
        for _ in vae.decode_stream(latents, chunk):
            pass

    peak = peak_bytes(decode)
    if given:
        frames = torch.empty(1, 3, given, whole[0] * factor, whole[1] * factor, dtype=dtype)
        part = frames[..., : rows * factor, : columns * factor]
        parts = encoded_at_once(vae, given, frames.shape[3], frames.shape[4])[:3]  # after three every cache is full
        if tiled or len(parts) == 1:
            encode = frames.nbytes + peak_bytes(lambda: vae.encode(part, vae.temporal_factor if tiled else None))
        else:
            encode = peak_bytes(lambda: sum(1 for _ in vae.encode_stream(frames[:, :, each] for each in parts)))
            encode += frames[:, :, parts[-1]].nbytes
        peak = max(peak, encode)
    return peak


def latents_at_once(vae: VAE, size: tuple[int, int]) -> int:
    """How many latent frames of (h, w) are decoded together."""
    pixels = size[0] * size[1] * vae.spatial_factor**2
    return max(1, PIXELS_AT_ONCE // (pixels * vae.temporal_factor))


def encoded_at_once(vae: VAE, frames: int, height: int, width: int) -> list[slice]:
    """Which of the frames of a clip are encoded together: all of a short one, else one, and then so many at a time."""
    chunk = latents_at_once(vae, (height // vae.spatial_factor, width // vae.spatial_factor)) * vae.temporal_factor
    if frames <= 1 + chunk:
        return [slice(0, frames)]
    return [slice(0, 1), *(slice(start, start + chunk) for start in range(1, frames, chunk))]
