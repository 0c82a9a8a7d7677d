"""Specs: the control-spec files of Cosmos-Transfer2.5, read as they stand, into what a world model has to transfer.

Layout: one job an object (.json, .jsonl with one a line; ours: .yaml and lists of them too), with a block for each kind
of control. Paths are relative to the file. Specification of Transfer, section 3.2. Differences from the official code:
unknown keys are refused inside the blocks too (there they are ignored), `guidance` may be any number of at least 0,
`context_frame_index` may be 0, `sigma_max` may be a number, `blur` is another name of `vis`, and `video_path` may be
left out where every control is a file.
"""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from orrery.errors import InputError
from orrery.jsonfiles import (
    COUNT,
    IMAGE_SUFFIXES,
    Count,
    Draft,
    Guidance,
    Name,
    Seed,
    Text,
    absent,
    existing_files,
    no_bool,
    read_objects,
    says,
    settle_drafts,
    short,
    unknown,
)
from orrery.kinds import ALIASES, KINDS

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi")
ARRAY_SUFFIXES = (".npz", ".npy")
# Key of a block -> our kind, the published name first.
BLOCKS = {name: kind for kind in KINDS for name in (*(a for a, k in ALIASES.items() if k == kind), kind)}
# Both are listed in full where they are obeyed, above this floor: `control.presets` and `weights.SIZES`.
Strength = Literal["none", "very_low", "low", "medium", "high", "very_high"]
Resolution = Literal["256", "480", "480p", "512", "720", "720p", "1024", "1080"]
STRENGTHS, RESOLUTIONS = get_args(Strength), get_args(Resolution)
SEED = 2025  # as published, like the defaults below
HOLD_UNTIL = 25


@dataclass(frozen=True)
class ControlSpec:
    """One kind of control of a job.

    Args:
        kind: "edge", "blur" (published as "vis"), "depth" or "seg".
        path: the control video, an array of a simulator, or the folder of a simulated clip; None: it is made of the
            input.
        weight: 0 to 1.
        mask: where it acts, an existing file; None for everywhere, unless there is a mask_prompt.
        mask_prompt: what is looked for in the input to make the mask; None beside a `mask`, which wins as published.
        strength: of edge and blur, one of STRENGTHS; None for others. It has no meaning where there is a path.
        prompt: of seg, what is looked for; None: what the job's prompt names.
    """

    kind: str
    path: Path | None = None
    weight: float = 1.0
    mask: Path | None = None
    mask_prompt: str | None = None
    strength: str | None = None
    prompt: str | None = None


@dataclass(frozen=True)
class TransferSpec:
    """One video to transfer, checked as far as it can be without a model and without opening a video.

    What a file does not state is what the official code takes (seed 2025, 1 latent handed on, step threshold 25, weight
    1), but for guidance, steps, resolution, negative prompt and chunk: there None stands for the model's own, so that a
    small or a distilled model runs the same file.

    Args:
        name: unique among the specs read together; can be a file name.
        prompt: not empty.
        video: the input, an existing video or image; None where every control has a path.
        controls: at least one, in the published order edge, blur, depth, seg, at least one with a weight above 0.
        resolution: one of RESOLUTIONS; which shape of it depends on the input.
        frames: only the first so many; None for all; 1 is a picture.
        chunk: pixel frames drawn at once.
        overlap: latents that a chunk hands to the next: 1, or 0 where chunks are independent. (`num_conditional_frames`
            of 1 and of 2 pixel frames are both 1 latent.)
        image, image_frame: the reference for the look, an existing image, or the index of that frame of the input.
        sigma_max: ratio of noise to signal to begin the input with, above 0 to 200; None for pure noise. (The official
            code reads it and does nothing with it.)
        hold, hold_labels, hold_until: guided generation: the mask, an existing file; of an array, which labels count;
            the last step, counted from 0.
        keep_size: give the input's size back.
        show_input, show_controls: whether the result's video shows them beside it.
        source: where it was read, for messages: "jobs.jsonl line 3".
    """

    name: str
    prompt: str
    video: Path | None
    controls: tuple[ControlSpec, ...]
    negative_prompt: str | None = None
    seed: int = SEED
    guidance: float | None = None
    steps: int | None = None
    resolution: str | None = None
    frames: int | None = None
    chunk: int | None = None
    overlap: int = 1
    image: Path | None = None
    image_frame: int | None = None
    sigma_max: float | None = None
    hold: Path | None = None
    hold_labels: tuple[int, ...] | None = None
    hold_until: int = HOLD_UNTIL
    keep_size: bool = True
    show_input: bool = False
    show_controls: bool = False
    source: str = ""

    @property
    def acting(self) -> "tuple[ControlSpec, ...]":
        """Its controls with a weight above 0: no branch is needed for the others."""
        return tuple(control for control in self.controls if control.weight > 0)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of the controls that act."""
        return tuple(control.kind for control in self.acting)


def _as_text(value: Any) -> Any:
    """YAML takes an unquoted 720 for a number."""
    return str(value) if type(value) is int else value


class _Block(BaseModel):
    """The keys of a control's block."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    control_path: Annotated[Path | None, says("the path of a control video")] = None
    control_weight: Annotated[float, BeforeValidator(no_bool), Field(ge=0, le=1), says("a number from 0 to 1")] = 1.0
    mask_path: Annotated[Path | None, says("the path of a mask")] = None
    mask_prompt: Annotated[Text | None, says("text")] = None


_Strength = Annotated[Strength | None, says(", ".join(STRENGTHS))]


class _Edge(_Block):
    preset_edge_threshold: _Strength = "medium"


class _Blur(_Block):
    preset_blur_strength: _Strength = "medium"


class _Seg(_Block):
    control_prompt: Annotated[Text | None, says("text")] = None


_BLOCKS: dict[str, type[_Block]] = {"edge": _Edge, "blur": _Blur, "depth": _Block, "seg": _Seg}
_PRESET = {"edge": "preset_edge_threshold", "blur": "preset_blur_strength"}
_OWN = {"preset_edge_threshold": "edge", "preset_blur_strength": "vis", "control_prompt": "seg"}
_Object = Annotated[dict[str, Any] | None, says('an object, such as {} or {"control_weight": 0.5}')]
_Flag = Annotated[bool, says("true or false")]


class _Keys(BaseModel):
    """The keys of one job. A description says what is allowed; `name` has to be there."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Name = ""
    prompt: Annotated[Text | None, says("text")] = None
    prompt_path: Annotated[Path | None, says("the path of a text file")] = None
    video_path: Annotated[Path | None, says("the path of a video or an image")] = None
    edge: _Object = None
    vis: _Object = None
    blur: _Object = None
    depth: _Object = None
    seg: _Object = None
    negative_prompt: Annotated[Text | None, says("text")] = None
    seed: Seed = SEED
    guidance: Guidance = None
    num_steps: Annotated[Count | None, says(COUNT)] = None
    resolution: Annotated[Annotated[Resolution | None, BeforeValidator(_as_text)], says(", ".join(RESOLUTIONS))] = None
    max_frames: Annotated[Count | None, says(COUNT)] = None
    num_video_frames_per_chunk: Annotated[Count | None, says(COUNT)] = None
    num_conditional_frames: Annotated[int, BeforeValidator(no_bool), Field(ge=0, le=2), says("0, 1 or 2")] = 1
    image_context_path: Annotated[Path | None, says("the path of an image")] = None
    context_frame_index: Annotated[
        Annotated[int, BeforeValidator(no_bool), Field(ge=0)] | None, says("a whole number of at least 0")
    ] = None
    sigma_max: Annotated[
        Annotated[float, BeforeValidator(no_bool), Field(ge=0, le=200)] | None, says("a number from 0 to 200")
    ] = None
    guided_generation_mask: Annotated[Path | None, says("the path of a mask")] = None
    guided_generation_step_threshold: Annotated[
        int, BeforeValidator(no_bool), Field(ge=0), says("a whole number of at least 0")
    ] = HOLD_UNTIL
    guided_generation_foreground_labels: Annotated[
        list[Annotated[int, BeforeValidator(no_bool)]] | None, Field(min_length=1), says("a list of whole numbers")
    ] = None
    keep_input_resolution: _Flag = True
    show_control_condition: _Flag = False
    show_input: _Flag = False


KEYS = tuple(_Keys.model_fields)
OVERRIDES = tuple(key for key in KEYS if key != "name" and key not in BLOCKS)
# What an override of one of them replaces.
_INSTEAD = (("prompt", "prompt_path"), ("image_context_path", "context_frame_index"))
# Of the official command line; its documentation shows the first in a file, which its own reader refuses.
_SETUP = {
    "output_dir": "where results go is -o of `orrery transfer`",
    "model": "the model is --model of `orrery transfer`",
    "checkpoint_path": "the model is --model of `orrery transfer`",
    "keep_going": "that is --keep-going of `orrery transfer`",
} | dict.fromkeys(
    ("experiment", "config_file", "context_parallel_size", "disable_guardrails", "offload_guardrail_models", "profile",
     "benchmark", "compile_tokenizer", "enable_parallel_tokenizer", "parallel_tokenizer_grid"),
    "it belongs to the official command line",
)  # fmt: skip
_MEANT = {
    "input_path": "video_path", "input_video_path": "video_path", "num_output_frames": "max_frames",
    "num_frames": "max_frames", "steps": "num_steps", "chunk_size": "num_video_frames_per_chunk",
    "chunk_overlap": "num_conditional_frames", "mask_path": "guided_generation_mask", "segmentation": "seg",
    "image_path": "image_context_path", "keep_input_size": "keep_input_resolution",
}  # fmt: skip
_HINTS = {key: f"did you mean {meant}?" for key, meant in _MEANT.items()} | {
    key: f"it belongs into a control's block, such as edge.{key}" for key in ("control_weight", "control_path")
}
_BLOCK_MEANT = {
    "path": "control_path", "input_control": "control_path", "weight": "control_weight", "mask": "mask_path",
    "strength": "preset_edge_threshold or preset_blur_strength", "prompt": "control_prompt or mask_prompt",
}  # fmt: skip


def read_specs(
    paths: Sequence[str | os.PathLike[str]], overrides: Mapping[str, Any] = {}, called: Mapping[str, str] = {}
) -> list[TransferSpec]:
    """Read and check control-spec files; nothing is returned unless everything is right.

    Args:
        paths: .json, .jsonl, .yaml or .yml files.
        overrides: keys of a job (all but `name` and the controls' blocks) that win over the files; None: not given. A
            prompt replaces the prompt_path of a file, and the other way round; so do the two kinds of reference image.
            Their paths are relative to the working directory.
        called: what an override is called in messages, such as the option that gave it.

    Returns:
        The specs in the order of the files.

    Raises:
        InputError: a file that is missing or no JSON or YAML, an unknown key, an impossible value, a name used twice.
            All faults of the first faulty job are named, with what is allowed, and how many other jobs have faults.
    """
    overrides = _checked_overrides(overrides)
    drafts = [
        _Draft(tree, file.parent, source, overrides, _unknown_keys(tree), called)
        for file in existing_files(paths)
        for source, tree in read_objects(file)
    ]
    return settle_drafts(drafts, _Draft.spec)


def make_spec(tree: Mapping[str, Any], overrides: Mapping[str, Any], called: Mapping[str, str] = {}) -> TransferSpec:
    """A spec without a file: name and blocks from `tree`, all else from `overrides`; checked as in `read_specs`. Paths
    are relative to the working directory."""
    draft = _Draft(dict(tree), Path(), "", _checked_overrides(overrides), _unknown_keys(tree), called)
    return settle_drafts([draft], _Draft.spec)[0]


def _checked_overrides(overrides: Mapping[str, Any]) -> Mapping[str, Any]:
    overrides = {key: value for key, value in overrides.items() if value is not None}
    if faults := unknown(overrides, OVERRIDES, "override", hints=_HINTS):
        raise InputError("; ".join(faults))
    return overrides


def _unknown_keys(tree: Mapping[Any, Any]) -> list[str]:
    """Faults about the keys of a job, and about those inside its blocks."""
    faults = [f"{key} = {short(tree[key])} is no key of a job: {why}" for key, why in _SETUP.items() if key in tree]
    faults += unknown({key: value for key, value in tree.items() if key not in _SETUP}, KEYS, hints=_HINTS)
    for key, kind in BLOCKS.items():
        if isinstance(block := tree.get(key), dict):
            allowed = tuple(_BLOCKS[kind].model_fields)
            faults += unknown(block, allowed, prefix=f"{key}.", hints=_block_hints(key, allowed))
    return faults


def _block_hints(key: str, allowed: Collection[str]) -> dict[str, str]:
    hints = {own: f"it belongs to {home}" for own, home in _OWN.items()}
    hints |= {wrong: f"it belongs to the job, outside {key}" for wrong in OVERRIDES if wrong not in allowed}
    for wrong, meant in _BLOCK_MEANT.items():
        fitting = [f"{key}.{each}" for each in meant.split(" or ") if each in allowed]
        if fitting:
            hints[wrong] = f"did you mean {' or '.join(fitting)}?"
    return hints


class _Draft(Draft):
    """The keys of one spec."""

    def spec(self) -> TransferSpec:
        """The spec.

        Raises:
            InputError: everything that is wrong with it, in one line.
        """
        keys, wrong = self.checked(_Keys, ("name",), _INSTEAD)
        prompt = self.prompt(keys.prompt, keys.prompt_path, wrong)
        images, videos = IMAGE_SUFFIXES, VIDEO_SUFFIXES
        video = self._file("video_path", keys.video_path, videos + images)
        image = self._file("image_context_path", keys.image_context_path, images)
        hold = self._file("guided_generation_mask", keys.guided_generation_mask, videos + images + ARRAY_SUFFIXES)
        controls = self._controls(keys)
        self._check_controls(controls, wrong)
        if "video_path" not in wrong and keys.video_path is None:
            self._check_without_input(keys, controls)
        self._check_together(keys, controls, hold)
        self.refuse()
        return TransferSpec(
            name=keys.name,
            prompt=prompt,
            video=video,
            controls=tuple(controls.values()),
            negative_prompt=keys.negative_prompt,
            seed=keys.seed,
            guidance=keys.guidance,
            steps=keys.num_steps,
            resolution=keys.resolution,
            frames=keys.max_frames,
            chunk=keys.num_video_frames_per_chunk,
            overlap=min(keys.num_conditional_frames, 1),
            image=image,
            image_frame=keys.context_frame_index,
            sigma_max=keys.sigma_max or None,
            hold=hold,
            hold_labels=_tuple(keys.guided_generation_foreground_labels),
            hold_until=keys.guided_generation_step_threshold,
            keep_size=keys.keep_input_resolution,
            show_input=keys.show_input,
            show_controls=keys.show_control_condition,
            source=self.source or keys.name,
        )

    def _file(self, key: str, told: Path | None, suffixes: Sequence[str], folder: bool = False) -> Path | None:
        """The existing file that a key names; folder: it may be one."""
        if told is None:
            return None
        path = self.place(key, told)
        if folder and os.path.isdir(path):
            return path
        if path.suffix.lower() not in suffixes:
            self.fault(key, told, f"a file of {' '.join(suffixes)}")
        elif not os.path.isfile(path):
            self.fault(key, told, f"an existing file; {short(path)} is {absent(path)}")
        return path

    def _controls(self, keys: _Keys) -> dict[str, ControlSpec]:
        """The controls by key, in the published order."""
        found = {}
        for key, kind in BLOCKS.items():
            tree = getattr(keys, key)
            if tree is None:
                continue
            known = {name: value for name, value in tree.items() if name in _BLOCKS[kind].model_fields}
            block, _ = self.validated(_BLOCKS[kind], known, f"{key}.")
            masks = VIDEO_SUFFIXES + IMAGE_SUFFIXES + ARRAY_SUFFIXES
            path = self._file(f"{key}.control_path", block.control_path, masks, folder=True)
            mask = self._file(f"{key}.mask_path", block.mask_path, masks)
            for name in ("mask_prompt", "control_prompt"):
                text = getattr(block, name, None)
                if text is not None and not text.strip():
                    self.fault(f"{key}.{name}", text, "text that says something")
            found[key] = ControlSpec(
                kind=kind,
                path=path,
                weight=block.control_weight,
                mask=mask,
                mask_prompt=None if mask else block.mask_prompt,
                strength=getattr(block, _PRESET[kind]) or "medium" if kind in _PRESET else None,
                prompt=getattr(block, "control_prompt", None),
            )
        return found

    def _check_controls(self, controls: Mapping[str, ControlSpec], wrong: Collection[str]) -> None:
        """Controls that are right one by one and do not go together."""
        if "vis" in controls and "blur" in controls:
            self.faults.append("vis and blur both given; allowed: one of them, they are the same control")
        if not controls and not set(BLOCKS) & set(wrong):
            self.faults.append('no control (allowed: at least one of edge, vis, depth, seg, such as "edge": {})')
        if controls and not any(control.weight for control in controls.values()):
            self.faults.append(f"control_weight is 0 for {', '.join(controls)} (allowed: at least one above 0)")

    def _check_without_input(self, keys: _Keys, controls: Mapping[str, ControlSpec]) -> None:
        """What needs the input, where there is none."""
        needing = [key for key, control in controls.items() if control.path is None]
        needing += [f"{key}.mask_prompt" for key, control in controls.items() if control.mask_prompt]
        needing += [key for key in ("context_frame_index", "guided_generation_mask") if getattr(keys, key) is not None]
        needing += [key for key in ("sigma_max", "show_input") if getattr(keys, key)]
        if needing or not controls:
            why = f", which {', '.join(needing)} need{'s' * (len(needing) == 1)}" if needing else ""
            told = self.called.get("video_path", "key video_path")
            self.faults.append(
                f"missing {told}{why} (allowed: a video or an image; none where every control has a control_path)"
            )

    def _check_together(self, keys: _Keys, controls: Mapping[str, ControlSpec], hold: Path | None) -> None:
        """Other keys that are right one by one and do not go together."""
        image = next((key for key in _INSTEAD[1] if getattr(keys, key) is not None), None)
        if keys.image_context_path is not None and keys.context_frame_index is not None:
            self.faults.append(f"{' and '.join(map(self.label, _INSTEAD[1]))} both given; allowed: one of them")
        if image and any(control.kind == "blur" and control.weight for control in controls.values()):
            self.fault(image, getattr(keys, image), "no reference image with vis, which keeps the colours of the input")
        until = "guided_generation_step_threshold"
        if hold is None and until in self.overrides and not self.source:  # files may say it of some jobs
            self.fault(until, keys.guided_generation_step_threshold, "with a guided_generation_mask")
        labels = keys.guided_generation_foreground_labels
        if labels is not None and (hold is None or hold.suffix.lower() not in ARRAY_SUFFIXES):
            of = "none" if hold is None else short(hold)
            allowed = f"with a guided_generation_mask of {' '.join(ARRAY_SUFFIXES)}; it is {of}"
            self.fault("guided_generation_foreground_labels", labels, allowed)


def _tuple(labels: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if labels is None else tuple(labels)
