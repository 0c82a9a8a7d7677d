"""The cards of the models that ship, and the results that they quote: of these weights and of no others."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

import orrery
from orrery.errors import InputError

MODELS = ("mini", "tabletop")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("model_card", BENCHMARKS / "model_card.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", MODELS)
def test_the_card_is_what_the_results_and_the_config_make(script: ModuleType, name: str) -> None:
    path, text = script.card(name)
    assert path.read_text(encoding="utf-8") == text, "run benchmarks/model_card.py"
    assert orrery.load(name).hash in text
    for part in ("## Data", "## Training", "## Figures", "## Known failures", "## Licence"):
        body = text.partition(f"{part}\n")[2].partition("\n## ")[0]
        assert len(body.split()) >= 5, f"{name}: {part} says nothing"


def test_a_result_of_other_weights_is_refused(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "acting.json").write_text(json.dumps({"weights": "0123456789abcdef"}), encoding="utf-8")
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    with pytest.raises(InputError, match="about weights 0123456789abcdef"):
        script.result("acting", "fedcba9876543210")
    assert script.result("acting", "0123456789abcdef")["weights"] == "0123456789abcdef"


def test_every_result_is_about_weights_that_ship() -> None:
    shipped = {orrery.load(name).hash for name in MODELS}
    about = {}
    for path in sorted((BENCHMARKS / "results").glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        about[path.name] = found.get("weights") or found.get("model_hash")
    assert {"acting.json", "mini_quality.json", "judge.json"} <= {name for name, weights in about.items() if weights}
    assert {name: weights for name, weights in about.items() if weights and weights not in shipped} == {}
