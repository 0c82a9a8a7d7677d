"""Segmentation by words: Grounding DINO finds boxes, SAM 2 turns them into masks and follows them through the clip.

Thresholds and the order of painting are the published ones (specification of Transfer, section 2). What is better
here: nothing found is an error that says so; with `every`, things that come into view later are found too; frames go in
one at a time and the tracker's memory of frames long past is dropped, so that neither a long clip nor many objects fill
the memory. The pictures are prepared by hand for SAM 2, whose processors need torchvision.
"""

from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from orrery.control.models import (
    Progress,
    SegmentationModel,
    cannot,
    identity,
    import_transformers,
    load_part,
    load_processor,
    pick_device,
)
from orrery.errors import InputError, note
from orrery.video import Video

DETECTOR = "IDEA-Research/grounding-dino-base"
TRACKER = "facebook/sam2-hiera-large"
BOX, TEXT = 0.15, 0.25  # scores from which a box counts, and a word belongs to it
FALLBACK = 0.1, 0.1  # tried when nothing was found
MOST = 100  # objects
WORDS = 128  # of a prompt; the rest is not looked at, as published
KNOWN = 0.5  # overlap of a box with a followed object's from which it is that object
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of colours in 0..1, as SAM 2 was trained
INSTEAD = "give a seg control (a video, or a simulator's segmentation.npz), or another segmentation model"


@dataclass(frozen=True)
class Detections:
    """boxes [n, 4] float32 (left, top, right, bottom) pixels; scores [n] float32; phrases: what each was called."""

    boxes: np.ndarray
    scores: np.ndarray
    phrases: tuple[str, ...]


@dataclass(frozen=True)
class Segments:
    """ids [T, H, W] uint8, 0 none; object i is called phrases[i - 1]."""

    ids: np.ndarray
    phrases: tuple[str, ...]


class GroundingDino:
    """Boxes of what a text names, in one picture.

    Args:
        source: a hub id or a folder. device: None is a GPU if there is one.
    """

    def __init__(self, source: str | PathLike[str] = DETECTOR, device: str | None = None) -> None:
        self.source = str(source)
        self.device = pick_device(device)
        self._parts: tuple[Any, Any, Any] | None = None

    def _loaded(self) -> tuple[Any, Any, Any]:
        if self._parts is None:
            transformers = import_transformers()
            network = load_part(transformers.GroundingDinoForObjectDetection, self.source, "detector", INSTEAD)
            try:
                tokenizer = transformers.AutoTokenizer.from_pretrained(self.source)
            except (OSError, ValueError, KeyError) as error:
                raise InputError(cannot("tokenizer", self.source, error, INSTEAD)) from error
            self._parts = network.to(self.device), load_processor(self.source, INSTEAD), tokenizer
        return self._parts

    @torch.inference_mode()
    def __call__(self, frame: np.ndarray, prompt: str, box: float = BOX, text: float = TEXT) -> Detections:
        """What of `prompt` is in frame [H, W, 3] uint8, best first.

        Args:
            prompt: phrases with a full stop after each, or a sentence. box, text: least scores.
        """
        network, processor, tokenizer = self._loaded()
        pictures = processor(images=frame, return_tensors="pt", input_data_format="channels_last")
        length = network.config.max_text_len
        words = tokenizer(as_query(prompt), return_tensors="pt", truncation=True, max_length=length)
        found = network(**{name: x.to(self.device) for name, x in {**pictures, **words}.items()})
        scores = found.logits[0].float().sigmoid().cpu()  # [queries, tokens]
        best = scores.max(-1).values
        order = torch.argsort(best, descending=True, stable=True)
        order = order[best[order] > box]
        middle, extent = found.pred_boxes[0].float().cpu()[order].chunk(2, dim=-1)
        height, width = frame.shape[:2]
        corners = torch.cat([middle - extent / 2, middle + extent / 2], dim=-1).clamp(0, 1)
        boxes = corners * torch.tensor([width, height, width, height], dtype=torch.float32)
        inner = words["input_ids"][0, 1:-1]  # without the marks of beginning and end
        chosen = scores[order, 1 : 1 + len(inner)] > text
        phrases = tuple(tokenizer.decode(inner[row]).strip(" .") for row in chosen)
        return Detections(boxes.numpy(), best[order].numpy(), phrases)


def as_query(prompt: str) -> str:
    """A prompt as the detector was trained on: lower case, a full stop at the end; its first `WORDS` words."""
    return " ".join(prompt.lower().split()[:WORDS]).rstrip(" .,;") + "."


class GroundedSam2:
    """Masks of what a text names, through a clip. A `SegmentationModel`.

    Args:
        detector, tracker: hub ids or folders. device: None is a GPU if there is one.
        every: look for new objects in every so many-th frame; None in the first only, as published.
        most: objects at most, 1 to 255; the surest are kept.
    """

    def __init__(
        self,
        detector: str | PathLike[str] = DETECTOR,
        tracker: str | PathLike[str] = TRACKER,
        device: str | None = None,
        every: int | None = None,
        most: int = MOST,
    ) -> None:
        if every is not None and every < 1:
            raise InputError(f"every is {every}; allowed is at least 1, or None to look in the first frame only")
        if not 1 <= most <= 255:
            raise InputError(f"most is {most}; allowed is 1 to 255")
        self.tracker, self.every, self.most = str(tracker), every, most
        self.device = pick_device(device)
        self.detect = GroundingDino(detector, device)
        self._network: Any = None

    @property
    def name(self) -> str:
        """Tells this model and its settings from others."""
        return f"{identity(self.detect.source)} {identity(self.tracker)} every {self.every} most {self.most}"

    def release(self) -> None:
        """Gives the memory back; the next call loads again."""
        self._network = self.detect._parts = None

    def __call__(self, frames: np.ndarray, prompt: str, progress: Progress | None = None) -> np.ndarray:
        """frames [T, H, W, 3] uint8 -> [T, H, W] uint8. See `segment`."""
        return self.segment(frames, prompt, progress).ids

    @torch.inference_mode()
    def segment(self, frames: np.ndarray, prompt: str, progress: Progress | None = None) -> Segments:
        """The objects with what each was called.

        Raises:
            InputError: nothing that the prompt names was found; a network cannot be loaded.
        """
        tracks = [self._follow(frames, 0, self._first(frames[0], prompt))]
        ids = np.zeros(frames.shape[:3], np.uint8)
        for t in range(len(frames)):
            masks = np.concatenate([track.masks(t) for track in tracks])
            if t and self.every is not None and t % self.every == 0 and len(masks) < self.most:
                found = _unknown(self.detect(frames[t], prompt), masks, self.most - len(masks))
                if len(found.boxes):
                    tracks.append(self._follow(frames, t, found, tracks[0]))
                    masks = np.concatenate([masks, tracks[-1].masks(t)])
            paint(masks, ids[t])
            if progress is not None:
                progress(t + 1, len(frames))
        phrases = tuple(phrase for track in tracks for phrase in track.phrases)
        if not phrases:
            raise InputError(f"nothing of {prompt!r} was found in any frame looked at; {_ADVICE}")
        return Segments(ids, phrases)

    def _first(self, frame: np.ndarray, prompt: str) -> Detections:
        found = self.detect(frame, prompt)
        if not len(found.boxes):
            found = self.detect(frame, prompt, *FALLBACK)
            if len(found.boxes):
                note(f"nothing of {prompt!r} scored {BOX} in the first frame; took what scored {FALLBACK[0]}")
            elif self.every is None:
                raise InputError(
                    f"nothing of {prompt!r} was found in the first frame (least score {FALLBACK[0]}); {_ADVICE}, or "
                    "look in later frames too (every)"
                )
        return _first_of(found, self.most)

    def _follow(self, frames: np.ndarray, start: int, found: Detections, beside: "_Track | None" = None) -> "_Track":
        if self._network is None:
            network = load_part(import_transformers().Sam2VideoModel, self.tracker, "tracker", INSTEAD)
            self._network = network.to(self.device)
            note(f"segmentation by {self.detect.source} and {self.tracker}")
        return _Track(self._network, frames, start, found, beside)


_ADVICE = "name what is to be seen there in other words, such as 'robot arm. cup.'"


def _first_of(found: Detections, count: int) -> Detections:
    return Detections(found.boxes[:count], found.scores[:count], found.phrases[:count])


def _unknown(found: Detections, masks: np.ndarray, room: int) -> Detections:
    """Of what was found, what overlaps none of masks [n, H, W] bool (by their boxes); at most `room`."""
    known = [_bounds(mask) for mask in masks if mask.any()]
    new = [i for i, box in enumerate(found.boxes) if all(box_iou(box, other) < KNOWN for other in known)][:room]
    return Detections(found.boxes[new], found.scores[new], tuple(found.phrases[i] for i in new))


def _bounds(mask: np.ndarray) -> np.ndarray:
    """The box around a mask [H, W]: left, top, right, bottom, the latter two outside."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float32)


def box_iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two boxes (left, top, right, bottom)."""
    side = np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0)
    common = float(side.prod())
    union = float((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod()) - common
    return common / union if union > 0 else 0.0


def paint(masks: np.ndarray, ids: np.ndarray) -> None:
    """masks [n, H, W] bool into ids [H, W] uint8, as 1 to n: the largest first, so that what is small stays visible."""
    areas = masks.sum((1, 2))
    for index in np.argsort(-areas, kind="stable"):
        ids[masks[index]] = index + 1


class _Track:
    """Objects that were found in the same frame, followed by SAM 2 from there on; ask for the frames in order."""

    def __init__(
        self, network: Any, frames: np.ndarray, start: int, found: Detections, beside: "_Track | None" = None
    ) -> None:
        self.network, self.start, self.phrases = network, start, found.phrases
        self.session: Any
        self.size = frames.shape[1:3]
        device, dtype = network.device, network.dtype
        session: Any = import_transformers().Sam2VideoInferenceSession(
            None, *self.size, inference_device=device, inference_state_device=device, dtype=dtype
        )
        session.processed_frames = _Prepared(frames, network.config.image_size, dtype)
        if beside is not None:  # a frame's features are the same for all tracks
            session.cache = beside.session.cache
        scale = torch.tensor([self.size[1], self.size[0]], dtype=torch.float32)
        for index, box in enumerate(torch.from_numpy(found.boxes)):
            session.obj_id_to_idx(index + 1)
            corners = box.reshape(1, 1, 2, 2) / scale * network.config.image_size
            labels = torch.tensor([[[2, 3]]], dtype=torch.int32)  # the two corners of a box
            session.add_point_inputs(index, start, {"point_coords": corners, "point_labels": labels})
        session.obj_with_new_inputs = list(range(1, len(found.boxes) + 1))
        self.session = session

    def masks(self, t: int) -> np.ndarray:
        """[n, H, W] bool of frame t; none before the start."""
        if not self.phrases or t < self.start:
            return np.zeros((0, *self.size), bool)
        logits = self.network(self.session, frame_idx=t).pred_masks.float()
        logits = logits.reshape(len(self.phrases), 1, *logits.shape[-2:])
        self._forget(t)
        masks = [F.interpolate(x[None], self.size, mode="bilinear", align_corners=False)[0] > 0 for x in logits]
        return torch.cat(masks).cpu().numpy()

    def _forget(self, t: int) -> None:
        """Drop what no later frame will ask for: full-size masks, and all of frames beyond the tracker's reach."""
        config = self.network.config
        reach = max(config.num_maskmem, config.max_object_pointers_in_encoder)
        for outputs in self.session.output_dict_per_obj.values():
            tracked = outputs["non_cond_frame_outputs"]
            tracked.pop(t - reach, None)
            for output in (tracked.get(t), outputs["cond_frame_outputs"].get(t)):
                if output is not None:
                    output.pop("high_res_masks", None)


class _Prepared:
    """frames [T, H, W, 3] as the tracker wants them, each made when it is asked for: [3, S, S]. Stands where a session
    has a dict of all of them."""

    def __init__(self, frames: np.ndarray, size: int, dtype: torch.dtype) -> None:
        self.frames, self.size, self.dtype = frames, size, dtype

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> Tensor:
        pixels = torch.from_numpy(np.ascontiguousarray(self.frames[index])).permute(2, 0, 1)[None].float()
        pixels = F.interpolate(pixels, (self.size, self.size), mode="bilinear", antialias=True, align_corners=False)
        mean, std = torch.tensor(MEAN).reshape(3, 1, 1), torch.tensor(STD).reshape(3, 1, 1)
        return ((pixels[0].round().clamp(0, 255) / 255 - mean) / std).to(self.dtype)


def mask_from_prompt(
    video: Video, prompt: str, model: SegmentationModel | None = None, progress: Progress | None = None
) -> np.ndarray:
    """Where what the prompt names is to be seen: [T, H, W] float32 of 0 and 1, as `masks.weight_maps` takes it.

    Raises:
        InputError: nothing was found; the model cannot be loaded.
    """
    if not prompt.strip():
        raise InputError("a mask needs a prompt: what to look for in the video")
    return ((model or GroundedSam2())(video.frames, prompt, progress) > 0).astype(np.float32)
