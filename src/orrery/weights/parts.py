"""What a model was found to be: its config, and where the weights of each of its networks are."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from orrery.weights.config import ModelConfig

PARTS = ("transformer", "vae", "text")  # that every model has; some have an "image" encoder and control branches too
DECODER = "decoder.safetensors"  # of a model whose pictures a shared VAE's decoder was tuned to
BRANCH = "control-"  # and the kind: the name of a branch among the parts, and of its file


@dataclass(frozen=True)
class Part:
    """The weights of one network.

    layout: "orrery", "official", "diffusers", "wan", "qwen", "siglip2", or "copies" (the base's weights that a control
    network of diffusers repeats): how their keys become ours. find: the file or the folder they are in, downloaded if
    need be. identity: says which weights they are without reading them. base: of a control branch, the base that its
    file brings along, to be compared with the transformer. drops_image: keys of image context are passed over.
    over: a file of weights that stand in place of those of the same names.
    """

    layout: str
    find: Callable[[], Path]
    identity: str
    base: "Part | None" = None
    drops_image: bool = False
    over: Path | None = None


@dataclass(frozen=True)
class ModelFiles:
    """A model that was found: config and parts. parts: PARTS; "control-KIND" for each of `config.controls`; "image"
    where the transformer has image context. tokenizer: finds the tokenizer.json, or the folder of a tokenizer of
    transformers. folder: of a model of ours."""

    name: str
    config: ModelConfig
    parts: Mapping[str, Part]
    tokenizer: Callable[[], Path]
    folder: Path | None = None


def own_part(folder: Path, name: str, base: Part | None = None) -> Part:
    """A part of a model folder of ours."""
    path = folder / f"{name}.safetensors"
    return Part("orrery", lambda: path, file_identity(path), base)


def file_identity(path: Path) -> str:
    """Says which file this is without reading it: place, size and time of change."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    stats = [(file, file.stat()) for file in files if file.is_file()]
    return "; ".join(f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}" for file, stat in stats) or str(path)
