"""The benchmark's arithmetic: means over clips, and the gate."""

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).parents[2] / "benchmarks" / "mini_quality.py"
    spec = importlib.util.spec_from_file_location("mini_quality", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(psnr, error, radius=5.0):
    return {"psnr": [psnr, psnr], "ssim": [0.9, 0.9], "error_px": [[1.0, error]], "radius_px": [[radius, radius]],
            "count_right": [True, True], "count_kept": True, "colour_right": [True], "shape_right": [True],
            "told": [], "went": [True]}  # fmt: skip


def summary(script, model, copy, empty, error):
    rows = {"model": row(model, error), "copy": row(copy, 9), "empty": {"psnr": [empty, empty], "ssim": [0.9, 0.9]}}
    records = [{"given": {"2": rows}}]
    methods = {m: script.summarise(records, 2, m) for m in rows}
    return {"all": {"2": methods}, "one object": {"2": methods}}


def test_means(script):
    records = [{"given": {"2": {"model": row(20, 2.0)}}}, {"given": {"2": {"model": row(30, None)}}}]
    numbers = script.summarise(records, 2, "model")
    assert numbers["psnr"] == 25 and numbers["psnr_by_frame"] == [25, 25]
    assert numbers["last_centroid_px"] == 2.0 and numbers["last_centroid_radii"] == pytest.approx(0.4)
    assert numbers["centroid_px"] == pytest.approx(4 / 3)  # a hidden object is not asked about
    assert numbers["told"] is None and numbers["count_kept"] == 1.0


def test_the_gate_is_passed_only_if_everything_is_good_enough(script):
    assert all(line["passed"] for line in script.gate(summary(script, 28, 22, 23.5, 4.9), 31.0))
    beyond = [((28, 24.5, 22, 4.9), 32), ((28, 22, 24.5, 4.9), 32), ((28, 22, 22, 5.1), 32), ((28, 22, 22, 4), 30.9)]
    for bad, vae in beyond:
        lines = script.gate(summary(script, *bad), vae)
        assert 1 <= sum(not line["passed"] for line in lines) <= 2


def test_an_interval_stands_beside_the_centroid_error(script):
    records = [{"given": {"2": {"model": row(20, error)}}} for error in (1.0, 2.0, 6.0, 7.0)]
    low, high = script.summarise(records, 2, "model")["last_centroid_radii_interval"]
    assert 0.2 <= low < 0.8 < high <= 1.4
    line = {"what": "error", "measured": 0.8, "needed": "< 1", "passed": True, "interval": [low, high]}
    assert script.gate_line(line) == f"- PASS: error: 0.8 (< 1, 95 % {low:.3g} to {high:.3g})"


def test_several_futures(script):
    def clip(radii, values, nearest):
        return {"radii": radii, "psnr": values, "nearest": nearest}

    hidden = clip([[], []], [20.0, 20.0], 0)  # truth does not show the thing at the end
    found = script.summarise_futures(
        [clip([[1.0], [3.0]], [20.0, 24.0], 1), clip([[2.0, 0.0], [0.0, 0.0]], [30.0, 26.0], 0), hidden]
    )
    assert found == {"clips": 2, "samples": 2, "radii": 1.25, "radii_nearest": 2.0, "radii_best": 0.5,
                     "psnr": 25.0, "psnr_nearest": 27.0, "psnr_best": 27.0}  # fmt: skip
    lines = script.futures_lines({"all": {"futures": found}, "push": {"futures": {}}})
    assert lines[-1] == "| all | 2 | 1.25 | 2.00 | 0.50 | 25.00 | 27.00 | 27.00 |"
    assert script.summarise_futures([hidden]) == {}
    assert script.futures_lines({"all": {}}) == []


def test_the_spread_of_samples(script):
    import numpy as np

    videos = [np.full((2, 4, 4, 3), level, np.uint8) for level in (0, 100, 110)]
    rows = [{"psnr": [20.0, 22.0], "error_px": [[9.0, 4.0], [1.0, None]], "radius_px": [[5.0, 8.0], [5.0, 5.0]]}] * 3
    assert script.spread_of(videos, rows) == {"radii": [[0.5]] * 3, "psnr": [21.0] * 3, "nearest": 1}


def test_each_clip_has_its_own_noise(script):
    from types import SimpleNamespace

    seeds = [script.noise_seed(SimpleNamespace(name=f"push-{number}"), seed, sample)
             for number in (1_000_000, 1_000_001) for seed in (0, 1) for sample in range(4)]  # fmt: skip
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**32 for seed in seeds)
