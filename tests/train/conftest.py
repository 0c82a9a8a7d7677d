"""Synthetic clips (a square that moves) and tiny recipes for the tests of training."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orrery.video import Video

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 70, 230), "yellow": (230, 210, 40)}


def write_synthetic(root: Path, seeds: list[int], frames: int = 5, size: int = 16) -> None:
    """A dataset in the layout of `orrery sim`: a coloured 6x6 square moves left or right on grey."""
    root.mkdir(parents=True, exist_ok=True)
    with open(root / "index.jsonl", "a", encoding="utf-8") as index:
        for seed in seeds:
            rng = np.random.default_rng(seed)
            name = list(COLOURS)[seed % len(COLOURS)]
            side = ("left", "right")[seed // len(COLOURS) % 2]
            top, begin = int(rng.integers(0, size - 6)), 0 if side == "right" else size - 6
            clip, ids = np.full((frames, size, size, 3), 90, np.uint8), np.zeros((frames, size, size), np.uint8)
            for t in range(frames):
                x = begin + (2 * t if side == "right" else -2 * t)
                clip[t, top : top + 6, x : x + 6] = COLOURS[name]
                ids[t, top : top + 6, x : x + 6] = 1
            folder = root / f"drop-{seed:07d}"
            folder.mkdir()
            Video(clip, 10).save(folder / "rgb.mp4", crf=1, pixel_format="yuv444p")
            np.savez_compressed(folder / "segmentation.npz", front=ids)
            np.savez_compressed(folder / "depth.npz", front=np.where(ids > 0, 1.0, 2.0).astype(np.float16))
            caption = f"a {name} square moves to the {side}"
            line = {"id": folder.name, "scene": "drop", "seed": seed, "caption": caption, "frames": frames, "fps": 10.0}
            index.write(json.dumps(line) + "\n")


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 training clips and 2 held-out ones (seeds 1000 and 1001)."""
    root = tmp_path_factory.mktemp("clips") / "squares"
    write_synthetic(root, [*range(8), 1000, 1001])
    return root


@pytest.fixture
def more_clips() -> Callable[[Path, list[int]], None]:
    """Append clips of some seeds to a dataset."""
    return write_synthetic


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Recipes set the number of threads; other tests get theirs back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run_tables(root: Path, out: Path, steps: int) -> dict[str, Any]:
    return {
        "out": str(out),
        "steps": steps,
        "seed": 3,
        "device": "cpu",
        "threads": 1,
        "batch": 3,
        "data": {"root": str(root), "heldout_from": 1000, "frames": 5, "size": [16, 16]},
        "optimizer": {"name": "muon", "lr": 3e-3, "matrix_lr": 3e-3, "warmup": 3, "ema": 0.9},
        "checkpoint": {"seconds": 1000.0, "steps": 4, "keep": 2},
        "validation": {"steps": 1000, "clips": 2, "sheet": 1},
        "log": {"steps": 1},
    }


def toml(tree: dict[str, Any]) -> str:
    """A two-level dict as TOML; JSON's scalars, strings and lists are TOML's."""
    scalars = {key: value for key, value in tree.items() if not isinstance(value, dict)}
    lines = [f"{key} = {json.dumps(value)}" for key, value in scalars.items()]
    for name, table in tree.items():
        if isinstance(table, dict):
            plain = {key: value for key, value in table.items() if not isinstance(value, dict)}
            lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in plain.items())]
            for inner, values in table.items():
                if isinstance(values, dict):
                    lines += [f"[{name}.{inner}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    return "\n".join(lines) + "\n"


@pytest.fixture
def write_recipe(dataset: Path, tmp_path: Path) -> Callable[..., Path]:
    """write_recipe("vae", "flow" or "control", out, steps, trained=VAE or base model, **top-level keys) -> a tiny
    recipe's path."""

    def write(task: str, out: Path, steps: int = 12, trained: Path | None = None, **more: Any) -> Path:
        tree = {"task": task} | run_tables(dataset, out, steps)
        if task == "vae":
            tree["vae"] = {"preset": "mini", "override": {"base": 12, "multipliers": [1, 2], "res_blocks": 1}}
            tree["loss"] = {"foreground": 3.0}
            tree["statistics_clips"] = 8
        elif task == "control":
            tree["base"] = str(trained)
            tree["control"] = {"kind": "seg", "blocks": 2, "every": 1, "channels": 16}
            tree["loss"] = {"text_dropout": 0.0}
            tree["validation"] = tree["validation"] | {"sample_steps": 2}
        else:
            tree["latents"] = {"vae": str(trained)}
            small = {"width": 32, "depth": 2, "heads": 2, "adaln_rank": 8, "context_dim": 16}
            tree["transformer"] = {"preset": "mini", "override": small}
            words = {
                "hidden_size": 16,
                "layers": 2,
                "heads": 2,
                "kv_heads": 1,
                "mlp": 32,
                "vocab_size": 32,
                "length": 12,
            }
            tree["text"] = {"preset": "mini", "override": words}
            tree["loss"] = {"draws": 2}
            tree["validation"] = tree["validation"] | {"sample_steps": 2}
        for key, value in more.items():
            tree[key] = tree[key] | value if isinstance(value, dict) else value
        path = tmp_path / f"{task}-{out.name}.toml"
        path.write_text(toml(tree), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def tiny_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with a VAE of random weights and known statistics, as a trained one would lie there."""
    from orrery.nn.vae import VAE, VAEConfig
    from orrery.train.export import export_vae

    torch.manual_seed(0)
    shape = {"patch": 4, "temporal_patch": 4, "factorised": True, "attention": False}
    vae = VAE(VAEConfig(base=8, multipliers=(1, 2), res_blocks=1, temporal_down=(False,), **shape))  # type: ignore[arg-type]
    vae.with_statistics([0.0] * 16, [0.5] * 16)
    folder = tmp_path_factory.mktemp("vae") / "model"
    export_vae(vae, folder, {"recipe": "none"})
    return folder
