"""The transformer: published sizes and names, conditioning, precision, gradients, refusals."""

import dataclasses
import json

import pytest
import torch

from orrery.nn import rope
from orrery.nn.attention import RMSNorm, attention
from orrery.nn.dit import PRESETS, Conditions, DiT, DiTConfig

TINY = DiTConfig(
    width=48, depth=2, heads=2, mlp_ratio=2.0, adaln_rank=8, text_dim=20, context_dim=12, max_size=(8, 16, 16)
)
VARIANTS = {
    "published": TINY,
    "full_rank": dataclasses.replace(TINY, adaln_rank=None),
    "bare": dataclasses.replace(TINY, text_projection=False, padding_mask=False, fp32_modulation=False),
    "fps": dataclasses.replace(TINY, rope_fps_modulation=True),
}


def network(config: DiTConfig = TINY, seed: int = 0) -> DiT:
    """A network in which nothing is zero."""
    torch.manual_seed(seed)
    net = DiT(config)
    for layer in net.zero_initialised():
        torch.nn.init.normal_(layer.weight, std=0.1)
    for module in net.modules():
        if isinstance(module, RMSNorm):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    return net


def inputs(config: DiTConfig = TINY, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, Conditions]:
    g = torch.Generator().manual_seed(seed)
    latents = torch.randn(2, config.latent_channels, 3, 4, 6, generator=g)
    mask = torch.zeros(2, 1, 3, 4, 6)
    mask[:, :, 0] = 1
    text = torch.randn(2, 7, config.text_width, generator=g)
    return latents, torch.tensor([700.0, 40.0]), Conditions(text, frame_mask=mask, fps=16.0)


def on_meta(name: str) -> DiT:
    with torch.device("meta"):
        return DiT(PRESETS[name])


@pytest.mark.parametrize(("name", "parameters"), [("2b", 2_059_174_912), ("14b", 14_368_047_104)])
def test_published_parameter_count(name, parameters):
    assert sum(p.numel() for p in on_meta(name).parameters()) == parameters


def test_published_count_without_text_projection():
    with torch.device("meta"):
        net = DiT(dataclasses.replace(PRESETS["2b"], text_projection=False))
    assert sum(p.numel() for p in net.parameters()) == 1_956_413_440


def test_published_names_and_shapes():
    d, c = 2048, 1024
    expected = {
        "x_embedder.proj.1.weight": (d, 72),
        "t_embedder.1.linear_1.weight": (d, d),
        "t_embedder.1.linear_2.weight": (3 * d, d),
        "t_embedding_norm.weight": (d,),
        "crossattn_proj.0.weight": (c, 100352),
        "crossattn_proj.0.bias": (c,),
        "final_layer.adaln_modulation.1.weight": (256, d),
        "final_layer.adaln_modulation.2.weight": (2 * d, 256),
        "final_layer.linear.weight": (64, d),
    }
    for i in range(28):
        for name, context in (("self_attn", d), ("cross_attn", c)):
            at = f"blocks.{i}.{name}"
            expected |= {f"{at}.{p}.weight": (d, d) for p in ("q_proj", "output_proj")}
            expected |= {f"{at}.{p}.weight": (d, context) for p in ("k_proj", "v_proj")}
            expected |= {f"{at}.{p}.weight": (128,) for p in ("q_norm", "k_norm")}
        expected |= {f"blocks.{i}.mlp.layer1.weight": (4 * d, d), f"blocks.{i}.mlp.layer2.weight": (d, 4 * d)}
        for name in ("self_attn", "cross_attn", "mlp"):
            expected[f"blocks.{i}.adaln_modulation_{name}.1.weight"] = (256, d)
            expected[f"blocks.{i}.adaln_modulation_{name}.2.weight"] = (3 * d, 256)
    assert len(expected) == 569
    assert {key: tuple(value.shape) for key, value in on_meta("2b").state_dict().items()} == expected


def test_config_survives_json():
    for config in PRESETS.values():
        assert DiTConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize(
    ("field", "value"),
    [("width", 50), ("patch", (1, 2)), ("depth", 0), ("adaln_rank", -1), ("mlp_ratio", 0), ("max_size", (0, 8, 8))],
)
def test_impossible_config_is_refused(field, value):
    with pytest.raises(ValueError, match=str(value).replace("(", r"\(").replace(")", r"\)")):
        dataclasses.replace(TINY, **{field: value})


def test_new_network_gives_zero_velocity_and_identity_blocks():
    net, (latents, timesteps, conditions) = DiT(TINY), inputs()
    seen = []
    net.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    net.blocks[-1].register_forward_hook(lambda _, args, out: seen.append(out))
    assert net(latents, timesteps, conditions).count_nonzero() == 0
    assert seen[0].count_nonzero() > 0
    assert torch.equal(*seen)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_text_context_equals_text_and_is_computed_once(config):
    net, (latents, timesteps, conditions) = network(config), inputs(config)
    calls = []
    for block in net.blocks:
        block.cross_attn.k_proj.register_forward_hook(lambda *_: calls.append(1))
    direct = net(latents, timesteps, conditions)
    calls.clear()
    context = net.encode_text(conditions.text)
    encoded = [net(latents, t, dataclasses.replace(conditions, text=context)) for t in (timesteps, timesteps - 5)]
    assert len(calls) == config.depth
    assert (context.batch, context.length) == (2, 7)
    assert torch.equal(direct, encoded[0])
    assert not torch.allclose(direct, encoded[1], atol=1e-5)


def test_one_text_serves_a_batch():
    net, (latents, timesteps, conditions) = network(), inputs()
    one = conditions.text[:1]
    full = net(latents, timesteps, Conditions(one.repeat(2, 1, 1)))
    torch.testing.assert_close(net(latents, timesteps, Conditions(one)), full, atol=1e-5, rtol=0)
    torch.testing.assert_close(net(latents, timesteps, Conditions(net.encode_text(one))), full, atol=1e-5, rtol=0)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_modulation_is_computed_per_frame_and_once_when_shared(config):
    net, (latents, timesteps, conditions) = network(config), inputs(config)
    shapes = []
    modulations = [m for name, m in net.named_modules() if "adaln_modulation" in name.split(".")[-1]]
    assert len(modulations) == 3 * config.depth + 1
    for module in modulations:
        module.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    shared = net(latents, timesteps, conditions)
    assert set(shapes) == {(2, 1, 1, 1, 48)}
    shapes.clear()
    repeated = net(latents, timesteps[:, None].repeat(1, 3), conditions)
    assert set(shapes) == {(2, 3, 1, 1, 48)}
    torch.testing.assert_close(shared, repeated, atol=2e-5, rtol=0)
    uneven = net(latents, torch.tensor([[0.1, 700, 700], [0.1, 40, 40]]), conditions)
    assert not torch.allclose(shared, uneven, atol=1e-3)


def test_items_of_a_batch_are_independent():
    net, (latents, timesteps, conditions) = network(), inputs()
    alone = net(latents[1:], timesteps[1:], Conditions(conditions.text[1:], conditions.frame_mask[1:]))
    torch.testing.assert_close(net(latents, timesteps, conditions)[1:], alone, atol=1e-5, rtol=0)


def test_masks_matter_and_none_means_zeros():
    net, (latents, timesteps, conditions) = network(), inputs()
    run = lambda **changes: net(latents, timesteps, dataclasses.replace(conditions, **changes))  # noqa: E731
    nothing = run(frame_mask=None)
    assert torch.equal(nothing, run(frame_mask=torch.zeros(1, 1, 3, 4, 6), padding_mask=torch.zeros(1, 1, 32, 48)))
    assert not torch.allclose(nothing, run(), atol=1e-3)
    padding = torch.zeros(1, 1, 32, 48)
    padding[..., 24:] = 1
    assert not torch.allclose(run(), run(padding_mask=padding), atol=1e-3)


def test_fps_matters_only_where_it_modulates():
    for name, equal in (("published", True), ("fps", False)):
        net, (latents, timesteps, conditions) = network(VARIANTS[name]), inputs()
        other = net(latents, timesteps, dataclasses.replace(conditions, fps=30.0))
        assert torch.allclose(net(latents, timesteps, conditions), other, atol=1e-6) == equal
    with pytest.raises(ValueError, match="fps"):
        net(latents, timesteps, dataclasses.replace(conditions, fps=None))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_gradient_reaches_every_parameter(config, checkpointing):
    net, (latents, timesteps, conditions) = network(config), inputs(config)
    net.activation_checkpointing = checkpointing
    conditions = dataclasses.replace(conditions, padding_mask=torch.ones(1, 1, 4, 6) if config.padding_mask else None)
    net(latents, timesteps, conditions).square().mean().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_checkpointing_changes_no_gradient():
    latents, timesteps, conditions = inputs()
    grads = []
    for checkpointing in (False, True):
        net = network()
        net.activation_checkpointing = checkpointing
        net(latents, timesteps, conditions).square().mean().backward()
        grads.append([p.grad for p in net.parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_gradient_flows_through_a_text_context():
    net, (latents, timesteps, conditions) = network(), inputs()
    context = net.encode_text(conditions.text)
    net(latents, timesteps, dataclasses.replace(conditions, text=context)).square().mean().backward()
    assert net.crossattn_proj[0].weight.grad.abs().max() > 0


def test_training_after_sampling_in_inference_mode():
    rope.cached_rope_table.cache_clear()
    net, (latents, timesteps, conditions) = network(), inputs()
    with torch.inference_mode():
        net(latents, timesteps, conditions)
    net(latents, timesteps, conditions).square().mean().backward()
    assert net.blocks[0].self_attn.q_proj.weight.grad.abs().max() > 0


def record_dtypes(net: DiT) -> dict[str, torch.dtype]:
    seen: dict[str, torch.dtype] = {}
    for name, module in net.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _, args, out, name=name: seen.__setitem__(name, out.dtype))
    return seen


@pytest.mark.parametrize("way", ["bf16_weights", "autocast"])
def test_fp32_regions(way):
    """Time embedding, modulation and the final layer in fp32; everything else in bf16 (spec 1.6)."""
    latents, timesteps, conditions = inputs()
    reference = network()(latents, timesteps, conditions)
    net = network()
    seen = record_dtypes(net)
    if way == "bf16_weights":
        out = net.bfloat16()(latents, timesteps, conditions)
    else:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = net(latents, timesteps, conditions)
    precise = {name for name, dtype in seen.items() if dtype == torch.float32}
    assert precise == {n for n in seen if n.startswith(("t_embedder", "final_layer")) or "adaln_modulation" in n}
    assert {seen[name] for name in seen.keys() - precise} == {torch.bfloat16}
    assert out.dtype == torch.float32
    assert ((out - reference).norm() / reference.norm()).item() < 0.02


def test_fp32_regions_are_closer_to_fp32_than_bf16_throughout():
    latents, timesteps, conditions = inputs()
    errors = {}
    for strategy in (True, False):
        net = network(dataclasses.replace(TINY, fp32_modulation=strategy))
        reference = net(latents, timesteps, conditions)
        seen = record_dtypes(net)
        out = net.bfloat16()(latents, timesteps, conditions)
        assert out.dtype == torch.float32
        errors[strategy] = ((out - reference).norm() / reference.norm()).item()
    assert set(seen.values()) == {torch.bfloat16}
    assert 0 < errors[True] < errors[False]


def test_rms_norm_in_bf16_rounds_once():
    torch.manual_seed(0)
    norm, x = RMSNorm(128).bfloat16(), torch.randn(512, 128).bfloat16()
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    wide = x.float()
    exact = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * norm.weight.float()
    assert norm(x).dtype == torch.bfloat16
    assert (norm(x) != exact.bfloat16()).float().mean() < 1e-3  # rounding twice differs in a quarter of the entries


def test_attention_is_softmax_attention():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 5, 3, 8), torch.randn(1, 7, 3, 8), torch.randn(1, 7, 3, 8)
    weights = torch.einsum("bqhd,khd->bhqk", q, k[0]).div(8**0.5).softmax(-1)
    torch.testing.assert_close(attention(q, k, v), torch.einsum("bhqk,khd->bqhd", weights, v[0]), atol=1e-5, rtol=0)


WRONG = {
    "latents rank": ({"latents": torch.zeros(2, 16, 4, 6)}, r"\[2, 16, 4, 6\]"),
    "latents channels": ({"latents": torch.zeros(2, 15, 3, 4, 6)}, r"\[2, 15, 3, 4, 6\]"),
    "odd height": ({"latents": torch.zeros(2, 16, 3, 5, 6)}, r"H .* multiple of 2, got 5"),
    "empty time": ({"latents": torch.zeros(2, 16, 0, 4, 6)}, r"T .* got 0"),
    "too long": ({"latents": torch.zeros(2, 16, 9, 4, 6)}, r"T .* at most 8, got 9"),
    "timesteps batch": ({"timesteps": torch.zeros(3)}, r"\[2\] or \[2, 3\] \(or a batch of 1\), got \[3\]"),
    "timesteps frames": ({"timesteps": torch.zeros(2, 2)}, r"got \[2, 2\]"),
    "text width": ({"text": torch.zeros(2, 7, 21)}, r"20\], got \[2, 7, 21\]"),
    "text batch": ({"text": torch.zeros(3, 7, 20)}, r"batch of 2 .* got 3"),
    "frame mask": ({"frame_mask": torch.zeros(2, 1, 3, 4, 4)}, r"\[2, 1, 3, 4, 6\], got \[2, 1, 3, 4, 4\]"),
    "frame mask batch": ({"frame_mask": torch.zeros(3, 1, 3, 4, 6)}, r"got \[3, 1, 3, 4, 6\]"),
    "padding mask": ({"padding_mask": torch.zeros(2, 3, 4, 6)}, r"got \[2, 3, 4, 6\]"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
def test_wrong_shapes_are_refused(changes, message):
    latents, timesteps, conditions = inputs()
    masks = {key: value for key, value in changes.items() if key not in ("latents", "timesteps")}
    with pytest.raises(ValueError, match=message):
        network()(
            changes.get("latents", latents),
            changes.get("timesteps", timesteps),
            dataclasses.replace(conditions, **masks),
        )


def test_masks_and_contexts_of_another_network_are_refused():
    config = VARIANTS["bare"]
    net, (latents, timesteps, conditions) = network(config), inputs(config)
    with pytest.raises(ValueError, match="padding_mask"):
        net(latents, timesteps, dataclasses.replace(conditions, padding_mask=torch.zeros(1, 1, 4, 6)))
    whole = net.encode_text(conditions.text)
    short = dataclasses.replace(whole, layers=whole.layers[:1])
    with pytest.raises(ValueError, match="2 blocks, the TextContext is for 1"):
        net(latents, timesteps, dataclasses.replace(conditions, text=short))


def test_temporal_patch_needs_a_shared_timestep():
    config = dataclasses.replace(TINY, patch=(3, 2, 2))
    net, (latents, timesteps, conditions) = network(config), inputs(config)
    assert net(latents, timesteps, conditions).shape == latents.shape
    with pytest.raises(ValueError, match="patch of 1, this network has 3"):
        net(latents, timesteps[:, None].repeat(1, 3), conditions)


def test_times_of_batch_one_serve_every_item():
    net = network()
    latents, _, conditions = inputs()
    for times in (torch.tensor([700.0]), torch.tensor([[0.0, 700.0, 300.0]])):
        whole = net(latents, times.expand(2, *times.shape[1:]), conditions)
        assert torch.allclose(net(latents, times, conditions), whole, atol=1e-5)
        assert not torch.allclose(net(latents, times + 100, conditions), whole, atol=1e-2)


def test_norm_and_rotation_together_are_both_after_each_other():
    torch.manual_seed(0)
    x, weight = torch.randn(2, 12, 3, 24), torch.rand(24) + 0.5
    table = rope.rope_table((2, 2, 3), 24)
    plain = rope.apply_rope(torch.nn.functional.rms_norm(x, (24,), weight, 1e-6), *table)
    with torch.no_grad():
        fast = rope.norm_rope(x, weight, 1e-6, *table)
    assert fast.dtype == torch.float32 and (fast - plain).abs().max() < 2e-6
    assert torch.equal(rope.norm_rope(x, weight, 1e-6, *table), plain)  # with gradients: the plain form
    half = x.bfloat16()
    with torch.no_grad():  # rounded after the norm, as published
        rounded = torch.nn.functional.rms_norm(half, (24,), weight.bfloat16(), 1e-6)
        assert torch.equal(rope.norm_rope(half, weight, 1e-6, *table), rope.apply_rope(rounded, *table))
    zeros = torch.zeros(1, 12, 3, 24)
    with torch.no_grad():
        assert torch.equal(rope.norm_rope(zeros, weight, 1e-6, *table), zeros)
