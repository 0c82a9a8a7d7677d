"""Our transformer against diffusers' CosmosTransformer3DModel: fp32, random weights, nothing left at zero (spec 8)."""

from types import SimpleNamespace

import pytest
import torch

transformer_cosmos = pytest.importorskip("diffusers.models.transformers.transformer_cosmos")

from orrery.nn.dit import Conditions, DiT, DiTConfig  # noqa: E402
from orrery.weights.layouts import diffusers_transformer_key  # noqa: E402

CONFIG = DiTConfig(width=256, depth=2, heads=2, adaln_rank=32, text_dim=96, context_dim=64)
TOLERANCE = 5e-5


def nearest_resize(x, size, interpolation):
    assert interpolation == "nearest"
    return torch.nn.functional.interpolate(x, size=size, mode="nearest")


@pytest.fixture(autouse=True)
def _without_torchvision(monkeypatch):
    """torchvision serves the oracle only to resize the padding mask, and may be missing beside a CPU torch."""
    stand_in = SimpleNamespace(
        functional=SimpleNamespace(resize=nearest_resize), InterpolationMode=SimpleNamespace(NEAREST="nearest")
    )
    monkeypatch.setattr(transformer_cosmos, "transforms", stand_in, raising=False)


def pair(config: DiTConfig) -> tuple[DiT, torch.nn.Module]:
    """Our network and the oracle with the same random weights, no tensor of them zero."""
    torch.manual_seed(0)
    ours = DiT(config).eval()
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif not parameter.any():
                parameter.normal_(std=0.5 * parameter.shape[-1] ** -0.5)
    oracle = transformer_cosmos.CosmosTransformer3DModel(
        in_channels=config.latent_channels + 1,
        out_channels=config.latent_channels,
        num_attention_heads=config.heads,
        attention_head_dim=config.head_dim,
        num_layers=config.depth,
        mlp_ratio=config.mlp_ratio,
        text_embed_dim=config.context_dim,
        adaln_lora_dim=config.adaln_rank,
        max_size=config.max_size,
        patch_size=config.patch,
        rope_scale=config.rope_ratios,
        concat_padding_mask=config.padding_mask,
        extra_pos_embed_type=None,
        use_crossattn_projection=config.text_projection,
        crossattn_proj_in_channels=config.text_dim,
        encoder_hidden_states_channels=config.context_dim,
    ).eval()
    oracle.load_state_dict({diffusers_transformer_key(k): v for k, v in ours.state_dict().items()}, strict=True)
    return ours, oracle


def compare(config: DiTConfig, per_frame: bool, size: tuple[int, int, int] = (4, 16, 20)) -> float:
    """Largest difference of the two velocities, in units of one (the velocity's own deviation is about one)."""
    ours, oracle = pair(config)
    g = torch.Generator().manual_seed(1)
    t, h, w = size
    latents = torch.randn(2, 16, t, h, w, generator=g)
    text = torch.randn(2, 24, config.text_width, generator=g)
    mask = torch.zeros(2, 1, t, h, w)
    mask[:, :, :1] = 1
    padding = (torch.rand(1, 1, 8 * h, 8 * w, generator=g) < 0.5).float() if config.padding_mask else None
    timesteps = torch.tensor([970.0, 130.0])
    if per_frame:
        timesteps = timesteps[:, None] * (1 - mask[:, 0, :, 0, 0]) + 0.1 * mask[:, 0, :, 0, 0]
    with torch.no_grad():
        velocity = ours(latents, timesteps, Conditions(text, mask, padding))
        # The oracle embeds the timestep as it comes, so it is given the scaled one.
        scaled = timesteps * 0.001
        expected = oracle(
            latents, scaled[:, None, :, None, None] if per_frame else scaled, text,
            condition_mask=mask, padding_mask=padding, return_dict=False,
        )[0]  # fmt: skip
    assert 0.3 < expected.std() < 3
    return (velocity - expected).abs().max().item()


def without_rounding(**changes) -> DiTConfig:
    return DiTConfig(**{**CONFIG.__dict__, "rope_bf16": False, **changes})


@pytest.mark.parametrize("per_frame", [False, True], ids=["shared", "per_frame"])
def test_published_layout(per_frame):
    assert compare(without_rounding(), per_frame) <= TOLERANCE


@pytest.mark.parametrize(
    "changes",
    [
        {"text_projection": False},
        {"padding_mask": False},
        {"rope_ratios": (8 / 24, 3.0, 3.0)},
        {"width": 192, "heads": 4, "rope_ratios": (1.0, 1.0, 1.0)},
    ],
    ids=lambda changes: ",".join(changes),
)
@pytest.mark.parametrize("per_frame", [False, True], ids=["shared", "per_frame"])
def test_options(changes, per_frame):
    assert compare(without_rounding(**changes), per_frame, size=(3, 8, 10)) <= TOLERANCE


class RoundingTorch:
    """torch, except that the exponent tables i/n made of arange(0, n, 2) come out rounded to bfloat16."""

    def __getattr__(self, name):
        return getattr(torch, name)

    @staticmethod
    def arange(*bounds, **options):
        values = torch.arange(*bounds, **options)
        return values if len(bounds) == 1 else (values / bounds[1]).bfloat16().float() * bounds[1]


def test_published_bf16_exponents(monkeypatch):
    assert compare(CONFIG, per_frame=False) > 2 * TOLERANCE  # the oracle alone does not round
    monkeypatch.setattr(transformer_cosmos, "torch", RoundingTorch())
    assert compare(CONFIG, per_frame=False) <= TOLERANCE
    assert compare(without_rounding(), per_frame=False) > 2 * TOLERANCE
