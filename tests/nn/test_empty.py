"""Networks without numbers."""

import subprocess
import sys

import torch
from torch import nn

from orrery.nn.dit import PRESETS, DiT
from orrery.nn.empty import shapes_only
from orrery.nn.vae import PRESETS as VAES
from orrery.nn.vae import VAE


def test_every_shape_and_no_number():
    with shapes_only():
        nets = (DiT(PRESETS["mini"]), VAE(VAES["mini"]), nn.Embedding(7, 5), nn.Conv2d(3, 4, 3))
        kept = torch.zeros(3, device="cpu").normal_()
    assert all(p.is_meta for net in nets for p in net.parameters())
    assert [tuple(p.shape) for p in nets[0].parameters()] == [tuple(p.shape) for p in DiT(PRESETS["mini"]).parameters()]
    assert kept.abs().sum() > 0  # what has numbers still gets them
    assert nn.Linear(4, 4).weight.abs().sum() > 0 and not nn.Linear(4, 4).weight.is_meta


def test_loading_a_model_waits_for_nothing_that_it_does_not_need():
    code = (
        "import sys, orrery\nworld = orrery.load('mini', 'cpu')\nworld.generate('a red ball falls', steps=1)\n"
        "found = {'transformers', 'torch._dynamo', 'scipy', 'mujoco', 'cv2'} & set(sys.modules)\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
