"""Recipes: the shipped ones are valid, faults are told in one line with key, value and what is allowed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from orrery.errors import InputError
from orrery.train.recipe import FlowRecipe, VAERecipe, changed_keys, load_recipe, parse_recipe, recipe_json

RECIPES = Path(__file__).parents[2] / "recipes"


def tree(**more: Any) -> dict[str, Any]:
    return {"task": "vae", "out": "o", "steps": 5, "data": {"root": "d", "heldout_from": 9}} | more


@pytest.mark.parametrize("name", ["mini", "mini128"])
def test_shipped_recipes_are_valid_and_belong_together(name: str) -> None:
    vae, flow = load_recipe(RECIPES / f"{name}-vae.toml"), load_recipe(RECIPES / f"{name}-dit.toml")
    assert isinstance(vae, VAERecipe) and isinstance(flow, FlowRecipe)
    assert flow.latents.vae == vae.out / "model"
    assert (flow.data.root, flow.data.heldout_from, flow.data.size) == (
        vae.data.root,
        vae.data.heldout_from,
        vae.data.size,
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"optimizer": {"lr": float("nan")}}, "optimizer.lr = nan; allowed: a number, not nan"),
        ({"steps": "many"}, "steps = 'many'; allowed: a valid integer$"),
        ({"stepz": 5}, r"unknown key stepz = 5; allowed: out, steps, seed"),
        (
            {"optimizer": {"learning_rate": 1}},
            r"unknown key optimizer\.learning_rate = 1; allowed: name, lr, matrix_lr",
        ),
        ({"steps": 0}, r"steps = 0; allowed: greater than or equal to 1"),
        ({"optimizer": {"lr": -1.0}}, r"optimizer\.lr = -1\.0; allowed: greater than 0"),
        ({"optimizer": {"decay": "step"}}, r"optimizer\.decay = 'step'; allowed: 'linear', 'cosine' or 'none'"),
        ({"optimizer": {"name": "muon"}}, r"optimizer: name = 'muon' with matrix_lr = None"),
        ({"data": {"root": "d"}}, r"missing key data\.heldout_from"),
        ({"data": {"root": "d", "heldout_from": 9, "frames": 16}}, r"data: frames = 16; allowed: 4k \+ 1"),
        ({"task": "vea"}, r"task = 'vea'; allowed: vae, flow, control"),
    ],
)
def test_a_fault_is_one_line_with_key_value_and_what_is_allowed(more: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse_recipe(tree(**more), "my.toml")
    assert str(caught.value).startswith("my.toml: ") and "\n" not in str(caught.value)


def test_condition_probabilities_must_sum_to_one() -> None:
    flow = tree(task="flow", latents={"vae": "v"}, loss={"condition": [0.5, 0.5, 0.5]})
    with pytest.raises(InputError, match=r"condition = \[0\.5, 0\.5, 0\.5\] sums to 1\.5"):
        parse_recipe(flow)


def test_set_changes_values_as_toml_or_bare_words(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text('task = "vae"\nout = "o"\nsteps = 5\n[data]\nroot = "d"\nheldout_from = 9\n')
    recipe = load_recipe(path, ["steps=7", "optimizer.lr=1e-4", "out=runs/a b", "data.scenes=['drop']"])
    assert (recipe.steps, recipe.optimizer.lr, str(recipe.out), recipe.data.scenes) == (7, 1e-4, "runs/a b", ("drop",))
    with pytest.raises(InputError, match="--set 'steps'"):
        load_recipe(path, ["steps"])
    with pytest.raises(InputError, match="steps is no table"):
        load_recipe(path, ["steps.more=1"])


def test_unreadable_recipes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        load_recipe(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("steps = = 3")
    with pytest.raises(InputError, match="is not TOML"):
        load_recipe(tmp_path / "bad.toml")


def test_changed_keys_are_found_in_tables_and_resumable_ones_pass() -> None:
    before = recipe_json(parse_recipe(tree()))
    after = recipe_json(parse_recipe(tree(steps=9, out="p", batch=4, loss={"kl": 1e-4}, checkpoint={"keep": 9})))
    assert changed_keys(before, after) == [("batch", 8, 4), ("loss.kl", 1e-5, 1e-4)]


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_valid_and_their_models_fit_the_package(path: Path) -> None:
    from orrery.nn.control import ControlBranch, ControlConfig
    from orrery.nn.dit import PRESETS as DITS
    from orrery.nn.dit import DiT
    from orrery.nn.preview import PRESETS as PREVIEWS
    from orrery.nn.preview import Preview
    from orrery.nn.vae import PRESETS as VAES
    from orrery.nn.vae import VAE
    from orrery.train.networks import configure
    from orrery.train.recipe import ActionRecipe, ControlRecipe, DecoderRecipe, PreviewRecipe, VAERecipe
    from orrery.weights.sources import find_model

    recipe = load_recipe(path)
    with torch.device("meta"):
        if isinstance(recipe, VAERecipe):
            network: torch.nn.Module = VAE(configure(VAES, recipe.vae.preset, recipe.vae.override, "vae"))
            most = 12e6
        elif isinstance(recipe, ControlRecipe):
            control = recipe.control
            config = ControlConfig(control.blocks, control.every, control.channels)
            network = ControlBranch(find_model(recipe.base).config.transformer, config)
            most = 8e6  # each of four
        elif isinstance(recipe, ActionRecipe):
            base = find_model(recipe.base).config.transformer
            network = DiT(replace(base, depth=len(recipe.blocks), actions=8))
            most = 13.2e6
        elif isinstance(recipe, DecoderRecipe):
            vae = VAE(find_model(recipe.base).config.vae)
            tuned = [module for name, module in vae.named_modules() if name in recipe.parts]
            network, most = torch.nn.ModuleList(tuned), 1.2e6
        elif isinstance(recipe, PreviewRecipe):
            table = recipe.preview
            network, most = Preview(configure(PREVIEWS, table.preset, table.override, "preview")), 0.5e6
        else:
            table = recipe.transformer
            network = DiT(configure(DITS, table.preset, table.override, "transformer"))
            most = 47e6
    assert sum(p.numel() for p in network.parameters()) * 2 < most, "in fp16, of the package's 60 MB"
