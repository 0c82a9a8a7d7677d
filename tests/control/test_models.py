"""Depth and segmentation through the real classes of `transformers`, tiny and random, loaded from a folder."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    DepthAnythingForDepthEstimation,
    GroundingDinoForObjectDetection,
    GroundingDinoProcessor,
    Sam2VideoInferenceSession,
    Sam2VideoModel,
)

from orrery.control.depth import aligned, still_pixels
from orrery.control.grounded import (
    Detections,
    GroundedSam2,
    GroundingDino,
    _unknown,
    as_query,
    box_iou,
    mask_from_prompt,
    paint,
)
from orrery.control.models import DepthAnything, DepthModel, Models, SegmentationModel, load_processor
from orrery.control.signals import make_signal
from orrery.errors import InputError
from orrery.video import Video

PROMPT = "Red square. blue ball"


@pytest.fixture(scope="module")
def depth(depth_folder):
    return DepthAnything(depth_folder, device="cpu", align=False)


def resized_tensor(frame: np.ndarray, height: int, width: int, resample: Image.Resampling) -> torch.Tensor:
    picture = np.asarray(Image.fromarray(frame).resize((width, height), resample)).astype(np.float32) / 255
    picture = (picture - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    return torch.from_numpy(picture.astype(np.float32)).permute(2, 0, 1)[None]


@torch.no_grad()
def test_depth_is_the_networks_at_the_size_of_the_video(clip, depth, depth_folder):
    network = DepthAnythingForDepthEstimation.from_pretrained(depth_folder).eval()
    made = depth(clip.frames[:2])
    assert made.shape == (2, 48, 80) and made.dtype == np.float32
    for frame, inverse in zip(clip.frames, made):
        pixels = resized_tensor(frame, 56, 98, Image.Resampling.BICUBIC)  # 56 high, keeping its shape, by patches of 14
        said = network(pixels).predicted_depth[:, None]
        wanted = torch.nn.functional.interpolate(said, (48, 80), mode="bicubic", align_corners=False)[0, 0]
        np.testing.assert_allclose(inverse, wanted, atol=1e-4, rtol=1e-4)
    assert made.std() > 0.01


def test_metric_depth_is_inverted(clip, metric_folder):
    model = DepthAnything(metric_folder, device="cpu", align=False)
    made = model(clip.frames[:1])
    network, processor = model._loaded()
    with torch.no_grad():
        metres = network(processor(images=clip.frames[0], return_tensors="pt")["pixel_values"]).predicted_depth
    assert made.min() > 0
    assert 1 / metres.max() * 0.5 < made.mean() < 1 / metres.min() * 2


def test_depth_is_aligned_over_time_unless_told_not_to(clip, depth, depth_folder):
    still = Video(np.repeat(clip.frames[:1], 3, 0), 10)
    plain, steady = depth(clip.frames), DepthAnything(depth_folder, device="cpu")(clip.frames)
    wanted = plain.copy()
    for t in range(1, len(clip)):
        wanted[t] = aligned(plain[t], wanted[t - 1], still_pixels(clip.frames[t], clip.frames[t - 1]))
    np.testing.assert_array_equal(steady, wanted)
    assert (steady[1:] != plain[1:]).mean() > 0.9
    np.testing.assert_allclose(DepthAnything(depth_folder, device="cpu")(still.frames), depth(still.frames), atol=1e-4)


def test_depth_says_what_it_is_and_how_far(clip, depth_folder, capsys):
    seen = []
    model = DepthAnything(depth_folder, device="cpu")
    model(clip.frames[:3], lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    model(clip.frames[:1])
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("orrery:")]
    assert len(notes) == 1 and str(depth_folder) in notes[0] and "Video-Depth-Anything" in notes[0]
    model.release()
    assert model._parts is None and len(model(clip.frames[:1])) == 1


def test_a_depth_signal_through_the_network(clip, depth):
    made = make_signal("depth", clip[:2], models=Models(depth=depth))
    assert made.frames.min() == 0 and made.frames.max() == 255 and (made.frames[..., :1] == made.frames).all()


def test_the_defaults_cost_nothing_until_called():
    models = Models()
    assert isinstance(models.depth, DepthModel) and isinstance(models.segmentation, SegmentationModel)
    assert models.depth._parts is None and models.segmentation._network is None
    assert models.depth.name == "depth-anything/Depth-Anything-V2-Small-hf"
    assert models.segmentation.detect.source == "IDEA-Research/grounding-dino-base"
    assert models.segmentation.tracker == "facebook/sam2-hiera-large"


def test_a_name_changes_with_the_files(depth_folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(depth_folder, copy)
    before = DepthAnything(copy).name
    assert before == DepthAnything(copy).name != DepthAnything(copy, align=False).name
    (copy / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes() + b" ")
    assert DepthAnything(copy).name != before


def test_missing_models_are_told_with_what_to_do_instead(clip, depth_folder, tracker_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="cannot load the depth model .*nowhere.*give a depth control .*depth.npz"):
        DepthAnything(tmp_path / "nowhere")(clip.frames)
    with pytest.raises(InputError, match="cannot load the detector .*segmentation.npz"):
        GroundedSam2(tmp_path / "nowhere", tracker_folder, device="cpu")(clip.frames, PROMPT)
    part = tmp_path / "part"
    shutil.copytree(depth_folder, part)
    (part / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match="cannot load the image processor"):
        DepthAnything(part)(clip.frames)
    (part / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(InputError, match="cannot load the depth model"):
        DepthAnything(part)(clip.frames)


def test_an_incomplete_checkpoint_is_refused(clip, depth_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    part = tmp_path / "part"
    shutil.copytree(depth_folder, part)
    weights = load_file(part / "model.safetensors")
    gone = next(name for name in weights if name.startswith("head."))
    del weights[gone]
    save_file(weights, part / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"no complete depth model .*1 weights are missing.*{gone}"):
        DepthAnything(part, device="cpu")(clip.frames)


@pytest.fixture(scope="module")
def detector(detector_folder):
    return GroundingDino(detector_folder, device="cpu")


@torch.no_grad()
def test_boxes_are_those_of_the_librarys_own_processor(clip, detector, detector_folder):
    network = GroundingDinoForObjectDetection.from_pretrained(detector_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(detector_folder)
    processor = GroundingDinoProcessor(load_processor(str(detector_folder), ""), tokenizer)
    words = tokenizer("red square. blue ball.", return_tensors="pt")
    pixels = resized_tensor(clip.frames[0], 96, 160, Image.Resampling.BILINEAR)
    said = network(pixel_values=pixels, **words)
    best = said.logits.sigmoid().max(-1).values[0].sort().values
    for box, text in ((0.0, 0.3), (float(best[4:6].mean()), 0.5)):
        wanted = processor.post_process_grounded_object_detection(
            said, words["input_ids"], threshold=box, text_threshold=text, target_sizes=[(48, 80)]
        )[0]
        order = wanted["scores"].argsort(descending=True)
        made = detector(clip.frames[0], PROMPT, box, text)
        assert len(made.boxes) == (8 if box == 0 else 3)
        np.testing.assert_allclose(made.scores, wanted["scores"][order], atol=1e-4)
        corners = wanted["boxes"][order].numpy().clip(0, [80, 48, 80, 48])
        np.testing.assert_allclose(made.boxes, corners, atol=0.05)
        assert list(made.phrases) == [wanted["text_labels"][i].replace("[SEP]", "").strip(" .") for i in order]


def test_queries():
    assert as_query("A Red square.  Blue ball") == "a red square. blue ball."
    assert as_query("word " * 300).count("word") == 128


def test_paint_puts_the_small_on_top():
    masks = np.zeros((3, 4, 6), bool)
    masks[0, 1:3, 1:3], masks[1], masks[2, :, 4:] = True, True, True
    ids = np.zeros((4, 6), np.uint8)
    paint(masks, ids)
    assert ids[1, 1] == 1 and ids[0, 0] == 2 and ids[0, 5] == 3 and (ids == 1).sum() == 4 and (ids == 3).sum() == 8


def test_what_is_followed_already_is_not_taken_for_new():
    mask = np.zeros((1, 20, 20), bool)
    mask[0, 5:15, 5:15] = True
    boxes = np.array([[5, 5, 15, 14], [0, 0, 4, 4], [16, 0, 20, 4]], np.float32)
    found = Detections(boxes, np.array([0.9, 0.8, 0.7], np.float32), ("a", "b", "c"))
    assert _unknown(found, mask, 5).phrases == ("b", "c")
    assert _unknown(found, mask, 1).phrases == ("b",)
    assert _unknown(found, np.zeros((1, 20, 20), bool), 5).phrases == ("a", "b", "c")
    assert box_iou(boxes[0], np.array([5, 5, 15, 15], np.float32)) == pytest.approx(0.9)
    assert box_iou(boxes[0], boxes[1]) == 0


def sam_pixels(frames: np.ndarray) -> torch.Tensor:
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    pixels = torch.nn.functional.interpolate(pixels, (64, 64), mode="bilinear", antialias=True).round() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)


def librarys_masks(folder, frames: np.ndarray, boxes: np.ndarray, start: int) -> np.ndarray:
    """[T - start, n, H, W]: a session with the whole video in it, propagated by the library."""
    network = Sam2VideoModel.from_pretrained(folder).eval()
    height, width = frames.shape[1:3]
    session = Sam2VideoInferenceSession(sam_pixels(frames), height, width, dtype=torch.float32)
    for index, box in enumerate(boxes):
        session.obj_id_to_idx(index + 1)
        points = torch.tensor(box).view(1, 1, 2, 2) / torch.tensor([width, height]) * 64
        labels = torch.tensor([[[2, 3]]], dtype=torch.int32)
        session.add_point_inputs(index, start, {"point_coords": points, "point_labels": labels})
    session.obj_with_new_inputs = list(range(1, len(boxes) + 1))
    out = []
    for said in network.propagate_in_video_iterator(session, start_frame_idx=start):
        logits = said.pred_masks.reshape(len(boxes), 1, 16, 16).float()
        out.append(torch.nn.functional.interpolate(logits, (height, width), mode="bilinear")[:, 0].numpy() > 0)
    return np.stack(out)


@pytest.fixture(scope="module")
def long_clip(clip) -> np.ndarray:
    """Longer than the tracker's memory (4 frames), and every frame another."""
    return np.concatenate([clip.frames, clip.frames[::-1, ::-1]])


def test_masks_are_those_of_a_session_that_holds_the_whole_video(long_clip, detector, detector_folder, tracker_folder):
    seen = []
    model = GroundedSam2(detector_folder, tracker_folder, device="cpu", most=3)
    made = model.segment(long_clip, PROMPT, lambda done, total: seen.append((done, total)))
    found = detector(long_clip[0], PROMPT)
    assert len(made.phrases) == 3 < len(found.boxes) and made.phrases == found.phrases[:3]
    wanted = np.zeros(long_clip.shape[:3], np.uint8)
    for t, masks in enumerate(librarys_masks(tracker_folder, long_clip, found.boxes[:3], 0)):
        paint(masks, wanted[t])
    np.testing.assert_array_equal(made.ids, wanted)
    assert made.ids.dtype == np.uint8 and len(np.unique(made.ids)) == 4
    assert any((made.ids[t] != made.ids[1]).any() for t in range(2, len(long_clip)))
    assert seen[-1] == (12, 12) and len(seen) == 12


def test_what_appears_later_is_found_with_every(long_clip, detector_folder, tracker_folder, monkeypatch):
    model = GroundedSam2(detector_folder, tracker_folder, device="cpu", every=5)
    box = np.array([[30, 10, 50, 30]], np.float32)
    tiny = np.array([[0, 0, 2, 2]], np.float32)
    asked = []

    def detect(self, frame, prompt, *scores):  # in place of the detector; what follows its boxes is the real tracker
        asked.append(frame)
        late = (frame == long_clip[5]).all()
        return Detections(box if late else tiny, np.ones(1, np.float32), ("late",) if late else ("first",))

    monkeypatch.setattr(GroundingDino, "__call__", detect)
    monkeypatch.setattr("orrery.control.grounded._unknown", lambda found, masks, room: found)
    model.segment(long_clip[:1], PROMPT)  # loads
    asked.clear()
    seen: list[object] = []
    model._network.vision_encoder.register_forward_hook(lambda *given: seen.append(given))
    made = model.segment(long_clip, PROMPT)
    assert len(seen) == len(long_clip)  # each frame once, however many tracks there are
    assert len(asked) == 3  # frames 0, 5 and 10
    assert made.phrases == ("first", "late", "first")
    wanted = np.zeros(long_clip.shape[:3], np.uint8)
    tracks = [(0, tiny), (5, box), (10, tiny)]
    masks = [librarys_masks(tracker_folder, long_clip, boxes, start) for start, boxes in tracks]
    for t in range(len(long_clip)):
        paint(np.concatenate([m[t - s] for (s, _), m in zip(tracks, masks) if t >= s]), wanted[t])
    np.testing.assert_array_equal(made.ids, wanted)
    assert not (made.ids[:5] > 1).any() and (made.ids[5:] == 2).any()


def test_the_trackers_memory_does_not_grow(clip, detector_folder, tracker_folder, monkeypatch):
    model = GroundedSam2(detector_folder, tracker_folder, device="cpu", most=1)
    tracks = []
    follow = model._follow
    monkeypatch.setattr(model, "_follow", lambda *given: tracks.append(follow(*given)) or tracks[-1])
    model(np.concatenate([clip.frames] * 3), PROMPT)
    kept = tracks[0].session.output_dict_per_obj[0]["non_cond_frame_outputs"]
    assert len(kept) == 4 and not any("high_res_masks" in output for output in kept.values())


def test_nothing_found_is_an_error_that_says_so(clip, detector_folder, tracker_folder, monkeypatch, capsys):
    model = GroundedSam2(detector_folder, tracker_folder, device="cpu", most=2)
    real, asked = GroundingDino.__call__, []
    nothing = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), ())

    def only_below(self, frame, prompt, *scores):
        asked.append(scores)
        return real(self, frame, prompt) if scores and below else nothing

    monkeypatch.setattr(GroundingDino, "__call__", only_below)
    below = True
    assert len(model.segment(clip.frames[:2], PROMPT).phrases) == 2
    assert asked == [(), (0.1, 0.1)] and "scored 0.15" in capsys.readouterr().err
    below = False
    with pytest.raises(InputError, match="nothing of 'Red square. blue ball' was found in the first frame"):
        model(clip.frames, PROMPT)
    model.every = 2
    with pytest.raises(InputError, match="was found in any frame looked at"):
        model(clip.frames, PROMPT)


def test_the_detectors_own_threshold(clip, detector):
    assert len(detector(clip.frames[0], PROMPT, box=1.0).boxes) == 0


def test_a_mask_of_a_prompt(clip, detector_folder, tracker_folder):
    model = GroundedSam2(detector_folder, tracker_folder, device="cpu", most=1)
    mask = mask_from_prompt(clip[:3], PROMPT, model)
    np.testing.assert_array_equal(mask, model(clip.frames[:3], PROMPT) > 0)
    assert mask.dtype == np.float32 and 0 < mask.mean() < 1
    with pytest.raises(InputError, match="a mask needs a prompt"):
        mask_from_prompt(clip, " ", model)


def test_settings_out_of_range():
    with pytest.raises(InputError, match="every is 0"):
        GroundedSam2(every=0)
    for most in (0, 256):
        with pytest.raises(InputError, match=f"most is {most}; allowed is 1 to 255"):
            GroundedSam2(most=most)
