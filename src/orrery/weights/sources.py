"""Where a model is: a name, a folder, an official file, a diffusers directory or a hub repository, made into its config
and its parts. Weights are found or downloaded only when a part is asked for.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from orrery.errors import InputError, note, one_line
from orrery.nn.control import ControlConfig
from orrery.nn.dit import PRESETS as TRANSFORMERS
from orrery.nn.dit import DiT, DiTConfig
from orrery.nn.empty import shapes_only
from orrery.nn.text import PRESETS as TEXTS
from orrery.nn.text import TextConfig
from orrery.nn.vae import PRESETS as VAES
from orrery.nn.vae import VAEConfig
from orrery.weights import hub, pipeline_dir
from orrery.weights.branches import Asked, Controls, asked_controls, choose, own_kind
from orrery.weights.catalogue import (
    CATALOGUE,
    NATIVE,
    NEGATIVE_PROMPT,
    SIZES,
    HubFiles,
    ModelEntry,
    control_of_file,
    entry_of_file,
    find_entry,
)
from orrery.weights.components import SHARED, component, fetcher, shared_parts, shared_tokenizer
from orrery.weights.config import ActionConfig, ModelConfig, Sampling, read_config
from orrery.weights.layouts import diffusers_transformer_key
from orrery.weights.official import (
    ACTION_KEY,
    check_variant,
    counters,
    infer_actions,
    infer_control,
    infer_transformer,
    is_diffusers,
    official_weights,
    split_branch,
)
from orrery.weights.parts import BRANCH, DECODER, PARTS, ModelFiles, Part, file_identity, own_part
from orrery.weights.pipeline_dir import CONTROLNET, SIDECAR
from orrery.weights.tensors import read_tensors

_HUB = re.compile(r"^(?P<repo>[\w][\w.-]*/[\w][\w.-]*)(@(?P<revision>[\w./-]+))?$")
_SMALL = ("*.json",)  # in subfolders too


def find_model(
    name_or_path: str | PathLike[str],
    *,
    vae: str | PathLike[str] | None = None,
    text: str | PathLike[str] | None = None,
    like: str | None = None,
    conventions: str | None = None,
    controls: Controls | None = None,
    image: str | PathLike[str] | None = None,
) -> ModelFiles:
    """Find a model. A name of the catalogue wins over a folder of that name (write ./NAME for the folder).

    Args:
        name_or_path: a name of the catalogue; a model folder of ours; an official .pt; a diffusers directory; or
            OWNER/NAME or OWNER/NAME@REVISION of a hub repository that holds one of the latter two.
        vae, text: take this part from elsewhere: a file in Wan's layout, a diffusers or transformers folder, or a
            model folder.
        like: for an official .pt, the named model whose sampling and conventions it follows.
        conventions: "official" or "diffusers", instead of those that come with the source.
        controls: the kinds of control branches to have ("edge", "blur", "depth", "seg"; () for none), default all that
            the model has; or kind -> where a branch lies (a model folder, an official .pt, a folder of diffusers'
            CosmosControlNetModel; None: the model's own). They fit one base; another is refused when they are read.
        image: take the encoder of reference images from this folder of a SigLIP 2.

    Raises:
        InputError: none of these; an unsupported model; a config that cannot be; a control that the model lacks.
    """
    found = _find(str(name_or_path), vae, text, like, asked_controls(controls))
    config = found.config.with_conventions(conventions)
    parts = dict(found.parts)
    if config.transformer.image_context:
        parts["image"] = component("siglip2") if image is None else _image_part(Path(image))
    elif image is not None:
        raise InputError(f"image={str(image)!r} is for a model with image context; {found.name} has none")
    return dataclasses.replace(found, config=config, parts=parts)


def _find(given: str, vae: Any, text: Any, like: str | None, asked: Asked | None) -> ModelFiles:
    if not given:
        raise InputError(f"the model is ''; allowed are {', '.join(CATALOGUE)}, or a model's folder or file")
    path = Path(given)
    if given in CATALOGUE or not (path.exists() or (hub_match := _HUB.match(given))):
        entry = find_entry(given)
        if like is not None:
            raise InputError(f"like={like!r} is for an official file; {given!r} is a name already")
        return _overridden(_named(entry, asked), vae, text)
    if path.is_file():
        return _official_file(path, vae, text, like, asked)
    if path.is_dir():
        return choose(_folder(path, vae, text, asked), asked)
    assert hub_match is not None
    found = _repository(hub_match["repo"], hub_match["revision"], asked)
    return choose(_overridden(found, vae, text), asked)


def _named(entry: ModelEntry, asked: Asked | None) -> ModelFiles:
    if entry.folder is not None:
        if not (entry.folder / "config.json").is_file():
            raise InputError(f"the weights of model {entry.name!r} are missing: {entry.folder} holds no config.json")
        return choose(dataclasses.replace(_own_folder(entry.folder), name=entry.name), asked)
    assert entry.weights is not None
    config = _published_config(entry, controls=dict.fromkeys(entry.controls, ControlConfig()))
    parts = shared_parts(config)
    for kind, published in entry.controls.items():
        part = _published_part(published)
        parts[BRANCH + kind] = dataclasses.replace(part, base=part)
    if not entry.controls:
        parts["transformer"] = _published_part(entry.weights)
    found = choose(ModelFiles(entry.name, config, parts, shared_tokenizer(config)), asked, bool(entry.controls))
    training = {"weights": found.parts["transformer"].identity}
    return dataclasses.replace(found, config=dataclasses.replace(found.config, training=training))


def _published_part(files: HubFiles) -> Part:
    assert files.file is not None
    return Part("official", fetcher(files.repo, files.file, files.revision), str(files))


def _published_config(entry: ModelEntry, **changes: Any) -> ModelConfig:
    negative = None if entry.sampling.get("guidance") == 0 else NEGATIVE_PROMPT
    values: dict[str, Any] = dict(
        transformer=dataclasses.replace(TRANSFORMERS[entry.network], **entry.network_options),
        vae=VAES["wan2.1"],
        text=TEXTS["reason1-7b"],
        sampling=Sampling(**{"negative_prompt": negative, **entry.sampling}),
        trained_sizes=tuple(SIZES["720"].values()),
        any_length=True,
        text_only=entry.text_only,
        vae_dtype="bfloat16",
        shared=SHARED,
        actions=ActionConfig(**entry.actions) if entry.actions else None,
        training={"weights": str(entry.weights)},
    )
    return ModelConfig(**NATIVE | values | dict(entry.native) | changes)


def _folder(path: Path, vae: Any, text: Any, asked: Asked | None) -> ModelFiles:
    if (path / pipeline_dir.INDEX).is_file():
        return _pipeline(path, vae, text, asked, lambda sub: path / sub, str(path.resolve()))
    if (path / "config.json").is_file():
        return _overridden(_own_folder(path), vae, text)
    raise InputError(f"{path} is not a model: it holds no config.json and no {pipeline_dir.INDEX}")


def _own_folder(folder: Path) -> ModelFiles:
    config = read_config(folder)
    parts = shared_parts(config)
    for name in PARTS:
        if name not in parts:
            parts[name] = own_part(folder, name)
    if config.own_decoder:
        over, shared = folder / DECODER, parts["vae"]
        identity = f"{shared.identity}; {file_identity(over)}"
        parts["vae"] = dataclasses.replace(shared, over=over, identity=identity)
    parts |= {BRANCH + kind: own_part(folder, BRANCH + kind) for kind in config.controls}
    tokenizer = shared_tokenizer(config) if "text" in config.shared else lambda: folder / "tokenizer.json"
    return ModelFiles(str(folder), config, parts, tokenizer, folder)


def _pipeline(
    folder: Path, vae: Any, text: Any, asked: Asked | None, part_at: Callable[[str], Path], where: str
) -> ModelFiles:
    """A diffusers directory; part_at: the folder of a part, downloaded if need be."""
    text_folder = Path(text) if text is not None and not (Path(text) / "transformer.safetensors").is_file() else None
    if (folder / SIDECAR).is_file():
        try:
            config = ModelConfig.from_json(pipeline_dir.read_json(folder / SIDECAR))
        except (ValueError, TypeError) as error:
            raise InputError(f"{folder / SIDECAR}: {one_line(error)}") from error
    else:
        config = pipeline_dir.read_pipeline(folder, text_folder)
    parts = shared_parts(config)
    for name, sub in pipeline_dir.FOLDERS.items():
        if name not in parts:
            layout = "qwen" if name == "text" else "diffusers"
            parts[name] = Part(layout, lambda sub=sub: part_at(sub), f"{where}/{sub}")  # type: ignore[misc]
    if (folder / CONTROLNET / "config.json").is_file():
        config, own = _with_controlnet(config, folder, asked, part_at, where)
        parts |= own
    tokenizer = shared_tokenizer(config) if "text" in config.shared else lambda: _tokenizer_in(part_at("tokenizer"))
    return _overridden(ModelFiles(where, config, parts, tokenizer), vae, text)


def _with_controlnet(
    config: ModelConfig, folder: Path, asked: Asked | None, part_at: Callable[[str], Path], where: str
) -> tuple[ModelConfig, dict[str, Part]]:
    """With the control network of a diffusers directory, if it is wanted."""
    known, every = pipeline_dir.known_control(folder)
    kind = own_kind(asked, known, where)
    if kind is None:
        return dataclasses.replace(config, controls={}), {}
    control, _ = pipeline_dir.control_config(folder / CONTROLNET / "config.json", config.transformer, every)
    identity = f"{where}/{CONTROLNET}"
    copies = Part("copies", lambda: part_at(CONTROLNET), f"{identity}, copies")
    branch = Part("diffusers", lambda: part_at(CONTROLNET), identity, copies)
    try:
        return dataclasses.replace(config, controls={kind: control}), {BRANCH + kind: branch}
    except ValueError as error:
        raise InputError(f"{where}: {one_line(error)}") from error


def _tokenizer_in(folder: Path) -> Path:
    return folder / "tokenizer.json" if (folder / "tokenizer.json").is_file() else folder


def _repository(repo: str, revision: str | None, asked: Asked | None) -> ModelFiles:
    names = [e.name for e in CATALOGUE.values() if e.weights and e.weights.repo == repo and not e.unsupported]
    if names and revision is None:
        raise InputError(f"{repo} holds several models; say which: {', '.join(names)}, or {repo}@REVISION")
    folder = hub.fetch_folder(repo, revision, _SMALL)
    where = f"{repo}@{revision or 'main'}"
    if (folder / pipeline_dir.INDEX).is_file():
        fetch = lambda sub: hub.fetch_folder(repo, revision, (f"{sub}/*",)) / sub  # noqa: E731
        return _pipeline(folder, None, None, asked, fetch, where)
    if (folder / "config.json").is_file():
        own = _own_folder(folder)
        parts = {
            name: Part("orrery", fetcher(repo, f"{name}.safetensors", revision), f"{where}/{name}.safetensors")
            if part.layout == "orrery" and name not in own.config.shared
            else part
            for name, part in own.parts.items()
        }
        return dataclasses.replace(own, name=where, parts=parts, folder=None)
    raise InputError(f"{where} holds no config.json and no {pipeline_dir.INDEX}: it is no model that can be loaded")


def _official_file(path: Path, vae: Any, text: Any, like: str | None, asked: Asked | None) -> ModelFiles:
    """A transformer in one file, official (with a control branch or none) or of diffusers; VAE and text encoder are the
    published ones."""
    tensors = read_tensors(path)
    layout = "diffusers" if is_diffusers(tensors) else "official"
    branch: dict[str, tuple[int, ...]] = {}
    if layout == "diffusers":
        named = {diffusers_transformer_key(name): name for name in transformer_names(tensors)}
        shapes = {named[key]: tuple(value.shape) for key, value in tensors.items() if key in named}
    else:
        whole = {key: tuple(value.shape) for key, value in official_weights(tensors, str(path))[0].items()}
        check_variant(whole, str(path))
        shapes, branch = split_branch(whole)
    kind = own_kind(asked, control_of_file(path), str(path)) if branch else None
    stated = find_entry(like) if like else entry_of_file(path)
    entry = stated or _entry_like(shapes, bool(branch), path.name)
    network = dataclasses.replace(TRANSFORMERS[entry.network], **entry.network_options)
    transformer = infer_transformer(shapes, network, str(path))
    changes: dict[str, Any] = {"transformer": transformer, "training": {"weights": str(path)}}
    changes["vae"] = VAES["wan2.1"] if vae is None else _vae_part(Path(vae))[0]
    if kind is not None:
        changes["controls"] = {kind: infer_control(branch, transformer, str(path))}
    frames, factor = (NATIVE | dict(entry.native))["frames"], changes["vae"].temporal_factor
    changes["actions"] = infer_actions(
        transformer.actions, factor, frames, entry.actions, stated is not None, str(path)
    )
    if text is not None:
        changes["text"] = _text_part(Path(text))[0]
    if layout == "official" and (counts := counters(tensors)):
        changes["training"] |= {"official": counts}
    try:
        config = _published_config(entry, **changes)
    except ValueError as error:
        raise InputError(f"{path}: {one_line(error)}") from error
    part = Part(layout, lambda: path, file_identity(path))
    parts = {"transformer": part} | shared_parts(config)
    if kind is not None:
        parts[BRANCH + kind] = dataclasses.replace(part, base=part)
    found = ModelFiles(str(path), config, parts, shared_tokenizer(config))
    return choose(_overridden(found, vae, text), asked, published=bool(branch))


def _entry_like(shapes: Mapping[str, tuple[int, ...]], branch: bool, name: str) -> ModelEntry:
    """The published model of the size and the kind of an official file that does not say which it comes from."""
    width = shapes.get("x_embedder.proj.1.weight", (0,))[0]
    base = "predict2.5-14b" if width > 4000 else "predict2.5-2b"
    entry = CATALOGUE["transfer2.5-2b" if branch else "predict2.5-2b-action" if ACTION_KEY in shapes else base]
    what = "kind" if branch or entry.actions else "size"
    note(f"{name}: sampled like {entry.name}, the published model of its {what} (choose another with like)")
    return entry


def _overridden(files: ModelFiles, vae: Any, text: Any) -> ModelFiles:
    """The same model with its VAE or its text encoder from elsewhere."""
    if vae is None and text is None:
        return files
    config, parts, tokenizer = files.config, dict(files.parts), files.tokenizer
    given = {"vae": vae, "text": text}
    changes: dict[str, Any] = {"shared": {name: kept for name, kept in config.shared.items() if given[name] is None}}
    if vae is not None:
        changes["vae"], parts["vae"] = _vae_part(Path(vae))
    if text is not None:
        changes["text"], parts["text"], tokenizer = _text_part(Path(text))
    try:
        config = dataclasses.replace(config, **changes)
    except ValueError as error:
        raise InputError(f"{files.name}: {one_line(error)}") from error
    return dataclasses.replace(files, config=config, parts=parts, tokenizer=tokenizer)


def _vae_part(path: Path) -> tuple[VAEConfig, Part]:
    """A VAE by itself: a file in Wan 2.1's layout, a diffusers folder, or the one of a model folder."""
    if path.is_file():
        return VAES["wan2.1"], Part("wan", lambda: path, file_identity(path))
    if (path / "vae.safetensors").is_file():
        return read_config(path).vae, own_part(path, "vae")
    if (path / pipeline_dir.INDEX).is_file():
        path = path / "vae"
    if (path / "config.json").is_file():
        return pipeline_dir.vae_config(path / "config.json"), Part("diffusers", lambda: path, file_identity(path))
    raise InputError(
        f"{path} holds no VAE: allowed are Wan2.1_VAE.pth, a folder that diffusers saved, a model's folder"
    )


def _text_part(path: Path) -> tuple[TextConfig, Part, Callable[[], Path]]:
    """A text encoder by itself: a Qwen2.5-VL folder of transformers, with tokenizer, or the one of a model folder."""
    if (path / "text.safetensors").is_file():
        return read_config(path).text, own_part(path, "text"), lambda: path / "tokenizer.json"
    tokenizer = path
    if (path / pipeline_dir.INDEX).is_file():
        path, tokenizer = path / "text_encoder", path / "tokenizer"
    if not (path / "config.json").is_file():
        raise InputError(
            f"{path} holds no text encoder: allowed are a Qwen2.5-VL folder with its tokenizer, a model's folder"
        )
    part = Part("qwen", lambda: path, file_identity(path))
    return pipeline_dir.text_config(path, tokenizer), part, lambda: _tokenizer_in(tokenizer)


def _image_part(path: Path) -> Part:
    """An encoder of reference images by itself: a SigLIP 2 folder of transformers, whole or its vision tower."""
    if not (path / "config.json").is_file():
        raise InputError(f"{path} holds no image encoder: allowed is a SigLIP 2 folder that transformers saved")
    return Part("siglip2", lambda: path, file_identity(path))


def transformer_names(keys: Iterable[str]) -> list[str]:
    """Our names of the parameters of a transformer as deep as the one with these keys, in any layout."""
    depths = [int(match[1]) for key in keys if (match := re.search(r"blocks\.(\d+)\.", key))]
    return list(transformer_shapes(DiTConfig(width=24, heads=2, depth=1 + max(depths, default=0))))


def transformer_shapes(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters of a transformer."""
    with shapes_only():
        return {name: tuple(value.shape) for name, value in DiT(config).state_dict().items()}
