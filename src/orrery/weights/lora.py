"""LoRA adapters (arXiv 2106.09685): W [out, in] becomes W + scale * factor * B A, with A [rank, in] and B [out, rank].

Three layouts are read, told apart by their keys:

    PEFT        base_model.model.NAME.lora_A.weight; rank and alpha in adapter_config.json beside the file
    diffusers   transformer.NAME.lora_A.weight; PEFT's options in the file's header, or tensors NAME.alpha
    official    net.base_model.model.NAME.lora_A.default.weight, in a file of the whole model; alpha is not stated

NAME is a module of our transformer, which has the official names, or of diffusers' CosmosTransformer3DModel; factor is
alpha / rank, or alpha / sqrt(rank) under PEFT's use_rslora. Specification of the base model, sections 2.1 and 2.2.
"""

import hashlib
import json
import math
import re
import struct
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from orrery.errors import InputError, note, one_line
from orrery.files import atomic_file, atomic_folder
from orrery.weights.layouts import OFFICIAL_EXTRA, diffusers_transformer_key, official_prefix
from orrery.weights.tensors import read_tensors

FILES = ("adapter_model.safetensors", "adapter_model.bin", "pytorch_lora_weights.safetensors")
Shapes = Mapping[str, Sequence[int]]  # of parameters, by name
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_PREFIXES = re.compile(r"^(?:(?:net_ema|net|transformer|base_model\.model)\.)*")
_KEY = re.compile(r"(?P<module>.+?)\.lora[._](?P<half>A|B|down|up)(?:\.(?P<adapter>[^.]+))?\.weight")
_METADATA = "lora_adapter_metadata"  # in the header of diffusers' safetensors files
_HALVES = {"A": "A", "down": "A", "B": "B", "up": "B"}
_REFUSED = (
    (re.compile("lora_magnitude_vector|dora_scale"), "DoRA is not supported"),
    (re.compile("lora_embedding_"), "adapters of embeddings are not supported"),
    (re.compile(r"\.bias$"), "biases are not supported"),
)
# Options of PEFT under which W + factor * B A still holds. Others must be off, those of later versions too.
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA", None),
    "bias": ("none", None),
    # PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change the base weights as well; PEFT can convert such adapters.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", "mica"),
}
_HARMLESS = frozenset(
    "alpha_pattern auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config exclude_modules "
    "fan_in_fan_out inference_mode init_lora_weights layers_pattern layers_to_transform loftq_config lora_ga_config "
    "megatron_config rank_pattern runtime_config target_modules use_rslora velora_config".split()
)


@dataclass(frozen=True, eq=False)
class LoraPair:
    """What one weight [out, in] gains: factor * b @ a, with a [rank, in] and b [out, rank] in any floating dtype."""

    a: Tensor
    b: Tensor
    factor: float

    def __post_init__(self) -> None:
        if self.a.ndim != 2 or self.b.ndim != 2 or self.a.shape[0] != self.b.shape[1] or not self.rank:
            raise ValueError(f"a [rank, in] and b [out, rank] do not fit: {list(self.a.shape)}, {list(self.b.shape)}")

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight."""
        return self.b.shape[0], self.a.shape[1]


@dataclass(frozen=True, eq=False)
class Lora:
    """Adapters by the name of the parameter they change (`blocks.0.self_attn.q_proj.weight`).

    name: the path it came from, for records and errors. scale: how strongly it is applied, on top of each factor.
    """

    name: str
    pairs: Mapping[str, LoraPair]
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise InputError(f"{self.name}: the scale of a LoRA must be a finite number, got {self.scale}")

    def delta(self, name: str, device: torch.device | str | None = None) -> Tensor:
        """fp32 [out, in] that is added to parameter `name`, computed on `device` (None: where its tensors are)."""
        pair = self.pairs[name]
        a, b = pair.a.to(device, torch.float32), pair.b.to(device, torch.float32)
        with _exact_matmul(a.device):
            return (b @ a).mul_(self.scale * pair.factor)

    @cached_property
    def hash(self) -> str:
        """16 hex digits of the SHA-256 over names, factors and numbers: the same in every layout, at every scale."""
        digest = hashlib.sha256()
        for name, pair in sorted(self.pairs.items()):
            digest.update(f"{name} {pair.rank} {pair.shape} ".encode() + struct.pack("<f", pair.factor))
            for half in (pair.a, pair.b):
                digest.update(half.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class PeftOptions:
    """The options of PEFT's adapter_config.json; refuses (InputError) all that is not plain LoRA. where: their file."""

    where: str
    values: Mapping[str, Any]

    def __post_init__(self) -> None:
        for key, allowed in _ALLOWED.items():
            if key in self.values and self.values[key] not in allowed:
                listed = ", ".join(str(value) for value in allowed)
                raise InputError(f"{self.where}: {key} is {self.values[key]!r}; allowed are {listed}: plain LoRA")
        for key, value in self.values.items():  # numbers and words only tune what true, a list or a table switches on
            if key not in _HARMLESS and (value is True or (isinstance(value, list | dict) and value)):
                raise InputError(f"{self.where}: {key} is {value!r}; only plain LoRA is supported")
        for key, patterns in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
            table = self.values.get(patterns) or {}
            try:
                re.compile("|".join(f"({pattern})" for pattern in dict(table)))
            except (re.error, ValueError, TypeError) as error:
                raise InputError(f"{self.where}: {patterns} is {table!r}; allowed are patterns and numbers") from error
            for name, value in {key: self.values.get(key), **table}.items():
                if not (isinstance(value, int | float) and math.isfinite(value) and (key != "r" or value >= 1)):
                    what = "whole numbers of at least 1" if key == "r" else "finite numbers"
                    raise InputError(f"{self.where}: {key} of {name} is {value!r}; allowed are {what}")

    def factor(self, module: str, rank: int) -> float:
        """Of the module of that name in the model that the adapter was made on; its A has `rank` rows."""
        expected = self._pick("rank_pattern", module, "r")
        if rank != expected:
            raise InputError(f"{self.where} gives {module} the rank {expected}, its tensors have {rank}")
        alpha = self._pick("alpha_pattern", module, "lora_alpha")
        return alpha / (math.sqrt(rank) if self.values.get("use_rslora") else rank)

    def _pick(self, patterns: str, module: str, otherwise: str) -> Any:
        """PEFT's rule: the first pattern that is the module's name, or its end after a dot."""
        for pattern, value in (self.values.get(patterns) or {}).items():
            if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module):
                return value
        return self.values[otherwise]


@contextmanager
def _exact_matmul(device: torch.device) -> Iterator[None]:
    """fp32 products are fp32, whatever TF32 or an enclosing autocast would make of them."""
    kinds = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [kind.fp32_precision for kind in kinds]
    try:
        for kind in kinds:
            kind.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for kind, precision in zip(kinds, before, strict=True):
            kind.fp32_precision = precision


def read_lora(path: str | PathLike[str], names: Shapes, scale: float = 1.0) -> Lora:
    """The LoRA of a safetensors file, a torch checkpoint, or a folder of PEFT or diffusers. Every key must fit.

    Args:
        names: names and shapes of the transformer's parameters, as of `named_parameters()`.
        scale: how strongly it will be applied.

    Raises:
        InputError: no such file, or a damaged one; it holds no LoRA, or not a plain one (DoRA, biases, PiSSA, ...);
            a key fits no weight, has no partner or another shape; values that are not finite.
    """
    file = _in_folder(Path(path)) if Path(path).is_dir() else Path(path)
    return lora_from_tensors(read_tensors(file), names, str(path), scale, _read_options(file))


def _in_folder(folder: Path) -> Path:
    found = [folder / name for name in FILES if (folder / name).is_file()]
    if not found:
        raise InputError(f"{folder} holds no LoRA: it has none of {', '.join(FILES)}")
    if len(found) > 1:
        raise InputError(f"{folder} holds several LoRAs, name one: {', '.join(file.name for file in found)}")
    return found[0]


def _read_options(file: Path) -> PeftOptions | None:
    """PEFT's options, from the header of the file or the adapter_config.json beside it; None for neither."""
    beside, where = file.parent / "adapter_config.json", f"the header of {file}"
    try:
        with safe_open(file, framework="pt") as opened:
            text = (opened.metadata() or {}).get(_METADATA)
    except SafetensorError:  # a torch checkpoint: it was read before
        text = None
    if text is None:
        if not beside.is_file():
            return None
        text, where = beside.read_text(encoding="utf-8", errors="replace"), str(beside)
    try:
        values = dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise InputError(f"{where} is no JSON table of PEFT's options: {one_line(error)}") from error
    if any(key.startswith("transformer.") for key in values):  # beside those of other components
        values = {k.removeprefix("transformer."): v for k, v in values.items() if k.startswith("transformer.")}
    return PeftOptions(where, values)


def lora_from_tensors(
    tensors: Mapping[str, Tensor], names: Shapes, name: str, scale: float = 1.0, options: PeftOptions | None = None
) -> Lora:
    """As `read_lora`, from a table of tensors in any of the layouts; `name` is the LoRA's, for records and errors."""
    found, problems = _collect(tensors, names, name)
    known = {diffusers_transformer_key(key): key for key in names} | {key: key for key in names}
    fitting: dict[str, str] = {}  # parameter: module under the name that the file has for it
    for module, parts in found.items():
        target = known.get(f"{module}.weight", "")
        wrong = f"another adapter for {target}" if target in fitting else _misfit(parts, names.get(target))
        if wrong:
            problems += [f"{key} ({wrong})" for key, _ in parts.values()]
        else:
            fitting[target] = module
    if problems:
        more = ", ..." if len(problems) > 3 else ""
        raise InputError(f"{name}: {len(problems)} keys cannot be used: {', '.join(problems[:3])}{more}")
    factors = _factors({module: found[module] for module in fitting.values()}, options, name)
    halves = {target: (found[module]["A"][1], found[module]["B"][1]) for target, module in fitting.items()}
    return Lora(name, {key: LoraPair(*pair, factors[fitting[key]]) for key, pair in halves.items()}, scale)


Parts = dict[str, tuple[str, Tensor]]  # "A", "B" and maybe "alpha" of a module: key in the file, and tensor


def _collect(tensors: Mapping[str, Tensor], names: Collection[str], where: str) -> tuple[dict[str, Parts], list[str]]:
    """The parts of each module's adapter, and the keys that are no part of one."""
    lora_keys = [key for key in tensors if is_adapter(key)]
    if not lora_keys:
        raise InputError(f"{where} holds no LoRA: none of its {len(tensors)} keys is a lora_A or lora_B")
    averaged = official_prefix(lora_keys) == "net_ema."
    whole = any(".base_layer." in key for key in tensors)  # then the weights beside the adapters are the base model's
    bare = {key: _PREFIXES.sub("", key) for key in tensors if not (averaged and key.startswith("net."))}
    matches = {key: _KEY.fullmatch(name) for key, name in bare.items()}
    adapter = _one_adapter({match["adapter"] or "" for match in matches.values() if match}, where)
    found: dict[str, Parts] = {}
    problems = []
    for key, name in bare.items():
        match = matches[key]
        if match and (match["adapter"] or "") != adapter:
            continue
        if match or name.endswith(".alpha"):
            part = _HALVES[match["half"]] if match else "alpha"
            parts = found.setdefault(match["module"] if match else name.removesuffix(".alpha"), {})
            if part in parts:
                problems.append(f"{key} (the same as {parts[part][0]})")
            parts.setdefault(part, (key, tensors[key]))
        elif not whole or (name.replace(".base_layer.", ".") not in names and not OFFICIAL_EXTRA.match(name)):
            problems.append(f"{key} ({next((why for kind, why in _REFUSED if kind.search(name)), 'unknown')})")
    return found, problems


def _one_adapter(adapters: Collection[str], where: str) -> str:
    """The adapter to take of a file whose keys name them (`.lora_A.default.weight`); "" where they have no name."""
    named = sorted(adapters) or [""]
    if len(named) == 1:
        return named[0]
    if "default" not in named:
        raise InputError(f"{where} holds several adapters and none is called default: {', '.join(named)}")
    note(f"{where} holds the adapters {', '.join(named)}: default is taken")
    return "default"


def _misfit(parts: Parts, shape: Sequence[int] | None) -> str | None:
    """Why these parts are no adapter of a weight of that shape (None: there is no such weight); None if they are."""
    if shape is None:
        return "no such weight in this model"
    if missing := [half for half in "AB" if half not in parts]:
        return f"without its {' and '.join(missing)}"
    a, b = parts["A"][1], parts["B"][1]
    rank = a.shape[0] if a.ndim else 0
    if not rank or len(shape) != 2 or list(a.shape) != [rank, shape[1]] or list(b.shape) != [shape[0], rank]:
        return f"A is {list(a.shape)} and B {list(b.shape)}, the weight {list(shape)}"
    if not all(half.is_floating_point() and half.isfinite().all() for half in (a, b)):
        return "not finite floating-point numbers"
    return None


def _factors(found: Mapping[str, Parts], options: PeftOptions | None, where: str) -> dict[str, float]:
    """alpha / rank of each module: by PEFT's options, or by the file's tensors of alpha, or 1 where neither is."""
    ranks = {module: parts["A"][1].shape[0] for module, parts in found.items()}
    stated = {module: parts["alpha"] for module, parts in found.items() if "alpha" in parts}
    if options is not None:
        if stated:
            raise InputError(f"{where} states alpha in {len(stated)} tensors, and in {options.where}; only one may")
        return {module: options.factor(module, rank) for module, rank in ranks.items()}
    if stated and len(stated) < len(found):
        raise InputError(f"{where} states alpha for {len(stated)} of its {len(found)} modules; it must for all or none")
    for key, alpha in stated.values():
        if alpha.numel() != 1 or not alpha.isfinite().all():
            raise InputError(f"{where}: {key} must be one finite number, got {alpha.tolist()}")
    if not stated:
        listed = ", ".join(map(str, sorted(set(ranks.values()))))
        note(f"{where} states no alpha: alpha = rank ({listed}), the official default, is taken; else give a scale")
    return {module: float(stated[module][1]) / rank if stated else 1.0 for module, rank in ranks.items()}


def is_adapter(key: str) -> bool:
    """Whether a key belongs to an adapter, of whatever kind, and not to the network itself."""
    return ".lora_" in key or ".lora." in key


def split_adapters(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """An official LoRA fine-tune as (the base weights under the keys of a file without LoRA, the adapters' tensors)."""
    adapters = {key: tensor for key, tensor in tensors.items() if is_adapter(key)}
    rest = ((key.replace("base_model.model.", "", 1), value) for key, value in tensors.items() if key not in adapters)
    return {key.replace(".base_layer.", "."): value for key, value in rest}, adapters


def merged_weights(weights: Mapping[str, Tensor], loras: Sequence[Lora]) -> Mapping[str, Tensor]:
    """`weights` (by our names) with the LoRAs added, each in its dtype; computed when asked for, every time, not kept.

    Raises:
        InputError: a LoRA changes a weight that is not there, or that has another shape.
    """
    _check_fit(loras, {name: weight.shape for name, weight in weights.items()})
    return _MergedWeights(weights, tuple(loras))


@dataclass(frozen=True, eq=False)
class _MergedWeights(Mapping[str, Tensor]):
    weights: Mapping[str, Tensor]
    loras: Sequence[Lora]

    def __getitem__(self, name: str) -> Tensor:
        return _with_deltas(self.weights[name], name, self.loras)

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


@torch.no_grad()
def _with_deltas(weight: Tensor, name: str, loras: Sequence[Lora]) -> Tensor:
    """fp32(weight) + the deltas, rounded once to its dtype: a new tensor; without deltas, the weight itself."""
    changing = [lora for lora in loras if name in lora.pairs]
    if not changing:
        return weight
    if weight.is_meta or weight.dtype not in DTYPES:
        raise ValueError(f"{name} is {weight.dtype} on {weight.device}: LoRAs go into fp32, bf16 or fp16, not on meta")
    total = weight.to(torch.float32, copy=True)
    for lora in changing:
        total += lora.delta(name, weight.device)
    return total.to(weight.dtype)


def _check_fit(loras: Sequence[Lora], shapes: Shapes) -> None:
    for lora in loras:
        for name, pair in lora.pairs.items():
            if tuple(shapes.get(name, ())) != pair.shape:
                here = list(shapes.get(name, ())) or "missing"
                raise InputError(f"{lora.name} is for a {name} of {list(pair.shape)}; in this model it is {here}")


_MERGES: WeakKeyDictionary[nn.Module, list[object]] = WeakKeyDictionary()  # of each module, in their order


@dataclass(eq=False)
class Merged(AbstractContextManager["Merged"]):
    """LoRAs that are in a module's weights, and the weights as they were before. Also a context: undone at its end."""

    module: nn.Module
    loras: tuple[Lora, ...]
    originals: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _token: object = field(default_factory=object, repr=False)

    def __exit__(self, *exception: object) -> None:
        if self.active:
            self.undo()

    @property
    def active(self) -> bool:
        """Not undone yet."""
        return self._token in _MERGES.get(self.module, [])

    def undo(self) -> None:
        """Put back the weights that were there before this merge, bit for bit.

        Raises:
            ValueError: it is undone already, or the module has a later merge, which must be undone first.
        """
        if not self.active:
            raise ValueError("this merge is undone already")
        if _MERGES[self.module][-1] is not self._token:
            raise ValueError("a later merge of this module must be undone before this one")
        parameters = dict(self.module.named_parameters())
        for name, original in self.originals.items():
            parameter = parameters[name]
            parameter.data = original.to(parameter.device, parameter.dtype)  # the module may have been moved since
        self.originals.clear()
        _MERGES[self.module].pop()


def merge(module: nn.Module, loras: Sequence[Lora], keep_on: torch.device | str | None = "cpu") -> Merged:
    """Add LoRAs to the weights of a module: W <- fp32(W) + the sum of their deltas, rounded once to W's dtype.

    Parameters get new tensors; what they held is not written to (it may be mapped from a file). A module can be merged
    into again, and the merges are undone from the last to the first.

    Args:
        module: its parameters in float32, bfloat16 or float16, on any device but meta.
        keep_on: where the originals wait to be restored: None for where they are, which on a GPU costs their size.

    Raises:
        InputError: a LoRA changes a parameter that the module has not, or that has another shape.
        ValueError: a parameter is on the meta device, or of another dtype.
    """
    parameters = dict(module.named_parameters())
    _check_fit(loras, {name: parameter.shape for name, parameter in parameters.items()})
    changed = [name for name in parameters if any(name in lora.pairs for lora in loras)]
    merged = Merged(module, tuple(loras))
    _MERGES.setdefault(module, []).append(merged._token)
    try:
        for name in changed:
            parameter = parameters[name]
            total = _with_deltas(parameter.data, name, loras)
            merged.originals[name] = parameter.data if keep_on is None else parameter.data.to(keep_on)
            parameter.data = total
    except BaseException:
        merged.undo()
        raise
    return merged


def save_lora(path: str | PathLike[str], lora: Lora, layout: str = "peft") -> Path:
    """Write a LoRA, whole or not at all, so that PEFT or diffusers load it. Its scale becomes part of its alphas.

    Args:
        layout: "peft", a folder, over our names; "diffusers", one safetensors file, over those of diffusers.

    Raises:
        InputError: another layout; `path` cannot be written; a file of diffusers is not called .safetensors.
    """
    path = Path(path)
    if layout not in ("peft", "diffusers"):
        raise InputError(f"the layout of a LoRA is {layout!r}; allowed are peft, diffusers")
    if not lora.pairs:
        raise ValueError(f"{lora.name} has no adapters, so there is nothing to save")
    diffusers = layout == "diffusers"
    if diffusers and path.suffix != ".safetensors":
        raise InputError(f"cannot write {path}: a LoRA of diffusers is a file named .safetensors")
    rename, prefix = (diffusers_transformer_key, "transformer.") if diffusers else (str, "base_model.model.")
    modules = {rename(name).removesuffix(".weight"): pair for name, pair in lora.pairs.items()}
    options = _peft_options(modules, lora.scale)
    tensors = {
        f"{prefix}{module}.lora_{half}.weight": tensor.detach().to("cpu", copy=True).contiguous()
        for module, pair in modules.items()
        for half, tensor in (("A", pair.a), ("B", pair.b))
    }
    if diffusers:
        header = json.dumps({f"{prefix}{key}": value for key, value in options.items()}, indent=2, sort_keys=True)
        with atomic_file(path) as partial:
            partial.write_bytes(save(tensors, {"format": "pt", _METADATA: header}))
        return path
    with atomic_folder(path, replaces="adapter_config.json") as partial:
        (partial / "adapter_model.safetensors").write_bytes(save(tensors, {"format": "pt"}))
        (partial / "adapter_config.json").write_text(json.dumps(options, indent=2) + "\n", encoding="utf-8")
    return path


def _peft_options(modules: Mapping[str, LoraPair], scale: float) -> dict[str, Any]:
    """PEFT's options for these adapters: the most frequent rank and alpha, and a pattern for each that differs."""
    ranks = {module: pair.rank for module, pair in modules.items()}
    alphas = {module: scale * pair.factor * pair.rank for module, pair in modules.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(module)}": value for module, value in ranks.items() if value != rank},
        "alpha_pattern": {f"^{re.escape(module)}": value for module, value in alphas.items() if value != alpha},
        "target_modules": list(modules),
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
    }
