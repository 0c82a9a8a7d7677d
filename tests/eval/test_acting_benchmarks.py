"""The arithmetic of the benchmarks about acting, and what their pages say, on numbers that are made up."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from orrery.env.improve import NUMBERS
from orrery.eval.acting import MEASURES, WAYS, Horizons


def script(name: str) -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_horizons_says_what_is_clearly_better() -> None:
    acting, rng = script("acting"), np.random.default_rng(0)
    values = {way: {m: 10 + rng.normal(0, 0.1, (12, 2)) for m in MEASURES} for way in WAYS}
    values["model"]["cube"] = values["model"]["cube"] - [5.0, 0.0]  # better by 5 cm at first, then no more
    moved = np.full((12, 2), 10.0)
    moved[:4] = 0
    found = acting.summary(Horizons(values, moved, {}))
    assert found["moving"] == 8
    assert found["cube"]["mean"]["model"][0][0] == pytest.approx(5, abs=0.2)
    low = found["cube"]["gain_low"]["shuffled"]
    assert low[0] > 4 and low[1] < 0.5
    page = acting.markdown({"about": "ABOUT", "steps": 2, "summary": found})
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| cube, cm | model ")]
    assert float(rows[0][2].strip(" |")) == pytest.approx(5, abs=0.2) and "ABOUT" in page
    assert "the 8 episodes in which it moves" in page


def test_the_page_of_practice_counts_true_and_imagined_steps() -> None:
    imagine = script("imagine")
    rounds = [{"steps": 70.0, "mean return": 0.5, "success": 0.25}]
    search = {"numbers": [0.5] * len(NUMBERS), "rounds": rounds, "steps": 70}
    result = {
        "about": "ABOUT",
        "tests": {"before": [0] * 10, "model": [1] * 5 + [0] * 5, "truth": [1] * 10},
        "inside": {"before": [0], "model": [1], "truth": [1]},
        "searches": {"model": search, "truth": search | {"steps": 80}},
    }
    page = imagine.markdown(result).splitlines()
    line = next(line for line in page if line.startswith("| improved in the model "))
    assert [cell.strip() for cell in line.strip("|").split("|")][1:] == ["0.50", "0.24 to 0.76", "1.00", "0", "70"]
    line = next(line for line in page if line.startswith("| improved in MuJoCo"))
    assert line.strip("|").split("|")[4].strip() == "80"


def test_what_was_made_is_kept(tmp_path: Path) -> None:
    imagine, made = script("imagine"), []

    def make() -> dict[str, int]:
        made.append(1)
        return {"wins": 3}

    assert imagine.kept(tmp_path / "part.json", make) == imagine.kept(tmp_path / "part.json", make) == {"wins": 3}
    assert made == [1]
