"""Trained weights to a model directory, and the trained VAE back from one."""

import hashlib
import json
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from orrery.data.clips import ClipEntry
from orrery.errors import InputError
from orrery.nn.vae import VAE, VAEConfig
from orrery.train.checkpoint import write_atomically, write_text
from orrery.train.recipe import FlowRecipe
from orrery.weights.config import ModelConfig, Sampling
from orrery.weights.store import Model, save_model


def commit() -> str:
    """The commit of the code that runs, `-dirty` if it was changed since; "unknown" outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def seeds_by_scene(entries: Sequence[ClipEntry]) -> str:
    """What a list of clips is, in words: `drop 4320 (seeds 0..4319), push ...`."""
    scenes: dict[str, list[int]] = {}
    for entry in entries:
        scenes.setdefault(entry.scene, []).append(entry.seed)
    return ", ".join(f"{name} {len(s)} (seeds {min(s)}..{max(s)})" for name, s in sorted(scenes.items()))


def export_vae(vae: VAE, directory: Path, training: dict[str, Any]) -> None:
    """Write config.json (`vae`, `training`) and vae.safetensors (fp16) to a directory."""
    weights = {name: tensor.detach().half().cpu().contiguous() for name, tensor in vae.state_dict().items()}
    write_atomically(directory / "vae.safetensors", lambda temporary: save_file(weights, temporary))
    write_text(
        directory / "config.json", json.dumps({"vae": asdict(vae.config), "training": training}, indent=2) + "\n"
    )


def load_vae(directory: Path) -> tuple[VAE, str]:
    """The VAE of a directory that `export_vae` or `export_model` wrote, fp32, frozen; and a hash of it.

    Raises:
        InputError: no such VAE there.
    """
    config_path, weights_path = directory / "config.json", directory / "vae.safetensors"
    if not config_path.is_file() or not weights_path.is_file():
        raise InputError(
            f"no VAE in {directory}: needs config.json and vae.safetensors; train recipes/mini-vae.toml first"
        )
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))["vae"]
        weights = load_file(weights_path)
        vae = VAE(VAEConfig(**config))
        vae.load_state_dict({name: tensor.to(torch.float32) for name, tensor in weights.items()})
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise InputError(f"the VAE in {directory} cannot be read: {str(error).splitlines()[0]}") from None
    digest = hashlib.sha256(weights_path.read_bytes() + json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]
    if not vae.config.latent_std:
        raise InputError(f"the VAE in {directory} has no latent statistics; export it with orrery train --export")
    return vae.eval().requires_grad_(False), digest


def vae_training(directory: Path) -> dict[str, Any]:
    """How the VAE of a directory was trained, as its config.json tells."""
    return json.loads((directory / "config.json").read_text(encoding="utf-8")).get("training", {})


def export_model(
    recipe: FlowRecipe, model: nn.Module, vae: VAE, fps: float, directory: Path, training: dict[str, Any]
) -> None:
    """Write a whole model directory (see orrery.weights.store): transformer, text encoder and VAE, fp16, and a card."""
    transformer, text = model["transformer"], model["text"]  # type: ignore[index]
    sampling = Sampling(
        solver="unipc",
        schedule="shift",
        shift=recipe.loss.shift,
        exact_times=True,
        steps=recipe.validation.sample_steps,
        guidance=recipe.validation.guidance,
        conditional_timestep=recipe.loss.conditional_timestep,
        negative_prompt=None,
    )
    config = ModelConfig(
        transformer=transformer.config,
        vae=vae.config,
        text=text.config,
        sampling=sampling,
        fps=fps,
        frames=recipe.data.frames,
        resolution=recipe.data.size,
        training=training,
    )
    directory.parent.mkdir(parents=True, exist_ok=True)
    save_model(directory, Model(config, transformer, vae, text), model_card(directory.name, config))


def _what(config: ModelConfig) -> str:
    if config.actions is None:
        return f"{config.frames} frames at {config.fps:g} fps; text, image or video (0, 1 or 2 given latent frames)"
    told = config.actions
    return (
        f"{config.fps:g} fps; told {', '.join(told.names)} of every frame; windows of {told.window} latent frames, "
        f"up to {told.given} given; VAE and text encoder are those of {config.shared.get('vae', 'its base')}"
    )


def model_card(name: str, config: ModelConfig) -> str:
    """README.md of a trained model: what it is, what it was trained on and how, its held-out losses."""
    lines = [
        f"# orrery-{name}",
        "",
        "A small world model of the Cosmos-Predict2.5 architecture, trained by Orrery on its own MuJoCo worlds.",
        f"{config.resolution[0]}x{config.resolution[1]} pixels, {_what(config)}. Apache-2.0.",
    ]
    parts = {"Transformer and text encoder": config.training, "VAE": config.training.get("vae", {})}
    if config.actions is not None:
        parts = {"Transformer": config.training, "Decoder of the VAE": config.training.get("decoder", {})}
    branches = config.training.get("controls", {})
    parts |= {f"Control branch: {kind}": branches[kind] for kind in config.controls if kind in branches}
    for title, training in parts.items():
        lines += ["", f"## {title}", "", "| | |", "| --- | --- |"]
        for key, value in training.items():
            if key == "validation":
                value = ", ".join(f"{which} {number:.4g}" for which, number in value.items())
            if key not in ("vae", "controls", "decoder"):
                lines.append(f"| {key} | {value} |")
    return "\n".join(lines) + "\n"
