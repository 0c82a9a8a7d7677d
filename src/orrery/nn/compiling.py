"""Whether torch.compile has what it needs on this machine."""

import importlib.util
import os
import shutil

import torch


def compiler_problem(device: torch.device) -> str:
    """Why torch.compile cannot build code for a device here, or an empty string."""
    if device.type == "cuda":
        return "" if importlib.util.find_spec("triton") else "needs Triton, which is not installed"
    named = (os.environ.get("CXX", ""), "g++", "clang++", "c++")
    found = any(shutil.which(each) for each in named if each)
    return "" if found else "needs a C++ compiler, such as g++, and none was found"
