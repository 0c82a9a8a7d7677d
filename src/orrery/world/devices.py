"""On which device and in which dtype a model computes, where nobody says it."""

import torch

from orrery.errors import InputError, note
from orrery.weights import ModelFiles
from orrery.world.plan import Shape, device_bytes, measure

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(device: torch.device | str | None) -> torch.device:
    """The device asked for; default the GPU if torch sees one, else the CPU. InputError: it is not there."""
    try:
        found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0].partition(". ")[0]  # torch adds a page
        raise InputError(f"device {str(device)!r} is not available: {why}") from error
    if found.type == "meta":
        raise InputError("device 'meta' holds no numbers; allowed are cpu, cuda, cuda:1, ...")
    return found


def pick_dtype(dtype: torch.dtype | str | None, files: ModelFiles, device: torch.device) -> torch.dtype:
    """The dtype asked for, or its name; default bfloat16 on a GPU and float32 on a CPU, where that leaves room."""
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise InputError(f"dtype is {dtype!r}; allowed are {', '.join(DTYPES)}")
        return DTYPES[dtype]
    if dtype is not None:
        return dtype
    if device.type == "cuda":
        return torch.bfloat16
    shape = Shape(files.config.resolution, files.config.frames)
    if files.config.transformer.width > 1000 and measure(
        files.config, shape, torch.float32, torch.float32
    ).transformer > (device_bytes(device) // 2):
        note("bfloat16: in float32 the weights alone would fill more than half of this machine's memory")
        return torch.bfloat16
    return torch.float32
