"""Which control branches a model is found with: all of its own, some of them, or others from elsewhere.

A branch fits the one base beside which it was trained. Every published file holds both, so the base is taken from one
of them, and what the others hold is compared with it when they are read (`store.part_weights`). With several branches,
or one that has none, the image context of the base is left out, as the published multi-control does: each published
branch was trained with image projections of its own. Specification of Transfer, sections 1.4 to 1.6.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from orrery.errors import InputError, note
from orrery.kinds import KINDS, control_kind
from orrery.nn.control import ControlConfig
from orrery.nn.dit import DiTConfig
from orrery.weights import pipeline_dir
from orrery.weights.catalogue import control_of_file
from orrery.weights.config import read_config
from orrery.weights.layouts import IMAGE_KEYS
from orrery.weights.official import infer_control, official_weights, split_branch
from orrery.weights.parts import BRANCH, ModelFiles, Part, file_identity, own_part
from orrery.weights.tensors import read_tensors

Asked = Mapping[str, Path | None]  # kind -> a branch elsewhere; None: the model's own
Controls = Sequence[str] | Mapping[str, str | PathLike[str] | None]
_OWN_FILE = re.compile(rf"{BRANCH}(\w+)\.safetensors")


@dataclass(frozen=True)
class Branch:
    """A branch that was found by itself. image: whether it has image context."""

    config: ControlConfig
    part: Part
    image: bool


def asked_controls(controls: Controls | None) -> Asked | None:
    """`controls` of `find_model` by kind, in the order given; None: whatever the model has.

    Raises:
        InputError: an unknown kind; one that is named twice.
    """
    if controls is None:
        return None
    if isinstance(controls, str):
        controls = (controls,)
    pairs = controls.items() if isinstance(controls, Mapping) else [(name, None) for name in controls]
    asked: dict[str, Path | None] = {}
    for name, path in pairs:
        kind = control_kind(name)
        if kind in asked:
            raise InputError(f"the control {kind} is asked for twice: {', '.join(controls)}")
        asked[kind] = None if path is None else Path(path)
    return asked


def own_kind(asked: Asked | None, known: str | None, where: str) -> str | None:
    """Of which kind the one branch of a source is that cannot say it itself; None: it is not wanted.

    known: what its name says.

    Raises:
        InputError: nobody says it; two kinds are asked for; another kind than the known one.
    """
    if asked is None:
        if known is None:
            raise InputError(
                f"{where} holds a control branch and does not say of what: name its kind with controls=('edge',), or "
                f"--control edge on the command line; allowed are {', '.join(KINDS)}"
            )
        return known
    own = [kind for kind, path in asked.items() if path is None]
    if len(own) > 1:
        raise InputError(f"{where} holds one control branch, asked for are {', '.join(own)}: say where the others are")
    if own and known not in (None, own[0]):
        raise InputError(f"{where} is the control branch of {known}, asked for is {own[0]}")
    return own[0] if own else None


def choose(files: ModelFiles, asked: Asked | None, published: bool = False) -> ModelFiles:
    """The same model with exactly the branches asked for.

    Args:
        files: the model with all branches of its own.
            Where it has no transformer, the base that the first branch's file holds becomes it: the model's own branch
            before one from elsewhere.
        published: its image context belongs to one branch alone, as in the published files.

    Raises:
        InputError: a kind that it lacks; a branch elsewhere that is none.
    """
    own = files.config.controls
    if asked is None:
        asked = dict.fromkeys(own)
    parts = {name: part for name, part in files.parts.items() if not name.startswith(BRANCH)}
    found: dict[str, Branch] = {}
    for kind, path in asked.items():
        if path is not None:
            found[kind] = branch_at(kind, path, files.config.transformer)
        elif kind in own:
            image = bool(files.config.transformer.image_context)
            found[kind] = Branch(own[kind], files.parts[BRANCH + kind], image)
        else:
            raise InputError(f"{files.name} has no control {kind}; it has {', '.join(own) or 'none'}")
    if "transformer" not in parts:
        own_first = sorted(found, key=lambda kind: asked[kind] is not None)
        branches = [found[kind].part for kind in own_first] + [files.parts[BRANCH + kind] for kind in own]
        parts["transformer"] = next(each.base for each in branches if each.base and each.base.layout == "official")
    parts |= {BRANCH + kind: branch.part for kind, branch in found.items()}
    transformer = files.config.transformer
    foreign = published or any(path is not None for path in asked.values())
    if why := _no_image(found, bool(transformer.image_context)) if foreign else "":
        note(f"{files.name}: without image context: {why}")
        transformer = dataclasses.replace(transformer, image_context=0)
        for name in ("transformer", *(BRANCH + kind for kind, branch in found.items() if branch.image)):
            parts[name] = dataclasses.replace(parts[name], drops_image=True)
    try:
        controls = {kind: branch.config for kind, branch in found.items()}
        config = dataclasses.replace(files.config, transformer=transformer, controls=controls)
    except ValueError as error:
        raise InputError(f"{files.name}: {error}") from error
    return dataclasses.replace(files, config=config, parts=parts)


def _no_image(found: Mapping[str, Branch], base: bool) -> str:
    """Why image context has to be left out, or "": because it can stay, or nothing has any."""
    images = [branch.image for branch in found.values()]
    if not base and not any(images):
        return ""
    if len(images) > 1:
        return "it belongs to one branch alone, and several are asked for"
    if not images:
        return "it belongs to a control branch, and none is asked for"
    if not base:
        return "the base has none"
    return "" if images[0] else f"the branch {next(iter(found))} has none"


def branch_at(kind: str, path: Path, base: DiTConfig) -> Branch:
    """A branch by itself, or one of another model, for a base of this config.

    Args:
        path: a model folder of ours, or the control-KIND.safetensors in it; an official .pt; a folder of diffusers'
            CosmosControlNetModel, or of a pipeline with one.

    Raises:
        InputError: none of these; a branch of another kind.
    """
    match = _OWN_FILE.fullmatch(path.name)
    if match and path.is_file() and (path.parent / "config.json").is_file():
        if match[1] != kind:
            raise InputError(f"{path} is the control branch of {match[1]}, asked for is {kind}")
        return _in_own_folder(kind, path.parent)
    if path.is_dir():
        if (path / pipeline_dir.INDEX).is_file():
            return _in_pipeline(kind, path, base)
        if (path / "config.json").is_file():
            given = pipeline_dir.read_json(path / "config.json")
            return _of_diffusers(path, base) if "_class_name" in given else _in_own_folder(kind, path)
    elif path.is_file():
        return _in_official(kind, path, base)
    raise InputError(
        f"{path} holds no control branch: allowed are a model folder or its {BRANCH}{kind}.safetensors, an official "
        ".pt of Cosmos-Transfer2.5, a folder of diffusers' CosmosControlNetModel"
    )


def _in_own_folder(kind: str, folder: Path) -> Branch:
    config = read_config(folder)
    if kind not in config.controls:
        raise InputError(f"{folder} has no control {kind}; it has {', '.join(config.controls) or 'none'}")
    beside = own_part(folder, "transformer") if (folder / "transformer.safetensors").is_file() else None
    return Branch(
        config.controls[kind], own_part(folder, BRANCH + kind, beside), bool(config.transformer.image_context)
    )


def _in_pipeline(kind: str, folder: Path, base: DiTConfig) -> Branch:
    known, every = pipeline_dir.known_control(folder)
    if known not in (None, kind):
        raise InputError(f"{folder} is the control branch of {known}, asked for is {kind}")
    return _of_diffusers(folder / pipeline_dir.CONTROLNET, base, every)


def _of_diffusers(folder: Path, base: DiTConfig, every: int | None = None) -> Branch:
    config, image = pipeline_dir.control_config(folder / "config.json", base, every)
    identity = file_identity(folder)
    copies = Part("copies", lambda: folder, f"{identity}, copies")
    return Branch(config, Part("diffusers", lambda: folder, identity, copies), image)


def _in_official(kind: str, path: Path, base: DiTConfig) -> Branch:
    known = control_of_file(path)
    if known not in (None, kind):
        raise InputError(f"{path} is the control branch of {known}, asked for is {kind}")
    rest, branch = split_branch(official_weights(read_tensors(path), str(path))[0])
    config = infer_control({key: tuple(value.shape) for key, value in branch.items()}, base, str(path))
    identity = file_identity(path)
    beside = Part("official", lambda: path, identity) if "x_embedder.proj.1.weight" in rest else None
    image = any(IMAGE_KEYS.search(key) for key in branch)
    return Branch(config, Part("official", lambda: path, identity, beside), image)
