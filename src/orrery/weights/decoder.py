"""A decoder of one's own: some weights of a shared VAE's decoder, tuned to the pictures of one model.

The encoder stays, so latents are those of the shared VAE and whatever was trained on them goes on; what changes is how
they look. The weights are a file in the model's folder, and its config says `own_decoder`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from orrery.errors import InputError
from orrery.files import atomic_file
from orrery.weights.config import read_config
from orrery.weights.parts import DECODER
from orrery.weights.tensors import read_tensors

PREFIX = "decoder."


def decoder_weights(path: Path, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the file at `path`, which stand in place of those of the VAE `whole`.

    Raises:
        InputError: it cannot be read; a key that is no weight of the decoder, or of another shape.
    """
    weights = dict(read_tensors(path))
    for key, value in weights.items():
        if not key.startswith(PREFIX) or key not in whole:
            raise InputError(f"{path} holds {key}, which is no weight of the VAE's decoder")
        if value.shape != whole[key].shape:
            raise InputError(f"{path}: {key} is {list(value.shape)}, the VAE's is {list(whole[key].shape)}")
    return weights


def save_decoder(
    directory: Path, weights: Mapping[str, Tensor], training: Mapping[str, Any], dtype: torch.dtype = torch.float16
) -> Path:
    """Put tuned weights of the decoder into a model folder that shares its VAE; those that are there are replaced.

    The weights are written first, then config.json, each whole or not at all. All else in config.json stays as it is.

    Args:
        weights: by their names in the VAE, all of the decoder.
        training: how they were tuned; JSON values. Becomes `training["decoder"]` of the config.

    Raises:
        InputError: no model folder, or one that has a VAE of its own; it cannot be written.
        ValueError: a weight is not finite in `dtype`, or not of the decoder.
    """
    folder = Path(directory)
    if "vae" not in read_config(folder).shared:
        raise InputError(f"{folder} has a VAE of its own; a decoder is tuned for a model that shares one")
    stored = {key: value.detach().to("cpu", dtype).contiguous().clone() for key, value in weights.items()}
    for key, value in stored.items():
        if not key.startswith(PREFIX) or not bool(value.isfinite().all()):
            raise ValueError(f"{key} is no finite weight of the decoder in {str(dtype).removeprefix('torch.')}")
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))  # as they are: no default is added
    values["training"] = dict(values.get("training", {})) | {"decoder": dict(training)}
    values["own_decoder"] = True
    with atomic_file(folder / DECODER) as partial:
        partial.write_bytes(save(stored, {"format": "pt"}))
    with atomic_file(folder / "config.json") as partial:
        partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return folder / DECODER
