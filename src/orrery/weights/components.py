"""Parts that a model shares: components of the published models, or of a model that comes with the package.

`"shared": {"vae": "mini", "text": "mini"}` in a config.json means the VAE, the text encoder and the tokenizer of the
embedded model `mini`; `"wan2.1"` and `"reason1-7b"` are what the published models share. The config states the networks
all the same, so that it can be read by itself; those of an embedded model are compared with its own.
"""

from collections.abc import Callable
from pathlib import Path

from orrery.errors import InputError
from orrery.weights import hub
from orrery.weights.catalogue import CATALOGUE, COMPONENTS
from orrery.weights.config import ModelConfig, read_config
from orrery.weights.parts import Part, own_part

SHARED = {"vae": "wan2.1", "text": "reason1-7b"}  # by the published models


def fetcher(repo: str, file: str, revision: str | None) -> Callable[[], Path]:
    """Finds a file of a hub, downloaded if need be."""
    return lambda: hub.fetch_file(repo, file, revision)


def component(name: str) -> Part:
    """A component of the published models."""
    files = COMPONENTS[name]
    if files.file is not None:
        return Part("wan", fetcher(files.repo, files.file, files.revision), str(files))
    layout = "siglip2" if name == "siglip2" else "qwen"
    return Part(layout, lambda: hub.fetch_folder(files.repo, files.revision, files.patterns), str(files))


def shared_parts(config: ModelConfig) -> dict[str, Part]:
    """The parts that a config says lie elsewhere.

    Raises:
        InputError: a part that cannot be shared, an unknown name, an embedded model whose folder or part is missing or
            is another network than the config states.
    """
    for part in config.shared:
        if part not in SHARED:
            raise InputError(f"config.json shares the part {part!r}; allowed are {', '.join(SHARED)}")
    return {part: _shared_part(config, part, name) for part, name in config.shared.items()}


def shared_tokenizer(config: ModelConfig) -> Callable[[], Path]:
    """Finds the tokenizer of a shared text encoder."""
    name = config.shared["text"]
    if (folder := _embedded(name)) is not None:
        return lambda: folder / "tokenizer.json"
    files = COMPONENTS[name]
    return lambda: hub.fetch_folder(files.repo, files.revision, ("*.json",)) / "tokenizer.json"


def _embedded(name: str) -> Path | None:
    """The folder of an embedded model of that name."""
    entry = CATALOGUE.get(name)
    return None if entry is None else entry.folder


def _shared_part(config: ModelConfig, part: str, name: str) -> Part:
    folder = _embedded(name)
    if folder is None:
        if name != SHARED[part]:
            embedded = [entry.name for entry in CATALOGUE.values() if entry.folder is not None]
            allowed = ", ".join([SHARED[part], *embedded])
            raise InputError(f"config.json shares the component {name!r} as its {part}; allowed are {allowed}")
        return component(name)
    if not (folder / f"{part}.safetensors").is_file():
        raise InputError(f"config.json shares the {part} of {name!r}, but {folder} holds no {part}.safetensors")
    if getattr(read_config(folder), part) != getattr(config, part):
        raise InputError(f"config.json shares the {part} of {name!r}, but states another network than {name}'s")
    return own_part(folder, part)
