"""What makes a world faster: rungs, each a setting of its own, and three presets made of them.

The exact rungs change numbers by rounding alone, and those that cost nothing are on by default. The inexact ones are
off unless they are asked for, and `benchmarks/README.md` says of each what it gains and how far from the dense result
it is.
"""

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from orrery.errors import InputError, note
from orrery.nn.compiling import compiler_problem
from orrery.nn.control import ControlBranch
from orrery.nn.dit import Block, DiT
from orrery.nn.kernels import KERNELS, choose, find_kernel, using
from orrery.nn.neighbourhood import choose_backend
from orrery.nn.neighbourhood_pattern import PUBLISHED, attention_share
from orrery.nn.quantise import WAYS, quantise
from orrery.nn.vae import VAE
from orrery.weights import ModelConfig


@dataclass(frozen=True)
class Speed:
    """How a world is made faster. The defaults are exact.

    Exact, to rounding:
        attention: a kernel by name, or "auto": the fastest exact one, measured on the shape at hand. One that is not
            exact ("sage-attention") has to be named.
        compile: torch.compile for the blocks of the transformer and its control branches, and for the norms of the VAE
            on a GPU; needs a C++ compiler on a CPU and Triton on a GPU, and takes its time at the first step of each
            size.

    Inexact:
        cache: how far the latents of the result may be off for the sake of evaluations that are left out, relative (see
            `flow.StepCache`); 0 leaves none out.
        interval: noise levels (low, high) within which guidance acts (arXiv 2404.07724); outside of them half of the
            arithmetic is saved. (0, 1) is everywhere.
        steps: of the solver, where a request says nothing; None is the model's own number.
        dtype: in which the transformer and the text encoder compute, and on a CPU the VAE; None is `load`'s choice.
        quantise: the weights of the big layers in 8 bits: "int8" for memory, "fp8" for time (see `nn.quantise`).
        sparse: neighbourhood attention (arXiv 2504.16922) in place of full attention: "2b" or "14b", the published
            patterns. Only for weights that were trained with it: others lose their picture.
    """

    attention: str = "auto"
    compile: bool = False
    cache: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)
    steps: int | None = None
    dtype: str | None = None
    quantise: str | None = None
    sparse: str | None = None

    def __post_init__(self) -> None:
        if self.attention not in ("auto", *KERNELS):
            raise InputError(f"attention is {self.attention!r}; allowed are auto, {', '.join(KERNELS)}")
        if not (isinstance(self.cache, int | float) and 0 <= self.cache < 1):
            raise InputError(f"cache is {self.cache!r}; allowed is a relative error from 0 (never) to below 1")
        low, high = self.interval
        if not 0 <= low < high <= 1:
            raise InputError(f"interval is {low:g} to {high:g}; allowed are noise levels 0 <= low < high <= 1")
        if self.steps is not None and (not isinstance(self.steps, int) or self.steps < 1):
            raise InputError(f"steps is {self.steps!r}; allowed is a whole number of at least 1")
        if self.quantise not in (None, *WAYS):
            raise InputError(f"quantise is {self.quantise!r}; allowed are {', '.join(WAYS)}")
        if self.sparse not in (None, *PUBLISHED):
            raise InputError(f"sparse is {self.sparse!r}; allowed are {', '.join(PUBLISHED)}")

    def changed(self, words: Sequence[str]) -> "Speed":
        """With KEY=VALUE of each word in place of what was: "compile", "cache=0.02", "interval=0.2:0.9".

        Raises:
            InputError: an unknown key, or a value that it cannot take; both are named.
        """
        return dataclasses.replace(self, **dict(_parsed(word) for word in words))

    @property
    def exact(self) -> bool:
        """Whether it changes numbers by rounding alone."""
        plain = dataclasses.replace(Speed(), attention=self.attention, compile=self.compile)
        return self == plain and (self.attention == "auto" or KERNELS[self.attention].exact)

    @property
    def guidance_interval(self) -> tuple[float, float] | None:
        """None: everywhere."""
        return None if self.interval == (0.0, 1.0) else self.interval

    def steps_of(self, config: ModelConfig) -> int | None:
        """The solver's steps where a request says nothing; never more than the model's own."""
        return None if self.steps is None else min(self.steps, config.sampling.steps)

    def __str__(self) -> str:
        """What differs from the defaults, as KEY=VALUE; "exact" where nothing does."""
        default = Speed()
        pairs = [(f.name, getattr(self, f.name)) for f in dataclasses.fields(self)]
        words = [
            name if value is True else f"{name}={_written(value)}"
            for name, value in pairs
            if value != getattr(default, name)
        ]
        return " ".join(words) or "exact"


def _written(value: Any) -> str:
    return ":".join(f"{each:g}" for each in value) if isinstance(value, tuple) else str(value)


def _parsed(word: str) -> tuple[str, Any]:
    """Key and value of KEY=VALUE; "off" is the default."""
    key, equals, text = word.partition("=")
    if key not in KEYS:
        raise InputError(f"speed has no {key!r}; allowed are {', '.join(form for form, _ in KEYS.values())}")
    form, value = KEYS[key]
    if text == "off":
        return key, getattr(Speed(), key)
    try:
        if bool(equals) == (key == "compile"):
            raise ValueError
        return key, value(text)
    except ValueError:
        raise InputError(f"speed {word!r} is not of the form {form}") from None


def _levels(text: str) -> tuple[float, float]:
    low, high = text.split(":")
    return float(low), float(high)


KEYS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "attention": ("attention=KERNEL", str),
    "compile": ("compile", lambda text: True),
    "cache": ("cache=ERROR", float),
    "interval": ("interval=LOW:HIGH", _levels),
    "steps": ("steps=NUMBER", int),
    "dtype": ("dtype=NAME", str),
    "quantise": ("quantise=WAY", str),
    "sparse": ("sparse=PATTERN", str),
}


@dataclass
class Spent:
    """What the latest generation took. evaluations: steps at which the velocity was computed. skipped: steps at which
    the step cache left it out. error: what it estimates that this adds to the latents, relative; the largest of the
    chunks."""

    evaluations: int = 0
    skipped: int = 0
    error: float = 0.0

    def __str__(self) -> str:
        steps = self.evaluations + self.skipped
        estimate = f", latents off by an estimated {self.error:.2%}" * bool(self.skipped)
        return f"the network was asked at {self.evaluations} of {steps} steps{estimate}"

    def add(self, evaluations: int, skipped: int, error: float) -> None:
        """One more chunk."""
        self.evaluations += evaluations
        self.skipped += skipped
        self.error = max(self.error, error)


def preset(name: str, config: ModelConfig, device: torch.device) -> Speed:
    """A preset by name, for a model on a device: "exact", "balanced" or "fast".

    A model that was distilled to a few steps, or takes two of them an action, has nothing to leave out: of it only the
    arithmetic gets cheaper.
    """
    if name not in PRESETS:
        raise InputError(f"preset is {name!r}; allowed are {', '.join(PRESETS)}")
    chosen = PRESETS[name]
    if config.sampling.steps < FEW_STEPS:
        chosen = dataclasses.replace(chosen, cache=0.0)
    if name == "fast":
        chosen = dataclasses.replace(chosen, **_fast_arithmetic(device))
    return chosen


def _fast_arithmetic(device: torch.device) -> dict[str, Any]:
    """What computes faster here than the default dtype, if anything does."""
    return {"dtype": "bfloat16"} if device.type == "cpu" and multiplies_bfloat16() else {}


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions that multiply bfloat16 matrices (AMX, AVX512-BF16): without them it is slower
    than float32."""
    has: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in torch 2.11
    return bool(has.get("amx_bf16") or has.get("avx512_bf16"))


def speed_of(asked: "Speed | str | None", config: ModelConfig, device: torch.device) -> Speed:
    """Settle what `load` was given: a `Speed`, or words: the name of a preset ("exact" if there is none) and what is
    to be different, such as "fast compile cache=0.02".

    Raises:
        InputError: an unknown preset or key, or an impossible value.
    """
    if isinstance(asked, Speed):
        return asked
    words = (asked or "exact").split()
    named = [word for word in words[:1] if word in PRESETS or "=" not in word and word not in KEYS]
    speed = preset(named[0] if named else "exact", config, device).changed(words[len(named) :])
    if speed.dtype == "bfloat16" and device.type == "cpu" and not multiplies_bfloat16():
        note("speed dtype=bfloat16: this CPU is not known to multiply it (AMX, AVX512-BF16), and may be slower for it")
    if speed.cache and config.sampling.solver == "renoise":
        note(
            f"speed cache={speed.cache:g} has nothing to leave out of a distilled model's {config.sampling.steps} steps"
        )
    return speed


def prepare(network: nn.Module, speed: Speed, device: torch.device) -> None:
    """Make a network that has just been loaded as fast as `speed` asks, in place. LoRAs are in it already."""
    if isinstance(network, VAE) and speed.compile and device.type == "cuda":
        check_compiler(device)
        network.compile_norms()
    if not isinstance(network, DiT | ControlBranch):
        return
    if speed.quantise is not None:
        try:
            note(str(quantise(network, speed.quantise, device)))
        except ValueError as error:
            raise InputError(f"quantise {speed.quantise}: {error}") from error
    if speed.sparse is not None and isinstance(network, DiT):
        _sparsen(network, speed.sparse)
    if speed.compile:
        check_compiler(device)
        for block in network.blocks if isinstance(network, DiT) else network.control_blocks:
            cast(Block, block).compile(dynamic=False)


def _sparsen(network: DiT, name: str) -> None:
    """Give every block its published pattern."""
    schedule = PUBLISHED[name]
    if len(schedule) != len(network.blocks):
        raise InputError(f"sparse {name} is for {len(schedule)} blocks; this network has {len(network.blocks)}")
    for block, pattern in zip(network.blocks, schedule, strict=True):
        cast(Block, block).self_attn.sparse = None if pattern is None else (pattern, SPARSE_BACKEND)
    share = attention_share(schedule, PUBLISHED_GRID)
    note(
        f"sparse {name}: {share:.0%} of the arithmetic of self-attention at 720p; weights not trained with it lose "
        "their picture"
    )


def check_compiler(device: torch.device) -> None:
    """InputError where torch.compile has no compiler for this device."""
    if problem := compiler_problem(device):
        raise InputError(f"speed compile {problem}; install it, or leave compile out")


def attention_kernel(
    speed: Speed, network: DiT, batch: int, latents: Sequence[int], device: torch.device
) -> AbstractContextManager:
    """Within the block, attention runs the kernel that was asked for, or the fastest exact one for latents (T, H, W);
    where it is sparse, each pattern by the fastest of its backends."""
    config, name, dtype = network.config, speed.attention, network.dtype
    t, h, w = (side // step for side, step in zip(latents, config.patch, strict=True))
    shape = (batch, t * h * w, config.heads, config.head_dim)
    if speed.sparse is not None:
        for block in network.blocks:
            attention = cast(Block, block).self_attn
            if attention.sparse is not None:
                pattern = attention.sparse[0]
                attention.sparse = pattern, choose_backend(shape, (t, h, w), pattern, dtype, device)
    if name == "auto":
        name = choose(shape, shape, dtype, device)
    if name == "sdpa":
        return nullcontext()
    try:
        find_kernel(name, dtype, device)
    except ValueError as error:
        raise InputError(str(error)) from error
    return using(name, dtype, device)


FEW_STEPS = 8
SPARSE_BACKEND = "gather"  # any kernel, any device, until `attention_kernel` has measured
PUBLISHED_GRID = (24, 44, 80)  # tokens of 93 frames of 704x1280
PRESETS = {
    "exact": Speed(),
    "balanced": Speed(cache=0.02),
    "fast": Speed(cache=0.1),
}
