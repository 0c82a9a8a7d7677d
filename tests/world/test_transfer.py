"""World.transfer: control obeyed where it is asked for and nowhere else, lengths, chunks, and everything it refuses."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import orrery
from orrery.errors import InputError
from orrery.kinds import KINDS
from orrery.video import Video
from orrery.world import Signal, World
from orrery.world.transfer import _layout, _padded_frames, pad_frames

PROMPT = "a red ball falls and bounces"


@pytest.fixture(scope="module")
def folder(controlled_folder: Path) -> Path:
    return controlled_folder


@pytest.fixture(scope="module")
def world(folder: Path) -> World:
    return orrery.load(folder, device="cpu")


def moving(count: int, height: int = 32, width: int = 48, seed: int = 3, fps: float = 10) -> Video:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 4, 6, 3), dtype=np.uint8)
    return Video(coarse.repeat(height // 4, axis=1).repeat(width // 6, axis=2), fps)


def difference(a: Video, b: Video) -> float:
    return float(np.abs(a.frames.astype(int) - b.frames).mean())


def signals(*kinds: str, **options) -> dict[str, Signal]:
    return {kind: Signal(moving(17, seed=KINDS.index(kind)), **options) for kind in kinds}


def test_the_output_is_as_long_as_large_and_as_fast_as_the_input(world: World) -> None:
    for count, fps, size in ((17, 10, (32, 48)), (6, 29.97, (32, 48)), (20, 7.5, (40, 60)), (1, 10, (32, 48))):
        result = world.transfer(PROMPT, moving(count, *size, fps=fps), ["edge"], seed=1)
        assert len(result.video) == count and result.video.fps == fps
        assert (result.video.height, result.video.width) == size
        assert len(result.controls["edge"]) == count and result.controls["edge"].fps == fps
        assert result.source is not None and result.source.frames.shape == result.video.frames.shape


def test_frames_and_fps_are_another_length_where_asked_for(world: World) -> None:
    source = moving(31, fps=30)
    slower = world.transfer_request(PROMPT, source, ["edge"], fps=10)
    assert slower.source is not None and slower.length == 11 and slower.fps == 10
    assert np.array_equal(slower.source.frames, source.frames[::3])
    shorter = world.transfer(PROMPT, source, ["edge"], frames=5)
    assert len(shorter.video) == 5 and shorter.video.fps == 30
    with pytest.raises(InputError, match=r"fps is 60; allowed is above 0 to 30"):
        world.transfer_request(PROMPT, source, ["edge"], fps=60)


def test_weight_zero_is_the_base_model_bit_for_bit(world: World, tiny_folder: Path) -> None:
    base = orrery.load(tiny_folder, "cpu").generate(PROMPT, seed=1)
    half = {"edge": Signal(moving(17, seed=0), 0.0), "seg": Signal(moving(17, seed=3), 0.5)}
    alone = {"seg": Signal(moving(17, seed=3), 0.5)}
    with_half, with_alone = (world.transfer(PROMPT, None, each, seed=1).video for each in (half, alone))
    assert np.array_equal(with_half.frames, with_alone.frames)
    masked = signals("edge", mask=np.zeros((17, 32, 48), np.float32))
    nothing = world.transfer(PROMPT, None, masked, seed=1).video
    assert np.array_equal(nothing.frames, base.frames)
    assert difference(with_alone, base) > 1


def test_two_branches_share_one_pass_and_their_order_does_not_matter(world: World) -> None:
    both = signals("edge", "depth", weight=0.4)
    first = world.transfer(PROMPT, None, both, seed=1).video
    other = world.transfer(PROMPT, None, dict(reversed(both.items())), seed=1).video
    assert np.array_equal(first.frames, other.frames)
    for kind in both:
        assert difference(first, world.transfer(PROMPT, None, signals(kind, weight=0.4), seed=1).video) > 1


def test_weights_beyond_one_in_sum_are_divided_by_it_once(world: World) -> None:
    ones = world.transfer(PROMPT, None, signals(*KINDS), seed=1).video
    quarters = world.transfer(PROMPT, None, signals(*KINDS, weight=0.25), seed=1).video
    assert np.array_equal(ones.frames, quarters.frames)
    everywhere = np.ones((17, 32, 48), np.float32)
    masked = world.transfer(PROMPT, None, signals(*KINDS, mask=everywhere), seed=1).video
    assert np.abs(masked.frames.astype(int) - ones.frames).max() <= 1


def test_a_mask_acts_where_it_is(world: World, tiny_folder: Path) -> None:
    base = orrery.load(tiny_folder, "cpu").generate(PROMPT, seed=1)
    left = np.zeros((17, 32, 48), np.float32)
    left[:, :, :24] = 1
    half = world.transfer(PROMPT, None, signals("edge", mask=left), seed=1).video
    full = world.transfer(PROMPT, None, signals("edge"), seed=1).video
    change = np.abs(half.frames.astype(int) - base.frames).mean((0, 1, 3))
    assert difference(half, base) > 0.5 and difference(half, full) > 0.5
    assert change[:24].mean() > change[24:].mean()


def test_every_option_matters(world: World) -> None:
    source = moving(17)
    first = world.transfer(PROMPT, source, ["edge"], seed=1).video
    hold = np.zeros((17, 32, 48), np.float32)
    hold[:, 8:24, 8:24] = 1
    for change in (
        {"seed": 2}, {"steps": 3}, {"guidance": 0}, {"negative_prompt": "a blue cube"}, {"hold": hold},
        {"sigma_max": 1.0}, {"hold": hold, "hold_until": 1}, {"hold": hold, "hold_until": 2},
    ):  # fmt: skip
        assert difference(first, world.transfer(PROMPT, source, ["edge"], **{"seed": 1} | change).video) > 0.1, change
    assert difference(first, world.transfer("a blue cube rolls", source, ["edge"], seed=1).video) > 0.1


def test_sdedit_comes_near_the_input_as_sigma_falls(world: World) -> None:
    """The VAE of random weights does not reconstruct, so the comparison is with what it makes of the input."""
    source = moving(17)
    with torch.no_grad():
        vae = world.model.vae
        copy = Video.from_tensor(vae.decode(vae.encode(source.to_tensor())), 10)
    errors = [
        difference(copy, world.transfer(PROMPT, source, ["edge"], seed=1, sigma_max=sigma).video)
        for sigma in (0.02, 0.5, 200.0)
    ]
    assert errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize("handover", ["latents", "frames"])
@pytest.mark.parametrize("overlap", [1, 2])
def test_a_long_video_is_drawn_in_chunks(world: World, handover: str, overlap: int) -> None:
    done: list[tuple[int, int]] = []
    source = moving(40)
    request = world.transfer_request(PROMPT, source, ["edge"], seed=1, handover=handover, overlap=overlap)
    video = world.run_transfer(request, lambda *now: done.append(now)).video
    assert len(video) == 40
    chunks = _layout(world, request).chunks
    assert chunks > 2 and done[-1] == (4 * chunks, 4 * chunks)
    first = world.transfer(PROMPT, source[:17], ["edge"], seed=1).video
    same = 17 if handover == "frames" else 13  # a VAE's last frames depend on the latents that follow only there
    assert np.array_equal(video.frames[:1], first.frames[:1]) and difference(video[:same], first[:same]) < 0.5
    other = Video(np.concatenate([source.frames[:30], moving(10, seed=9).frames]), 10)
    changed = world.transfer(PROMPT, other, ["edge"], seed=1, handover=handover, overlap=overlap).video
    assert difference(video[:17], changed[:17]) < 1e-9 and difference(video[-8:], changed[-8:]) > 0.1


def test_independent_chunks(world: World) -> None:
    """num_conditional_frames 0 of the official files: a chunk knows nothing of the one before."""
    source = moving(34)
    video = world.transfer(PROMPT, source, ["edge"], seed=1, handover="frames", overlap=0).video
    second = world.transfer(PROMPT, source[17:], ["edge"], seed=2).video
    assert np.array_equal(video.frames[17:], second.frames)
    with pytest.raises(InputError, match=r"overlap is 0; allowed are 1 and 2, and 0 with handover 'frames'"):
        world.transfer_request(PROMPT, source, ["edge"], overlap=0)


def test_padding_goes_back_and_forth() -> None:
    frames = np.arange(3)
    assert pad_frames(frames, 10).tolist() == [0, 1, 2, 2, 1, 0, 0, 1, 2, 2]
    assert pad_frames(frames[:1], 3).tolist() == [0, 0, 0] and pad_frames(frames, 2).tolist() == [0, 1]


def test_all_chunks_look_at_frames_that_are_there(world: World) -> None:
    for count in (1, 5, 17, 18, 30, 33, 34, 50):
        for handover in ("latents", "frames"):
            for overlap in (1, 2):
                request = world.transfer_request(PROMPT, moving(count), ["edge"], handover=handover, overlap=overlap)
                assert _padded_frames(world, request) >= count
                assert _padded_frames(world, request) < count + 17


def test_control_latents_of_the_whole_are_those_of_its_chunks(world: World) -> None:
    """The encoder is causal and streams, so what a chunk sees does not depend on what comes later."""
    long = moving(33)
    with torch.no_grad():
        whole, begin = (world.model.vae.encode(each.to_tensor()) for each in (long, long[:17]))
    assert torch.allclose(whole[:, :, : begin.shape[2]], begin, atol=1e-5)


def test_a_black_control_is_zero_latents(world: World) -> None:
    black = Video(np.zeros((17, 32, 48, 3), np.uint8), 10)
    seen = {}
    original = type(world)._chunk

    def spy(self, *args):
        seen["latents"] = args[-1].controls[0].latents
        return original(self, *args)

    type(world)._chunk = spy  # type: ignore[method-assign]
    try:
        world.transfer(PROMPT, None, {"edge": Signal(black)}, seed=1)
    finally:
        type(world)._chunk = original  # type: ignore[method-assign]
    assert not seen["latents"].any()


def test_placements_agree(folder: Path, world: World) -> None:
    asked = signals("edge", "seg", weight=0.5)
    first = world.transfer(PROMPT, None, asked, seed=1).video
    for placement in ("stages", "blocks"):
        other = orrery.load(folder, "cpu", placement=placement)
        again = other.transfer(PROMPT, None, asked, seed=1).video  # guidance runs in one batch there
        assert np.abs(again.frames.astype(int) - first.frames).max() <= 1, placement
        assert not other.model._loaded


def test_the_base_is_held_once(world: World) -> None:
    world.transfer(PROMPT, None, signals(*KINDS), seed=1)
    held = world.model._loaded
    assert {f"control-{kind}" for kind in KINDS} <= held.keys()
    base = sum(p.numel() for p in held["transformer"].parameters())
    for kind in KINDS:
        assert sum(p.numel() for p in held[f"control-{kind}"].parameters()) < 1.2 * base
    owners = {p.data_ptr() for p in held["transformer"].parameters()}
    assert not owners & {p.data_ptr() for p in held["control-edge"].parameters()}


def test_branches_count_in_the_plan(folder: Path) -> None:
    world = orrery.load(folder, "cpu", placement="stages")
    sizes = [world.plan((32, 48), 17, controls=kinds).peaks["transformer"] for kinds in ((), ("edge",), KINDS)]
    branch = sum(p.numel() for p in world.model._load("control-edge", torch.device("cpu")).parameters()) * 4
    assert sizes[1] - sizes[0] > branch and sizes[2] - sizes[1] >= 3 * branch


REFUSED = [
    ({}, {}, "a transfer needs at least one control"),
    ({"sketch": None}, {}, "the control is 'sketch'; allowed are edge, blur, depth, seg"),
    ({"blur": None, "vis": None}, {}, "the control blur is asked for twice"),
    ({"edge": Signal(moving(16))}, {}, "16 frames, the input 17"),
    ({"edge": Signal(moving(18))}, {}, "18 frames, the input 17"),
    ({"edge": Signal(moving(17, fps=12))}, {}, "12 frames per second, the input at 10"),
    ({"edge": Signal(moving(17, 48, 48))}, {}, "48x48"),
    ({"edge": Signal(None, -0.5)}, {}, "the weight of edge is -0.5; allowed is 0 to 1"),
    ({"edge": Signal(None, 1.5)}, {}, "the weight of edge is 1.5; allowed is 0 to 1"),
    ({"edge": Signal(None, 0.0)}, {}, "at least one must be above 0"),
    ({"edge": Signal(None, mask=np.zeros((16, 32, 48), np.float32))}, {}, "16 frames, the input 17"),
    ({"edge": Signal(None, mask=np.zeros((17, 48, 48), np.float32))}, {}, "48x48"),
    ({"edge": Signal(None, strength="huge")}, {}, "edge strength is 'huge'; allowed are none, very_low"),
    ({"edge": Signal(moving(17), strength="low")}, {}, "a control video is given"),
    ({"edge": None}, {"image": moving(1)}, "takes no reference image"),
    ({"edge": None}, {"chunk": 9}, "chunk is 9; model"),
    ({"edge": None}, {"sigma_max": 300}, "sigma_max is 300; allowed is above 0 to 200"),
    ({"edge": None}, {"frames": 0}, "frames must be a whole number from 1"),
    ({"edge": None}, {"handover": "thoughts"}, "handover is 'thoughts'"),
    ({"edge": None}, {"hold": np.full((17, 32, 48), 2.0)}, "holds float64 from 2 to 2"),
]


@pytest.mark.parametrize(("controls", "options", "message"), REFUSED, ids=[row[2][:30] for row in REFUSED])
def test_refused(world: World, controls: dict, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        world.transfer_request(PROMPT, moving(17), controls, **options)


def test_seg_looks_for_what_the_prompt_tells_of(world: World) -> None:
    from orrery.control.models import Models

    asked: list[str] = []

    def segmentation(frames: np.ndarray, prompt: str, progress=None) -> np.ndarray:
        asked.append(prompt)
        return (frames[..., 0] > 128).astype(np.uint8)

    models = Models(depth=None, segmentation=segmentation)  # type: ignore[arg-type]
    world.transfer_request(PROMPT, moving(17), {"seg": Signal(models=models)})
    world.transfer_request(PROMPT, moving(17), {"seg": Signal(models=models, prompt="ball.")})
    assert asked == [PROMPT, "ball."]


def test_refused_without_an_input(world: World, tiny_folder: Path) -> None:
    with pytest.raises(InputError, match="edge is to be made of the input video, but there is none"):
        world.transfer_request(PROMPT, None, ["edge"])
    with pytest.raises(InputError, match="keep something of the input video, but there is none"):
        world.transfer_request(PROMPT, None, signals("edge"), sigma_max=1.0)
    with pytest.raises(InputError, match=r"has no control branch for edge; it has: none"):
        orrery.load(tiny_folder, "cpu").transfer_request(PROMPT, moving(17), ["edge"])


def test_a_network_looks_only_when_all_else_is_right_and_at_what_counts(world: World) -> None:
    from orrery.control.models import Models

    seen: list[tuple[int, ...]] = []

    def depth(frames: np.ndarray, progress=None) -> np.ndarray:
        seen.append(frames.shape)
        return frames[..., 0].astype(np.float32)

    models = Models(depth=depth, segmentation=None)  # type: ignore[arg-type]
    for wrong in ({"steps": 0}, {"overlap": 3}, {"sigma_max": -1}, {"chunk": 8}):
        with pytest.raises(InputError):
            world.transfer_request(PROMPT, moving(30, 64, 96), {"depth": Signal(models=models)}, **wrong)
    idle = {"depth": Signal(models=models, weight=0.0), "edge": Signal()}
    assert world.transfer_request(PROMPT, moving(30, 64, 96), idle).kinds == ("edge",)
    assert not seen
    world.transfer_request(PROMPT, moving(30, 64, 96), {"depth": Signal(models=models)}, frames=7)
    assert seen == [(7, 32, 48, 3)]


def test_a_control_at_the_drawn_size_is_taken_as_it_is(world: World) -> None:
    """So that a written control map can be used again, whatever the input's size; and one resize, not two."""
    source, drawn = moving(17, 64, 96), moving(17, seed=9)
    request = world.transfer_request(PROMPT, source, {"edge": Signal(drawn)})
    assert np.array_equal(request.signals[0].video.frames, drawn.frames)
    stretched = world.transfer_request(PROMPT, moving(17, 32, 32), {"edge": Signal(drawn)}, size=(32, 48))
    assert np.array_equal(stretched.signals[0].video.frames, drawn.frames)
    large = world.transfer_request(PROMPT, source, {"seg": Signal(moving(17, 64, 96, seed=9))})
    assert np.array_equal(large.signals[0].video.frames, drawn.frames)


def test_trim_cuts_control_and_mask(world: World) -> None:
    mask = np.ones((20, 32, 48), np.float32)
    request = world.transfer_request(PROMPT, moving(17), {"edge": Signal(moving(18), mask=mask, trim=True)})
    assert len(request.signals[0].video) == 17 and request.signals[0].mask is not None
    assert request.signals[0].mask.shape == (17, 32, 48)


def test_a_distilled_model_obeys_control_in_four_steps(folder: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(folder, tmp_path / "distilled"))
    config = json.loads((place / "config.json").read_text())
    distilled = {"solver": "renoise", "schedule": "distilled", "steps": 4, "guidance": 0.0, "exact_times": True}
    config["sampling"] |= distilled | {"shift": 5.0}
    (place / "config.json").write_text(json.dumps(config))
    student, told = orrery.load(place, "cpu"), []
    network = student.model.transformer
    forward = network.forward
    network.forward = lambda x, times, c: told.append(float(times.flatten()[-1])) or forward(x, times, c)  # type: ignore
    first = student.transfer(PROMPT, None, signals("edge"), seed=1).video
    assert told == pytest.approx([1000.0, 937.5, 833.333, 625.0], rel=1e-4)
    assert difference(first, student.transfer(PROMPT, None, signals("depth"), seed=1).video) > 0.5
    with pytest.raises(InputError, match="not for distilled models"):
        student.transfer_request(PROMPT, moving(17), ["edge"], sigma_max=1.0)
