"""The big linear layers of a transformer in 8 bits, for inference: 0.59 of the bytes of the 2B in bfloat16, 14B 0.54.

    int8  integers -127..127, one scale an output channel (absmax / 127); dequantised where they are used
    fp8   float8 e4m3 (arXiv 2209.05433), one scale an output channel (absmax / 448); activations are rounded to it as
          well, with a scale a token, and multiplied in it (`torch._scaled_mm`) on GPUs that can

Rounding moves weights by 0.7 % in int8 and by 2.6 % in float8 (random ones of width 2048, and the trained ones in the
package). So "int8" is there to save memory and "fp8" to save time, on GPUs and best under torch.compile, which joins
the passes that round activations. On a CPU int8 costs little time; float8, emulated, makes a network three times
slower. (Float8 for the weights alone saves what int8 saves at three to four times its error, and is not offered.)

Attention's projections and the MLP of every block are quantised, nine tenths of a block's weights; embeddings,
modulation, norms, the text projection, a control branch's zero-initialised projections and the final layer stay.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orrery.nn.control import ControlBranch
from orrery.nn.dit import Block, DiT

WAYS = ("int8", "fp8")
FP8 = torch.float8_e4m3fn
LARGEST = {torch.int8: 127.0, FP8: 448.0}
SMALLEST_SCALE = 1e-12  # of a row of zeros
FP8_CAPABILITY = (8, 9)  # compute capability from which a GPU multiplies float8


@dataclass(frozen=True)
class Quantised:
    """What `quantise` did. errors: |rounded - weight| / |weight| (Frobenius) by layer, in its order; not a number for
    weights on the meta device. kept: big layers that stayed as they were. before, after: bytes of the whole network.
    emulated: fp8 on a device that does not multiply float8, where it costs time instead of saving it."""

    how: str
    errors: dict[str, float]
    kept: tuple[str, ...]
    before: int
    after: int
    emulated: bool

    def __str__(self) -> str:
        worst = max(self.errors, key=self.errors.__getitem__)
        return (
            f"{self.how}: {len(self.errors)} linear layers in 8 bits ({len(self.kept)} kept), "
            f"{self.before / 1e6:,.0f} MB of weights now {self.after / 1e6:,.0f} MB, "
            f"rounded by {fmean(self.errors.values()):.2%} (at most {self.errors[worst]:.2%}, {worst})"
            f"{'; emulated, as this device does not multiply float8' * self.emulated}"
        )


class QuantisedLinear(nn.Module):
    """A linear layer without bias whose weight is `qweight` [out, in], int8 or float8, times `scale` fp32 [out, 1].

    Moving it to another dtype does nothing, moving it to another device moves both.
    """

    def __init__(self, qweight: Tensor, scale: Tensor):
        super().__init__()
        self.qweight = nn.Parameter(qweight, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] in float32, bfloat16 or float16 -> [..., out] in its dtype."""
        if self.qweight.dtype == FP8:
            return fp8_linear(x, self.qweight, self.scale)
        return F.linear(x, dequantised(self.qweight, self.scale, x.dtype))

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        return super()._apply(moved, recurse)

    def extra_repr(self) -> str:
        out, inner = self.qweight.shape
        kind = str(self.qweight.dtype).removeprefix("torch.")
        return f"in_features={inner}, out_features={out}, {kind}"


def quantise(
    net: DiT | ControlBranch,
    how: str,
    device: torch.device | str | None = None,
    keep: Sequence[int] | None = None,
) -> Quantised:
    """Replace the big linear layers in place, one after the other, and freeze the network: it is for inference, no LoRA
    can be merged into those layers any more, and it is not to be saved.

    >>> print(quantise(net, "int8"))

    Args:
        net: in float32, bfloat16 or float16, with its LoRAs merged; neither streamed nor quantised.
        how: one of `WAYS`.
        device: where the network will compute, and where the rounding is done: weights that wait on the host come back
            to the host. Default: where each weight is.
        keep: blocks that stay as they are, -1 for the last. Default: the last one of a DiT, whose rounding nothing
            evens out: without it the velocity of the model in the package is off by a quarter to a third less. In "fp8"
            a layer with sides that are no multiples of 16 stays as well.

    Raises:
        ValueError: another network, an unknown way, a network that is quantised or streamed already, a block that is
            not there, weights that are not finite, fp8 for a GPU that cannot multiply it.
    """
    if not isinstance(net, DiT | ControlBranch):
        raise ValueError(f"only a DiT or a ControlBranch can be quantised, got {type(net).__name__}")
    if how not in WAYS:
        raise ValueError(f"how is {how!r}; allowed are {', '.join(WAYS)}")
    if any(isinstance(module, QuantisedLinear) for module in net.modules()):
        raise ValueError("this network is quantised already")
    if any(parameter.numel() == 0 for parameter in net.parameters()):
        raise ValueError("the weights of this network are not in it: quantise before blocks are streamed")
    target = torch.device(device) if device is not None else next(net.parameters()).device
    if how == "fp8" and (problem := fp8_problem(target)):
        raise ValueError(problem)

    before = _bytes(net)
    chosen, kept = _choose(net, how, keep)
    errors = {}
    for name in chosen:
        linear = net.get_submodule(name)
        layer, errors[name] = _rounded(cast(nn.Linear, linear), how, target if device is not None else None, name)
        net.set_submodule(name, layer)
    net.requires_grad_(False)
    emulated = how == "fp8" and target.type not in ("cuda", "meta")
    return Quantised(how, errors, kept, before, _bytes(net), emulated)


def fp8_problem(device: torch.device) -> str:
    """Why a GPU cannot multiply float8, or an empty string. A CPU emulates it."""
    if device.type != "cuda" or torch.version.hip is not None:  # torch checks AMD's cards itself
        return ""
    capability = torch.cuda.get_device_capability(device)
    if capability >= FP8_CAPABILITY:
        return ""
    here, needed = ("{}.{}".format(*each) for each in (capability, FP8_CAPABILITY))
    return f"fp8 needs a GPU of compute capability {needed}, this one has {here}: int8 runs on it"


def quantise_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[N, K] -> rows of int8 or float8 [N, K], and what to multiply them with, fp32 [N, 1]: absmax over the largest
    number of that dtype. Rounds to the nearest, ties to even; for float8 after a division in the dtype of x."""
    scale = torch.linalg.vector_norm(x, float("inf"), dim=-1, keepdim=True, dtype=torch.float32)
    scale = (scale / LARGEST[dtype]).clamp_min(SMALLEST_SCALE)
    working = torch.float32 if dtype == torch.int8 else x.dtype  # bfloat16 holds 4 bits more than float8, int8 none
    divided = torch.div(x, scale, out=torch.empty_like(x, dtype=working))
    return (divided.round_() if dtype == torch.int8 else divided).to(dtype), scale


def dequantised(qweight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """qweight * scale, computed in fp32 and rounded once to `dtype`."""
    wide = qweight if qweight.dtype == torch.int8 else qweight.to(dtype)  # float8 does not mix with other dtypes
    return torch.mul(wide, scale, out=torch.empty(qweight.shape, dtype=dtype, device=qweight.device))


def fp8_linear(x: Tensor, qweight: Tensor, scale: Tensor) -> Tensor:
    """x [..., in] times qweight^T, both in float8, with a scale a row of each; -> [..., out] in the dtype of x.

    On a GPU the answer is rounded to bfloat16 whatever the dtype of x, and sums are kept as the tensor cores keep them
    ("fast accumulation", some 14 bits on Hopper). Elsewhere the multiplication of the rounded numbers is emulated.
    """
    rows, row_scale = quantise_rows(x.reshape(-1, x.shape[-1]), FP8)
    if x.device.type in ("cuda", "meta"):
        out = torch._scaled_mm(
            rows,
            qweight.t(),
            scale_a=row_scale,
            scale_b=scale.view(1, -1),
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        ).to(x.dtype)
    else:
        dtype = x.dtype if x.dtype == torch.bfloat16 else torch.float32  # either holds every float8; float16 overflows
        out = (F.linear(rows.to(dtype), qweight.to(dtype)) * row_scale * scale.view(1, -1)).to(x.dtype)
    return out.view(*x.shape[:-1], -1)


def _choose(net: DiT | ControlBranch, how: str, keep: Sequence[int] | None) -> tuple[list[str], tuple[str, ...]]:
    """Names of the layers to quantise, and of those that stay."""
    place, blocks = ("blocks", net.blocks) if isinstance(net, DiT) else ("control_blocks", net.control_blocks)
    count = len(blocks)
    if keep is None:
        keep = (-1,) if isinstance(net, DiT) and count > 1 else ()
    if wrong := [index for index in keep if not -count <= index < count]:
        raise ValueError(f"keep names block {wrong[0]}; allowed are {-count} to {count - 1}")
    stay = {index % count for index in keep}
    chosen: list[str] = []
    kept: list[str] = []
    for index, block in enumerate(blocks):
        for name, layer in _big(cast(Block, block)):
            fits = how != "fp8" or layer.in_features % 16 == layer.out_features % 16 == 0
            (chosen if fits and index not in stay else kept).append(f"{place}.{index}.{name}")
    if not chosen:
        raise ValueError("keep and the sizes of the layers leave nothing to quantise")
    return chosen, tuple(kept)


def _big(block: Block) -> Iterator[tuple[str, nn.Linear]]:
    """Linear layers of both attentions and the MLP."""
    for part in ("self_attn", "cross_attn", "mlp"):
        for name, module in block.get_submodule(part).named_modules():
            if isinstance(module, nn.Linear):
                yield f"{part}.{name}", module


@torch.no_grad()
def _rounded(linear: nn.Linear, how: str, device: torch.device | None, name: str) -> tuple[QuantisedLinear, float]:
    """The layer in 8 bits, and its relative error."""
    if linear.bias is not None:
        raise ValueError(f"{name} has a bias, and layers with one cannot be quantised")
    weight = linear.weight.to(device or linear.weight.device)
    qweight, scale = quantise_rows(weight, torch.int8 if how == "int8" else FP8)
    error = float("nan")
    if not weight.is_meta:
        size = torch.linalg.vector_norm(weight, dtype=torch.float32)
        off = dequantised(qweight, scale, torch.float32).sub_(weight)
        error = float(torch.linalg.vector_norm(off) / size.clamp_min(SMALLEST_SCALE))
        if not error < float("inf"):
            raise ValueError(f"{name} holds weights that are not finite")
    home = linear.weight.device
    return QuantisedLinear(qweight.to(home), scale.to(home)), error


def _bytes(net: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in net.parameters())
