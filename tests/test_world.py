"""World.generate: the three kinds of start, chunks, determinism, and everything it refuses."""

import dataclasses
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import orrery
from orrery.errors import InputError
from orrery.flow import karras_schedule, numpy_noise
from orrery.nn.dit import Conditions
from orrery.video import Video
from orrery.world import World

PROMPT = "a red ball falls and bounces"


@pytest.fixture(scope="module")
def world(tiny_folder: Path) -> World:
    return orrery.load(tiny_folder, device="cpu")


def moving(count: int, height: int = 32, width: int = 48, seed: int = 3) -> Video:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 4, 6, 3), dtype=np.uint8)
    return Video(coarse.repeat(height // 4, axis=1).repeat(width // 6, axis=2), 10)


def difference(a: Video, b: Video) -> float:
    return float(np.abs(a.frames.astype(int) - b.frames).mean())


def test_words_alone(world: World) -> None:
    video = world.generate(PROMPT, seed=1)
    assert video.frames.shape == (17, 32, 48, 3) and video.fps == 10
    assert video.frames.std() > 1


def test_the_same_seed_is_the_same_video(world: World, tiny_folder: Path) -> None:
    first = world.generate(PROMPT, seed=1, frames=33)
    world.generate("a blue cube rolls", start=moving(5), seed=2)
    assert np.array_equal(world.generate(PROMPT, seed=1, frames=33).frames, first.frames)
    assert np.array_equal(orrery.load(tiny_folder, "cpu").generate(PROMPT, seed=1, frames=33).frames, first.frames)


def test_every_argument_matters(world: World) -> None:
    video = world.generate(PROMPT, seed=1)
    for change in (
        {"seed": 2},
        {"steps": 3},
        {"guidance": 0},
        {"negative_prompt": "a blue cube"},
        {"start": moving(1)},
    ):
        assert difference(video, world.generate(PROMPT, **{"seed": 1} | change)) > 0.1, change
    assert difference(video, world.generate("a blue cube rolls to the left", seed=1)) > 0.1


def spy(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> list:
    """Record (positional arguments, result) of a method's calls."""
    calls: list = []
    original = getattr(owner, name)

    def wrapper(*args, **kwargs):
        result = original(*args, **kwargs)
        calls.append((args, result))
        return result

    monkeypatch.setattr(owner, name, wrapper)
    return calls


def plan_of(world: World, request):
    return world.plan(request.size, request.frames)


def arrival(world: World, seed: int, known: torch.Tensor) -> torch.Tensor:
    """Where given frames end: their path is straight, and starts at noise although its first sigma is not quite 1."""
    sigma = world._schedule(world.config.sampling).sigmas[0]
    assert 0 < 1 - sigma < 1e-3
    return sigma * known + (1 - sigma) * numpy_noise(seed, (1, 16, 5, 4, 6))[:, :, : known.shape[2]]


@pytest.mark.parametrize("count, given", [(1, 1), (5, 5), (11, 5)])
def test_only_the_given_frames_are_encoded_and_they_are_kept(
    world: World, monkeypatch: pytest.MonkeyPatch, count: int, given: int
) -> None:
    encoded = spy(monkeypatch, world.model.vae, "encode")
    request = world.request(PROMPT, moving(count))
    latents = world._latents(request, plan_of(world, request), None)
    ((frames, known),) = ((args[0], result) for args, result in encoded)
    assert frames.shape == (1, 3, given, 32, 48)
    assert torch.equal(frames, moving(count)[-given:].to_tensor())  # the LAST frames of a longer video
    assert known.shape[2] == (given - 1) // 4 + 1 and latents.shape == (1, 16, 5, 4, 6)
    assert torch.allclose(latents[:, :, : known.shape[2]], arrival(world, 0, known), atol=1e-5)
    assert (latents[:, :, known.shape[2] :].abs().amax(dim=(0, 1, 3, 4)) > 1e-3).all()


def test_words_alone_encode_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = spy(monkeypatch, world.model.vae, "encode")
    world.generate(PROMPT)
    assert encoded == []


def test_what_the_transformer_is_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = spy(monkeypatch, world.model.transformer, "forward")
    world.generate(PROMPT, moving(5), steps=3)
    assert len(calls) == 3  # with and without the prompt, side by side
    for (x, times, conditions), _ in calls:
        assert isinstance(conditions, Conditions)
        assert conditions.frame_mask[0, 0, :, 0, 0].tolist() == [1, 1, 0, 0, 0]
        assert len(x) == 2 and torch.equal(x[0], x[1]) and conditions.text.batch == 2
        assert times.shape == (1, 5) and times[0, :2].tolist() == [0, 0] and times[0, 2:].min() > 0
        assert torch.equal(x[:, :, :2], calls[0][0][0][:, :, :2])  # given frames stay what they are
    calls.clear()
    world.generate(PROMPT, steps=3, guidance=0)
    assert len(calls) == 3


def test_no_guidance_prompt_is_zeros(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = spy(monkeypatch, world.model.transformer, "encode_text")
    world.generate(PROMPT, steps=1)
    (words, zeros) = (args[0] for args, _ in encoded)
    assert words.abs().sum() > 0 and zeros.abs().sum() == 0 and words.shape == zeros.shape
    encoded.clear()
    world.generate(PROMPT, steps=1, negative_prompt="")
    assert encoded[1][0][0].abs().sum() > 0


def test_long_videos_are_chained_in_latent_space(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = spy(monkeypatch, world, "_chunk")
    encoded = spy(monkeypatch, world.model.vae, "encode")
    decoded = spy(monkeypatch, world.model.vae, "decode_stream")
    done: list[tuple[int, int]] = []
    video = world.generate(PROMPT, moving(1), frames=41, steps=4, progress=lambda *now: done.append(now))
    assert len(video) == 41  # 11 latents: 5 + 3 + 3
    assert len(chunks) == 3 and len(encoded) == 1 and len(decoded) == 1
    for index, ((_, before), (args, now)) in enumerate(zip(chunks[:-1], chunks[1:])):
        assert torch.equal(args[5], before[:, :, -2:])  # the last two latents go over as they are
        assert torch.allclose(now[:, :, :2], arrival(world, index + 1, args[5]), atol=1e-5)
    assert not torch.equal(chunks[0][1][:, :, 2:], chunks[1][1][:, :, 2:])  # each with noise of its own
    whole = torch.cat([chunks[0][1], chunks[1][1][:, :, 2:], chunks[2][1][:, :, 2:]], dim=2)
    assert torch.equal(decoded[0][0][0], whole)
    assert done == [(step, 12) for step in range(1, 13)]


def test_a_short_video_is_the_beginning_of_a_native_one(world: World) -> None:
    native = world.generate(PROMPT, seed=5)
    for frames in (1, 9):
        short = world.generate(PROMPT, seed=5, frames=frames)
        assert len(short) == frames and difference(short, native[:frames]) < 0.01


def test_streamed_decoding_is_whole_decoding(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = world.generate(PROMPT, seed=1)
    monkeypatch.setattr("orrery.world.plan.PIXELS_AT_ONCE", 1)
    assert difference(world.generate(PROMPT, seed=1), whole) < 0.01


def test_all_kinds_of_start(world: World, tmp_path: Path) -> None:
    image = moving(1)
    pixels = image.frames[0]
    expected = world.generate(PROMPT, image)
    for start in (
        pixels,
        image.frames,
        Image.fromarray(pixels),
        image.save(tmp_path / "a.png"),
        str(tmp_path / "a.png"),
    ):
        assert np.array_equal(world.generate(PROMPT, start).frames, expected.frames), type(start)
    video = moving(7)
    path = video.save(tmp_path / "a.mp4", crf=0, pixel_format="yuv444p")
    assert difference(world.generate(PROMPT, path), world.generate(PROMPT, video.frames)) < 3


def test_a_start_of_another_size_is_cropped_and_resized(world: World) -> None:
    wide = moving(1, 64, 192)
    request = world.request(PROMPT, wide)
    assert np.array_equal(request.given.frames, wide.resize(32, 48).frames)


def test_another_size(world: World) -> None:
    assert world.generate(PROMPT, moving(1), size=(48, 32), steps=1).frames.shape == (17, 48, 32, 3)


def test_karras_schedule_of_a_config(world: World) -> None:
    sampling = dataclasses.replace(world.config.sampling, schedule="karras", steps=6)
    assert torch.equal(world._schedule(sampling).sigmas, karras_schedule(6).sigmas)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompt": ""}, "the prompt is ''; it must say something"),
        ({"prompt": " \n"}, "must say something"),
        ({"frames": 16}, "frames must be 4k + 1, got 16; near it are 13 and 17"),
        ({"frames": 0}, "frames must be a whole number from 1 to 65537, got 0"),
        ({"frames": 10**12 + 1}, "frames must be a whole number from 1 to 65537, got 1000000000001"),
        ({"frames": 17.0}, "frames must be a whole number from 1 to 65537, got 17.0"),
        ({"steps": 0}, "steps must be a whole number from 1 to 1000, got 0"),
        ({"seed": -1}, "seed must be a whole number from 0 to 4294967295, got -1"),
        ({"seed": 2**32}, "seed"),
        ({"guidance": -0.5}, "guidance must be a number of at least 0, got -0.5"),
        ({"guidance": float("nan")}, "guidance"),
        ({"size": (40, 48)}, "height must be a multiple of 16, got 40"),
        ({"size": (32, 8)}, "width must be a whole number from 16 to 256, got 8"),
        ({"size": (32, 512)}, "width must be a whole number from 16 to 256, got 512"),
        ({"start": np.zeros((1, 1, 3), np.uint8)}, "the start is 1x1 pixels; each side must be at least 16"),
        (
            {"start": np.zeros((3, 32, 32, 3), np.uint8)},
            "the start has 3 frames; allowed are 1 (an image) or at least 5",
        ),
        ({"start": np.zeros((32, 32, 3), np.float32)}, "uint8"),
        ({"start": np.zeros((32, 32), np.uint8)}, "[T, H, W, 3]"),
        ({"start": 7}, "a start cannot be int"),
        ({"start": "none.png"}, "none.png: no such file"),
        ({"start": np.zeros((8, 32, 32, 3), np.uint8), "frames": 5}, "frames is 5, but the start already gives 5"),
    ],
)
def test_bad_input_is_one_clear_line(world: World, change: dict, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as error:
        world.generate(**{"prompt": PROMPT} | change)
    assert "\n" not in str(error.value)


def test_unknown_words_are_named(world: World) -> None:
    with pytest.warns(UserWarning, match="does not know: 'green', 'elephant' "):
        world.request("a green elephant, elephant rolls")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        world.request("A red Ball falls.")


def test_a_long_prompt_is_cut_aloud(world: World) -> None:
    with pytest.warns(UserWarning, match="2 tokens longer than the model's 12: its end is cut off"):
        world.request("a red ball falls and bounces and a blue cube rolls to the left")


def test_another_frame_rate_is_named(world: World) -> None:
    with pytest.warns(UserWarning, match="the start has 30 fps and the model 10"):
        world.request(PROMPT, Video(moving(5).frames, 30))


def test_training_works_after_generating(tiny_folder: Path) -> None:
    world = orrery.load(tiny_folder, "cpu")
    world.generate(PROMPT, steps=1)
    net = world.model.transformer.requires_grad_(True)
    text = world.model.text.encode([PROMPT]).clone()
    net(torch.randn(1, 16, 5, 4, 6), torch.tensor([500.0]), Conditions(text)).square().mean().backward()
    assert net.blocks[0].mlp.layer1.weight.grad.abs().sum() > 0


def test_unknown_device(tiny_folder: Path) -> None:
    with pytest.raises(InputError, match="device 'quantum' is not available"):
        orrery.load(tiny_folder, device="quantum")


def test_the_package_is_lazy() -> None:
    assert set(orrery.__all__) <= set(dir(orrery))
    assert orrery.World is World and orrery.Video is Video
    with pytest.raises(AttributeError, match="no attribute 'Wolrd'"):
        orrery.Wolrd  # noqa: B018


def test_a_device_that_holds_no_numbers(tiny_folder: Path) -> None:
    with pytest.raises(InputError, match="device 'meta' holds no numbers"):
        orrery.load(tiny_folder, "meta")
