"""A World from anything that holds a model: which files, on which device, in what, how fast."""

import os
from collections.abc import Sequence
from typing import Any

import torch

from orrery.weights import find_model, read_lora
from orrery.weights.branches import Controls
from orrery.weights.sources import transformer_shapes
from orrery.world.devices import DTYPES, pick_device, pick_dtype
from orrery.world.networks import Networks
from orrery.world.speed import Speed, speed_of
from orrery.world.world import World


def load(
    name_or_path: str | os.PathLike[str] = "mini",
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    *,
    vae: str | os.PathLike[str] | None = None,
    text: str | os.PathLike[str] | None = None,
    like: str | None = None,
    conventions: str | None = None,
    loras: Sequence[str | os.PathLike[str] | tuple[str | os.PathLike[str], float]] = (),
    controls: Controls | None = None,
    image: str | os.PathLike[str] | None = None,
    placement: str | None = None,
    embeddings: str | os.PathLike[str] | None = None,
    speed: Speed | str | None = None,
) -> World:
    """A World from anything that holds a model.

    Args:
        name_or_path: a name of the catalogue, a model folder, an official .pt, a diffusers directory, or OWNER/NAME or
            OWNER/NAME@REVISION of a hub repository. What is not on this machine is downloaded when it is needed.
        device: default the GPU if torch sees one, else the CPU.
        dtype: of transformer and text encoder; default bfloat16 on a GPU and float32 on a CPU. The latents and the
            solver are float32 always; the VAE is, but for published models on a GPU.
        vae, text: take these parts from elsewhere: a file, a folder of diffusers or transformers, a model folder.
        like: for an official .pt, the named model whose sampling it follows (default: its size's published one).
        conventions: "official" or "diffusers" numerics instead of those that come with the source.
        loras: paths of LoRA files, or (path, scale): merged into the transformer, in that order.
        controls: control branches: kinds ("edge", "blur", "depth", "seg") or kind -> where its branch is; default all
            that the model has. Each is read when it first acts, and the base is held once for all of them.
        image: take the encoder of reference images from this folder.
        placement: "resident", "stages" or "blocks" instead of what the plan chooses (see `orrery plan`).
        embeddings: a folder that keeps text embeddings, so that a prompt is encoded once.
        speed: how it is made faster: "exact" (default), "balanced" or "fast", with what is to be different after it,
            such as "fast compile cache=0.02"; or a `Speed`, which says what there is. `dtype` goes before its dtype.

    Raises:
        InputError: an unknown name, a folder that is no model, weights that do not fit their config, a device that
            this torch does not have.
    """
    options: dict[str, Any] = dict(vae=vae, text=text, like=like, conventions=conventions, controls=controls)
    files = find_model(name_or_path, image=image, **options)
    where = pick_device(device)
    speed = speed_of(speed, files.config, where)
    asked = speed.dtype if dtype is None else None
    numbers = pick_dtype(dtype if asked is None else asked, files, where)
    on_cpu = DTYPES["float32" if asked is None else asked]
    vae_dtype = DTYPES[files.config.vae_dtype] if where.type == "cuda" else on_cpu
    shapes = transformer_shapes(files.config.transformer) if loras else {}
    pairs = [each if isinstance(each, tuple) else (each, 1.0) for each in loras]
    adapters = [read_lora(path, shapes, scale) for path, scale in pairs]
    networks = Networks(files, where, numbers, vae_dtype, adapters, speed)
    world = World(networks, name=str(name_or_path), placement=placement, embeddings=embeddings)
    if world.plan(files.config.resolution, files.config.frames).placement == "resident":
        networks.load_all()
    return world
