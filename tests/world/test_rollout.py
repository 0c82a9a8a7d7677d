"""Rollouts: bit for bit by seed, copies independent of each other, actions that matter, constant memory."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from orrery.errors import InputError
from orrery.video import Video
from orrery.world import Rollout, World, load


@pytest.fixture(scope="module")
def world(acting_folder: Path) -> World:
    return load(acting_folder)


@pytest.fixture(scope="module")
def chunked(chunked_folder: Path) -> World:
    return load(chunked_folder)


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (64, 64, 3)).astype(np.uint8)


def deeds(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (count, 2))


def test_a_video_of_all_frames_that_begins_with_the_start(world: World) -> None:
    told: list[tuple[int, int]] = []
    video = world.rollout(picture(), deeds(20), progress=lambda done, total: told.append((done, total)))
    assert video.frames.shape == (21, 64, 64, 3) and video.fps == 12
    assert (video.frames[0] == picture()).all()
    assert told == [(i, 5) for i in range(1, 6)]


def test_same_seed_same_rollout_bit_for_bit_and_another_seed_another(world: World) -> None:
    first, again, other = (world.rollout(picture(), deeds(16), seed=seed).frames for seed in (3, 3, 4))
    assert (first == again).all()
    assert (first != other).any()


def test_actions_matter_from_the_frame_they_act_on(world: World) -> None:
    changed = deeds(16)
    changed[8:] *= -1
    first, other = (world.rollout(picture(), actions).frames for actions in (deeds(16), changed))
    assert (first[:9] == other[:9]).all()
    assert (first[9:13] != other[9:13]).any()


def test_action_by_action_is_the_same_as_all_at_once(world: World) -> None:
    rollout = Rollout(world, [picture()], [7])
    pieces = [rollout.step(deeds(16)[None, i : i + 4]) for i in range(0, 16, 4)]
    assert (np.concatenate(pieces, 1)[0] == world.rollout(picture(), deeds(16), seed=7).frames[1:]).all()


def test_a_copy_does_not_depend_on_those_beside_it(world: World) -> None:
    """In latents, to 1e-4, with copies of different ages and some that stand still."""
    together = Rollout(world, [picture(i) for i in range(4)], [10, 11, 12, 13])
    together.step(np.stack([deeds(8, i) for i in range(4)]))
    together.restart([1], [picture(8)], [20])
    together.step(np.stack([deeds(4, 1), deeds(4, 5)]), rows=[1, 3])
    frames = together.step(np.stack([deeds(4, 6), deeds(4, 7)]), rows=[3, 0])

    alone = Rollout(world, [picture(3)], [13])
    for actions in (deeds(8, 3), deeds(4, 5)):
        alone.step(actions[None])
    expected = alone.step(deeds(4, 6)[None])
    assert (together._past[3] - alone._past[0]).abs().max() < 1e-4
    assert np.abs(frames[0].astype(int) - expected[0].astype(int)).max() <= 1
    renewed = Rollout(world, [picture(8)], [20])
    renewed.step(deeds(4, 1)[None])
    assert (together._past[1] - renewed._past[0]).abs().max() < 1e-4


def test_latents_are_decoded_as_one_stream(world: World) -> None:
    """The frames of a rollout are those of all its latents decoded together, not of pieces."""
    rollout, kept = Rollout(world, [picture()], [0]), []
    kept.append(rollout._past[0][:, :, -1:])
    frames = []
    for i in range(0, 12, 4):
        frames.append(rollout.step(deeds(12)[None, i : i + 4])[0])
        kept.append(rollout._past[0][:, :, -1:])
    with torch.no_grad():
        whole = world.model.vae.decode(torch.cat(kept, 2))[0].permute(1, 2, 3, 0)
    levels = ((whole + 1) * 127.5).clamp(0, 255).numpy()[1:]
    assert np.abs(np.concatenate(frames) - levels).max() < 0.51


def test_open_ended_in_constant_memory(world: World) -> None:
    rollout = Rollout(world, [picture()], [0])
    for _ in range(4):
        rollout.step(deeds(4)[None])
    tracemalloc.start()
    held = list(rollout._stream._past.values())  # type: ignore[union-attr]
    before = sum(tensor.numel() for tensor in held), tracemalloc.get_traced_memory()[0]
    for _ in range(20):
        rollout.step(deeds(4)[None])
    after = sum(t.numel() for t in rollout._stream._past.values()), tracemalloc.get_traced_memory()[0]  # type: ignore[union-attr]
    tracemalloc.stop()
    assert after[0] == before[0] and rollout._past[0].shape[2] == 3
    assert after[1] - before[1] < 200_000


def test_a_start_of_several_frames_is_the_past(world: World) -> None:
    clip = Video(np.stack([picture(i) for i in range(12)]), 12.0)
    rollout = Rollout(world, [clip], [0])
    assert rollout._past[0].shape[2] == 3  # 9 frames
    still = Rollout(world, [picture(11)], [0])
    assert still._past[0].shape[2] == 1
    assert (rollout.step(deeds(4)[None]) != still.step(deeds(4)[None])).any()


def test_the_published_way_draws_chunks_and_encodes_the_last_frame_anew(chunked: World) -> None:
    rollout = Rollout(chunked, [picture()], [0])
    assert rollout.frames_a_step == 12
    frames = rollout.step(deeds(12)[None])
    assert frames.shape == (1, 12, 64, 64, 3)
    pixels = torch.from_numpy(frames[:, -1:].transpose(0, 4, 1, 2, 3).copy()).float() / 127.5 - 1
    with torch.no_grad():
        assert torch.allclose(rollout._past[0], chunked.model.vae.encode(pixels), atol=1e-5)
    with pytest.raises(InputError, match="multiple of 12"):
        rollout.step(deeds(8)[None])


def test_what_is_left_over_is_left_out_and_said(chunked: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(chunked.rollout(picture(), deeds(14))) == 13
    assert "last 2 of 14 actions are left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (np.zeros((4, 3)), "allowed is [N, 2]"),
        (np.zeros(4), "allowed is [N, 2]"),
        (np.zeros((3, 2)), "at least 4"),
        (np.full((4, 2), np.nan), "not finite"),
    ],
)
def test_refuses_actions_that_cannot_be(world: World, actions: np.ndarray, message: str) -> None:
    with pytest.raises(InputError) as caught:
        world.rollout(picture(), actions)
    assert message in str(caught.value)


def test_refuses_a_model_without_actions(tiny_folder: Path) -> None:
    with pytest.raises(InputError, match="takes no actions"):
        load(tiny_folder).rollout(picture(), deeds(4))


def test_refuses_starts_without_seeds(world: World) -> None:
    with pytest.raises(InputError, match="1 starts and 2 seeds"):
        Rollout(world, [picture()], [0, 1])


def test_generation_by_words_warns_that_it_knows_actions(world: World) -> None:
    with pytest.warns(UserWarning, match="trained on actions, without words"):
        world.request("a red ball falls")
