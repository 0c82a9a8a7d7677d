"""Acting on a GPU: the same as on the CPU, bit for bit by seed, and a copy in a batch as alone."""

from pathlib import Path

import numpy as np
import pytest
import torch

from orrery.world import Rollout, load

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def start(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (64, 64, 3)).astype(np.uint8)


@pytest.mark.parametrize("kind", ["acting_folder", "chunked_folder"])
def test_a_rollout_is_that_of_the_cpu(kind: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(kind)
    actions = np.random.default_rng(0).uniform(-1, 1, (12, 2))
    frames = [load(folder, device, "float32").rollout(start(0), actions).frames for device in ("cpu", "cuda")]
    difference = np.abs(frames[0].astype(int) - frames[1].astype(int))
    assert difference.mean() < 0.5 and np.percentile(difference, 99) <= 2


def test_same_seed_same_rollout_and_copies_are_apart(acting_folder: Path) -> None:
    world, actions = load(acting_folder, "cuda", "float32"), np.random.default_rng(0).uniform(-1, 1, (64, 8, 2))
    runs = [Rollout(world, [start(i) for i in range(64)], list(range(64))).step(actions) for _ in range(2)]
    assert (runs[0] == runs[1]).all()
    together = Rollout(world, [start(i) for i in range(64)], list(range(64)))
    together.step(actions)
    alone = Rollout(world, [start(7)], [7])
    alone.step(actions[7:8])
    assert (together._past[7] - alone._past[0]).abs().max() < 1e-3
