"""Our control branch against diffusers' CosmosControlNetModel, and the base with its residuals: fp32, random weights,
nothing left at zero; with and without image context."""

from types import SimpleNamespace

import pytest
import torch

transformer_cosmos = pytest.importorskip("diffusers.models.transformers.transformer_cosmos")
controlnet_cosmos = pytest.importorskip("diffusers.models.controlnets.controlnet_cosmos")

from orrery.nn.control import ActiveControl, ControlBranch, ControlConfig  # noqa: E402
from orrery.nn.dit import Conditions, DiT, DiTConfig  # noqa: E402
from orrery.weights.layouts import diffusers_control_keys, diffusers_transformer_key  # noqa: E402

TOLERANCE = 5e-5
BASE = DiTConfig(width=96, depth=6, heads=4, adaln_rank=16, text_dim=48, context_dim=32, rope_bf16=False)
CONTROL = ControlConfig(blocks=3, every=2, channels=128)


@pytest.fixture(autouse=True)
def _without_torchvision(monkeypatch):
    """torchvision serves the oracle only to resize the padding mask, and may be missing beside a CPU torch."""
    resize = SimpleNamespace(
        functional=SimpleNamespace(
            resize=lambda x, size, interpolation: torch.nn.functional.interpolate(x, size=size, mode="nearest")
        ),
        InterpolationMode=SimpleNamespace(NEAREST="nearest"),
    )
    monkeypatch.setattr(transformer_cosmos, "transforms", resize, raising=False)
    monkeypatch.setattr(controlnet_cosmos, "transforms", resize, raising=False)


def randomised(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.6 * parameter.shape[-1] ** -0.5)


def networks(image: int):
    """Ours (base and branch) and theirs with the same random weights; loaded strictly on both sides."""
    torch.manual_seed(0)
    config = DiTConfig(**{**BASE.__dict__, "image_context": image})
    base, branch = DiT(config).eval(), ControlBranch(config, CONTROL).eval()
    randomised(base)
    randomised(branch)
    shared = dict(
        num_attention_heads=config.heads, attention_head_dim=config.head_dim, mlp_ratio=4.0, text_embed_dim=32,
        adaln_lora_dim=16, max_size=config.max_size, patch_size=(1, 2, 2), rope_scale=config.rope_ratios,
        extra_pos_embed_type=None, use_crossattn_projection=True, crossattn_proj_in_channels=48,
        encoder_hidden_states_channels=32, img_context_dim_in=image or None, img_context_dim_out=96,
    )  # fmt: skip
    their_base = transformer_cosmos.CosmosTransformer3DModel(
        in_channels=17, out_channels=16, num_layers=config.depth, controlnet_block_every_n=CONTROL.every, **shared
    ).eval()
    their_branch = controlnet_cosmos.CosmosControlNetModel(
        n_controlnet_blocks=CONTROL.blocks, in_channels=130, latent_channels=18, model_channels=96, **shared
    ).eval()
    their_base.load_state_dict({diffusers_transformer_key(k): v for k, v in base.state_dict().items()}, strict=True)
    own, copied = diffusers_control_keys(branch.state_dict(), base.state_dict())
    table = {theirs: branch.state_dict()[ours] for ours, theirs in own.items()}
    table |= {theirs: base.state_dict()[ours] for ours, theirs in copied.items()}
    their_branch.load_state_dict(table, strict=True)
    return base, branch, their_base, their_branch


def inputs(image: int, per_frame: bool):
    g = torch.Generator().manual_seed(1)
    t, h, w = 3, 8, 10
    mask = torch.zeros(1, 1, t, h, w)
    mask[:, :, :1] = 1
    times = torch.tensor([730.0])
    if per_frame:
        times = times[:, None] * (1 - mask[:, 0, :, 0, 0]) + 0.1 * mask[:, 0, :, 0, 0]
    return SimpleNamespace(
        latents=torch.randn(1, 16, t, h, w, generator=g),
        control=torch.randn(1, 16, t, h, w, generator=g),
        text=torch.randn(1, 24, 48, generator=g),
        image=torch.randn(1, 10, image, generator=g) if image else None,
        mask=mask,
        times=times,
        padding=(torch.rand(1, 1, 8 * h, 8 * w, generator=g) < 0.5).float(),
    )


@pytest.mark.parametrize("per_frame", [False, True], ids=["shared", "per_frame"])
@pytest.mark.parametrize("image", [0, 20], ids=["text", "text+image"])
@torch.no_grad()
def test_branch_and_base(image, per_frame):
    base, branch, their_base, their_branch = networks(image)
    given = inputs(image, per_frame)
    scaled = given.times * 0.001
    scaled = scaled[:, None, :, None, None] if per_frame else scaled
    text = (given.text, given.image) if image else given.text
    expected = their_branch(
        controls_latents=given.control, latents=given.latents, timestep=scaled, encoder_hidden_states=text,
        condition_mask=given.mask, conditioning_scale=0.7, padding_mask=given.padding, return_dict=False,
    )[0]  # fmt: skip
    velocity = their_base(
        hidden_states=given.latents, timestep=scaled, encoder_hidden_states=text,
        block_controlnet_hidden_states=expected, condition_mask=given.mask, padding_mask=given.padding,
        return_dict=False,
    )[0]  # fmt: skip
    plain = base(given.latents, given.times, Conditions(given.text, given.mask, given.padding, image=given.image))

    seen = []

    class Spy(ActiveControl):
        def residuals(self, state):
            seen.append(dict(super().residuals(state)))
            return seen[-1].items()

    controls = [Spy(branch, given.control, 0.7)]
    conditions = Conditions(given.text, given.mask, given.padding, image=given.image, controls=controls)
    ours = base(given.latents, given.times, conditions)
    assert sorted(seen[0]) == [0, 2, 4]
    for place, theirs in zip((0, 2, 4), expected, strict=True):
        assert 0.05 < theirs.std() < 50
        assert (seen[0][place].flatten(1, 3) - theirs).abs().max() <= TOLERANCE * max(1, theirs.std().item())
    assert (ours - velocity).abs().max().item() <= TOLERANCE
    assert (ours - plain).abs().max().item() > 100 * TOLERANCE
    encoded = Conditions(base.encode_text(given.text, given.image), given.mask, given.padding, controls=controls)
    assert torch.equal(base(given.latents, given.times, encoded), ours)
