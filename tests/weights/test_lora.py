"""LoRA files of PEFT, diffusers and the official code do in our transformer what they do in theirs; and back."""

import dataclasses
import gc
import json
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

peft = pytest.importorskip("peft")
transformer_cosmos = pytest.importorskip("diffusers.models.transformers.transformer_cosmos")

from diffusers.loaders import CosmosLoraLoaderMixin  # noqa: E402
from diffusers.training_utils import _collate_lora_metadata  # noqa: E402
from peft.utils import get_peft_model_state_dict  # noqa: E402

from orrery.errors import InputError  # noqa: E402
from orrery.nn.dit import Conditions, DiT, DiTConfig  # noqa: E402
from orrery.weights.layouts import diffusers_transformer_key  # noqa: E402
from orrery.weights.lora import (  # noqa: E402
    Lora,
    LoraPair,
    lora_from_tensors,
    merge,
    merged_weights,
    read_lora,
    save_lora,
    split_adapters,
)

CONFIG = DiTConfig(
    width=64, depth=2, heads=2, adaln_rank=8, text_dim=24, context_dim=16, padding_mask=False, rope_bf16=False,
    max_size=(8, 16, 16),
)  # fmt: skip
NAMES = {name: parameter.shape for name, parameter in DiT(CONFIG).named_parameters()}
TARGETS = ["q_proj", "k_proj", "v_proj", "output_proj", "mlp.layer1", "mlp.layer2"]  # of the official recipe
MORE = [
    "x_embedder.proj.1",
    "adaln_modulation_mlp.1",
    "final_layer.linear",
    "t_embedder.1.linear_1",
    "crossattn_proj.0",
]
DIFFUSERS_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
DIFFUSERS_MORE = ["patch_embed.proj", "norm3.linear_1", "proj_out", "t_embedder.linear_1", "crossattn_proj.0"]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"mlp.layer1": 2, r"^blocks\.1\.self_attn\.q_proj": 6},
        "alpha_pattern": {"1": 2.5, "0.mlp.layer1": 5, "q_proj": 1.5, "k_proj|v_proj": 3},
    },
}
DIFFUSERS_OPTIONS = OPTIONS | {
    "patterns": {
        "rank_pattern": {"ff.net.0.proj": 2, r"^transformer_blocks\.1\.attn1\.to_q": 6},
        "alpha_pattern": {"0.ff.net.0.proj": 5, "to_q": 1.5, "to_k|to_v": 3},
    },
}
TOLERANCE = 1e-5  # fp32, velocities of about one: adapters apart and merged round differently
PARITY = 5e-5  # that of tests/parity/test_dit_parity.py: two implementations of the network

Q = "blocks.0.self_attn.q_proj"


@pytest.fixture
def net() -> DiT:
    """A transformer with random weights, none of them zero."""
    torch.manual_seed(0)
    net = DiT(CONFIG).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim == 1 or not parameter.any():
                parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.5 * parameter.shape[-1] ** -0.5)
    return net


@pytest.fixture
def oracle(net: DiT) -> nn.Module:
    """diffusers' transformer with the same weights."""
    oracle = transformer_cosmos.CosmosTransformer3DModel(
        in_channels=CONFIG.latent_channels + 1,
        out_channels=CONFIG.latent_channels,
        num_attention_heads=CONFIG.heads,
        attention_head_dim=CONFIG.head_dim,
        num_layers=CONFIG.depth,
        mlp_ratio=CONFIG.mlp_ratio,
        text_embed_dim=CONFIG.context_dim,
        adaln_lora_dim=CONFIG.adaln_rank,
        max_size=CONFIG.max_size,
        patch_size=CONFIG.patch,
        rope_scale=CONFIG.rope_ratios,
        concat_padding_mask=False,
        extra_pos_embed_type=None,
        use_crossattn_projection=True,
        crossattn_proj_in_channels=CONFIG.text_dim,
        encoder_hidden_states_channels=CONFIG.context_dim,
    ).eval()
    oracle.load_state_dict({diffusers_transformer_key(key): value.clone() for key, value in net.state_dict().items()})
    return oracle


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(2, 16, 2, 8, 8, generator=g), torch.tensor([900.0, 200.0]), torch.randn(2, 5, 24, generator=g)


@torch.no_grad()
def velocity(net: nn.Module) -> Tensor:
    latents, timesteps, text = inputs()
    return net(latents, timesteps, Conditions(text))


@torch.no_grad()
def their_velocity(oracle: nn.Module) -> Tensor:
    latents, timesteps, text = inputs()
    mask = torch.zeros(2, 1, *latents.shape[2:])
    return oracle(latents, timesteps * 0.001, text, condition_mask=mask, return_dict=False)[0]


def fill(model: nn.Module, seed: int = 2) -> None:
    """Random numbers for every A and B, so that the deltas are about as large as the weights."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.7 * parameter.shape[1] ** -0.5)


def peft_model(net: nn.Module, targets: list[str] | None = None, **options: Any) -> Any:
    """`net` inside PEFT, with random adapters."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": targets or TARGETS + MORE} | options
    model = peft.get_peft_model(net, peft.LoraConfig(**settings)).eval()
    fill(model)
    return model


def copy_of(net: DiT, dtype: torch.dtype = torch.float32) -> DiT:
    copy = DiT(net.config).eval()
    copy.load_state_dict(net.state_dict())
    return copy.to(dtype)


def random_lora(seed: int = 0, rank: int = 4, factor: float = 1.5, scale: float = 1.0, name: str = "some lora") -> Lora:
    g = torch.Generator().manual_seed(seed)
    pairs = {}
    for key, shape in NAMES.items():
        if any(key.endswith(f"{target}.weight") for target in TARGETS):
            a, b = torch.randn(rank, shape[1], generator=g), torch.randn(shape[0], rank, generator=g)
            pairs[key] = LoraPair(a * shape[1] ** -0.5, b * 0.5 * rank**-0.5, factor)
    return Lora(name, pairs, scale)


def mixed_lora() -> Lora:
    """Two ranks, two alphas, a module of the top level, a scale: all that a saved file must tell."""
    lora = random_lora(scale=0.5)
    g = torch.Generator().manual_seed(7)
    odd = {f"{Q}.weight": (64, 64, 2, 0.75), "final_layer.linear.weight": (64, 64, 4, 2.0)}
    changed = {
        key: LoraPair(torch.randn(r, i, generator=g) * i**-0.5, torch.randn(o, r, generator=g) * 0.5, factor)
        for key, (o, i, r, factor) in odd.items()
    }
    return Lora("mixed", {**lora.pairs, **changed}, lora.scale)


def same(one: Tensor, two: Tensor, tolerance: float = TOLERANCE) -> bool:
    assert 0.3 < two.std() < 3
    return (one - two).abs().max().item() <= tolerance


# What others wrote, in our transformer


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_a_peft_adapter_does_what_it_does_in_peft(net: DiT, tmp_path: Path, options: dict, capsys) -> None:
    ours, before = copy_of(net), velocity(net)
    model = peft_model(net, **options)
    model.save_pretrained(tmp_path / "adapter")
    expected = velocity(model)
    assert not same(before, expected, 0.1)
    lora = read_lora(tmp_path / "adapter", NAMES)
    assert len(lora.pairs) == 10 * CONFIG.depth + CONFIG.depth + 4  # TARGETS and MORE
    merge(ours, [lora])
    assert same(velocity(ours), expected)
    assert same(velocity(ours), velocity(model.merge_and_unload()))
    assert "alpha" not in capsys.readouterr().err


def test_an_adapter_in_a_torch_file(tmp_path: Path) -> None:
    tensors = {key: torch.ones(shape) for key, shape in GOOD.items()}
    torch.save(tensors, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_config.json").write_text(json.dumps(FINE))
    assert read_lora(tmp_path, NAMES).delta(f"{Q}.weight")[0, 0] == 4 * 8 / 4


@pytest.mark.parametrize("options", DIFFUSERS_OPTIONS.values(), ids=OPTIONS.keys())
def test_a_peft_adapter_made_on_diffusers(net: DiT, oracle: nn.Module, tmp_path: Path, options: dict) -> None:
    model = peft_model(oracle, DIFFUSERS_TARGETS + DIFFUSERS_MORE, **options)
    model.save_pretrained(tmp_path / "adapter")
    merge(net, [read_lora(tmp_path / "adapter" / "adapter_model.safetensors", NAMES)])
    assert same(velocity(net), their_velocity(model), PARITY)


def adapted(oracle: nn.Module, **options: Any) -> nn.Module:
    """diffusers' transformer with random adapters of its own."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": DIFFUSERS_TARGETS + DIFFUSERS_MORE} | options
    oracle.add_adapter(peft.LoraConfig(**settings))
    fill(oracle)
    return oracle


@pytest.mark.parametrize("options", DIFFUSERS_OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("saved_by", ["pipeline", "transformer"])
def test_a_diffusers_lora(net: DiT, oracle: nn.Module, tmp_path: Path, options: dict, saved_by: str, capsys) -> None:
    before = velocity(net)
    adapted(oracle, **options)
    if saved_by == "pipeline":
        layers = get_peft_model_state_dict(oracle)
        CosmosLoraLoaderMixin.save_lora_weights(tmp_path, layers, **_collate_lora_metadata({"transformer": oracle}))
    else:
        oracle.save_lora_adapter(tmp_path)
    merge(net, [read_lora(tmp_path, NAMES)])
    expected = their_velocity(oracle)
    assert same(velocity(net), expected, PARITY) and not same(before, expected, 0.1)
    assert "alpha" not in capsys.readouterr().err


def test_without_metadata_alpha_is_the_rank_as_in_diffusers(
    net: DiT, oracle: nn.Module, tmp_path: Path, capsys
) -> None:
    layers = get_peft_model_state_dict(adapted(oracle, lora_alpha=4))
    CosmosLoraLoaderMixin.save_lora_weights(tmp_path, layers)
    merge(net, [read_lora(tmp_path, NAMES)])
    assert same(velocity(net), their_velocity(oracle), PARITY)
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "states no alpha" in told and str(tmp_path) in told and "(4)" in told


@pytest.mark.parametrize("down, up", [("lora_down", "lora_up"), ("lora.down", "lora.up"), ("lora_A", "lora_B")])
def test_names_down_and_up_and_tensors_of_alpha(tmp_path: Path, down: str, up: str, capsys) -> None:
    a, b = torch.randn(4, 64), torch.randn(64, 4)
    key = "transformer.transformer_blocks.0.attn1.to_q"
    tensors = {f"{key}.{down}.weight": a, f"{key}.{up}.weight": b, f"{key}.alpha": torch.tensor(6.0)}
    save_file(tensors, tmp_path / "x.safetensors")
    lora = read_lora(tmp_path / "x.safetensors", NAMES, scale=0.5)
    assert list(lora.pairs) == [f"{Q}.weight"]
    assert torch.allclose(lora.delta(f"{Q}.weight"), 0.5 * 6 / 4 * (b @ a))
    assert capsys.readouterr().err == ""


def official_file(net: DiT, path: Path, wrapped: bool = True, averaged: bool = True, **options: Any) -> Any:
    """What the official training leaves behind: whole model and adapters, trained and averaged. Gives PEFT's model."""
    trained = peft_model(copy_of(net), TARGETS, **options)
    model = peft_model(net, TARGETS, **options)
    fill(model, seed=3)
    table = {}
    for prefix, part in (("net.", trained), ("net_ema.", model)) if averaged else (("net.", model),):
        for key, value in part.state_dict().items():
            table[prefix + (key if wrapped else key.removeprefix("base_model.model."))] = value
        table |= {f"{prefix}accum_iteration": torch.tensor(5), f"{prefix}pos_embedder.seq": torch.arange(16.0)}
        table[f"{prefix}blocks.0.self_attn.q_norm._extra_state"] = torch.zeros(0)
    torch.save(table, path)
    return model


@pytest.mark.parametrize("averaged", [True, False], ids=["net_ema", "net"])
@pytest.mark.parametrize("wrapped", [True, False], ids=["get_peft_model", "inject_adapter"])
def test_the_adapters_of_an_official_fine_tune(net: DiT, tmp_path: Path, wrapped: bool, averaged: bool, capsys) -> None:
    ours = copy_of(net)
    model = official_file(net, tmp_path / "model.pt", wrapped, averaged, lora_alpha=4)
    lora = read_lora(tmp_path / "model.pt", NAMES)
    merge(ours, [lora])
    assert same(velocity(ours), velocity(model))
    assert all(pair.factor == 1 for pair in lora.pairs.values())
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "states no alpha" in told and "model.pt" in told


def test_an_official_fine_tune_as_a_whole_model(net: DiT, tmp_path: Path) -> None:
    model = official_file(net, tmp_path / "model.pt", averaged=False, lora_alpha=4)
    base, adapters = split_adapters(torch.load(tmp_path / "model.pt", weights_only=True))
    assert len(adapters) == 2 * 10 * CONFIG.depth
    weights = {key.removeprefix("net."): value for key, value in base.items() if key.removeprefix("net.") in NAMES}
    assert weights.keys() == NAMES.keys()
    table = merged_weights(weights, [lora_from_tensors(adapters, NAMES, "model.pt")])
    assert list(table) == list(weights) and len(table) == len(weights)
    ours = DiT(CONFIG).eval()
    ours.load_state_dict(dict(table))
    assert same(velocity(ours), velocity(model))


def test_of_several_adapters_default_is_taken_and_told(tmp_path: Path, capsys) -> None:
    tensors = {
        f"net.{Q}.lora_{half}.{adapter}.weight": torch.full((2, 64) if half == "A" else (64, 2), value)
        for adapter, value in (("old", 1.0), ("default", 2.0))
        for half in "AB"
    }
    assert lora_from_tensors(tensors, NAMES, "nft").delta(f"{Q}.weight")[0, 0] == 8
    assert "nft holds the adapters default, old: default is taken" in capsys.readouterr().err
    tensors = {key.replace("default", "new"): value for key, value in tensors.items()}
    with pytest.raises(InputError, match="none is called default: new, old"):
        lora_from_tensors(tensors, NAMES, "nft")


# What we write, in theirs


def test_peft_loads_what_we_save(net: DiT, tmp_path: Path) -> None:
    ours, lora = copy_of(net), mixed_lora()
    merge(ours, [lora])
    save_lora(tmp_path / "adapter", lora, "peft")
    model = peft.PeftModel.from_pretrained(net, tmp_path / "adapter").eval()
    assert same(velocity(ours), velocity(model))
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, len(config.rank_pattern), len(config.alpha_pattern)) == (4, 3.0, 1, 2)


def test_diffusers_loads_what_we_save(net: DiT, oracle: nn.Module, tmp_path: Path) -> None:
    lora = mixed_lora()
    merge(net, [lora])
    save_lora(tmp_path / "lora.safetensors", lora, "diffusers")
    oracle.load_lora_adapter(str(tmp_path), weight_name="lora.safetensors")
    assert same(velocity(net), their_velocity(oracle), PARITY)


@pytest.mark.parametrize("layout", ["peft", "diffusers"])
def test_a_saved_lora_is_read_back(tmp_path: Path, layout: str, capsys) -> None:
    lora, path = mixed_lora(), tmp_path / ("x.safetensors" if layout == "diffusers" else "x")
    assert save_lora(path, lora, layout) == path
    again = read_lora(path, NAMES)
    assert again.pairs.keys() == lora.pairs.keys() and again.scale == 1.0
    for name, pair in lora.pairs.items():
        assert torch.equal(pair.a, again.pairs[name].a) and torch.equal(pair.b, again.pairs[name].b)
        assert torch.allclose(lora.delta(name), again.delta(name), rtol=1e-6, atol=0)
    assert again.name == str(path) and capsys.readouterr().err == ""
    save_lora(path, again, layout)  # what stands there is replaced
    assert read_lora(path, NAMES).hash == again.hash


def test_the_hash_is_of_the_content(tmp_path: Path) -> None:
    lora = random_lora()
    assert len(lora.hash) == 16 and int(lora.hash, 16)
    for layout, path in (("peft", tmp_path / "x"), ("diffusers", tmp_path / "x.safetensors")):
        assert read_lora(save_lora(path, lora, layout), NAMES, scale=0.3).hash == lora.hash
    name, pair = next(iter(lora.pairs.items()))
    for changed in (
        LoraPair(pair.a, pair.b, pair.factor * 2),
        LoraPair(pair.a + 1e-3, pair.b, pair.factor),
        LoraPair(pair.a, pair.b + 1e-3, pair.factor),
    ):
        assert dataclasses.replace(lora, pairs={**lora.pairs, name: changed}).hash != lora.hash


@pytest.mark.parametrize("layout", ["peft", "diffusers"])
def test_a_full_disk_leaves_nothing(tmp_path: Path, full_disk: Callable, layout: str) -> None:
    with full_disk(1000), pytest.raises(InputError, match="cannot write"):
        save_lora(tmp_path / "x.safetensors", random_lora(), layout)
    assert list(tmp_path.iterdir()) == []


def test_saving_is_refused_with_a_reason(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="layout of a LoRA is 'kohya'; allowed are peft, diffusers"):
        save_lora(tmp_path / "x", random_lora(), "kohya")
    with pytest.raises(InputError, match="x: a LoRA of diffusers is a file named .safetensors"):
        save_lora(tmp_path / "x", random_lora(), "diffusers")
    with pytest.raises(ValueError, match="nothing to save"):
        save_lora(tmp_path / "x", Lora("empty", {}))


# Merging


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in net.named_parameters()}


def is_state(net: nn.Module, wanted: dict[str, Tensor]) -> bool:
    """Bit for bit, dtypes too."""
    found = dict(net.named_parameters())
    return found.keys() == wanted.keys() and all(
        found[name].dtype == value.dtype and torch.equal(found[name], value) for name, value in wanted.items()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keep_on", ["cpu", None])
def test_merging_rounds_once_and_is_undone_bit_for_bit(net: DiT, dtype: torch.dtype, keep_on: str | None) -> None:
    net.to(dtype)
    before = state(net)
    identities = {name: (id(parameter), parameter.data_ptr()) for name, parameter in net.named_parameters()}
    loras = [random_lora(1, scale=0.4), random_lora(2, rank=2, scale=-1.3)]
    merged = merge(net, loras, keep_on)
    assert merged.active and merged.loras == tuple(loras)
    for name, parameter in net.named_parameters():
        expected = before[name]
        if name in loras[0].pairs:
            a, b = (lora.scale * pair.factor * (pair.b @ pair.a) for lora in loras for pair in [lora.pairs[name]])
            expected = (before[name].float() + (a + b)).to(dtype)
            assert not torch.equal(parameter, before[name])
        ulp = torch.finfo(dtype).eps if dtype != torch.float32 else 1e-6
        assert parameter.dtype == dtype and id(parameter) == identities[name][0]
        different = parameter != expected  # where the order of a sum in fp32 decides a rounding
        assert different.float().mean() < (1e-2 if dtype != torch.float32 else 1.1)
        assert torch.allclose(parameter.float(), expected.float(), rtol=ulp, atol=1e-6)
    merged.undo()
    assert is_state(net, before) and not merged.active
    assert all(parameter.data_ptr() == identities[name][1] for name, parameter in net.named_parameters())  # no copies
    with pytest.raises(ValueError, match="undone already"):
        merged.undo()


def test_what_the_parameters_held_is_not_written_to(net: DiT, tmp_path: Path) -> None:
    """The weights may be pages of a file."""
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    with safe_open(tmp_path / "net.safetensors", framework="pt") as file:
        mapped = {key: file.get_tensor(key) for key in file.keys()}
    net.load_state_dict(mapped, assign=True)
    before = state(net)
    merged = merge(net, [random_lora()])
    assert all(torch.equal(mapped[name], value) for name, value in before.items())
    merged.undo()
    assert net.get_parameter(f"{Q}.weight").data_ptr() == mapped[f"{Q}.weight"].data_ptr()


def test_merges_stack_and_are_undone_from_the_last(net: DiT) -> None:
    lora, other = random_lora(1), random_lora(2)
    states = [state(net)]
    first = merge(net, [lora])
    states.append(state(net))
    second = merge(net, [lora])
    states.append(state(net))
    third = merge(net, [other])
    assert not is_state(net, states[0]) and not is_state(net, states[1]) and not is_state(net, states[2])
    with pytest.raises(ValueError, match="a later merge of this module must be undone before this one"):
        first.undo()
    for merged, wanted in ((third, states[2]), (second, states[1]), (first, states[0])):
        merged.undo()
        assert is_state(net, wanted)


def test_a_merge_is_a_context(net: DiT) -> None:
    before = state(net)
    with pytest.raises(RuntimeError, match="inside"), merge(net, [random_lora()]):
        assert not is_state(net, before)
        raise RuntimeError("inside")
    assert is_state(net, before)
    with merge(net, [random_lora()]) as merged:
        merged.undo()
    assert is_state(net, before)


def test_a_module_that_was_moved_is_restored_where_it_is(net: DiT) -> None:
    before = {name: value.bfloat16() for name, value in state(net).items()}
    merged = merge(net, [random_lora()])
    net.bfloat16()
    merged.undo()
    assert is_state(net, before)


def test_a_merge_that_fails_changes_nothing(net: DiT, monkeypatch: pytest.MonkeyPatch) -> None:
    before, lora, calls = state(net), random_lora(), iter(range(5))
    delta = Lora.delta

    def failing(self: Lora, *args: Any) -> Tensor:
        if next(calls, None) is None:
            raise MemoryError("no room")
        return delta(self, *args)

    monkeypatch.setattr(Lora, "delta", failing)
    with pytest.raises(MemoryError, match="no room"):
        merge(net, [lora])
    assert is_state(net, before)
    monkeypatch.undo()
    merge(net, [lora]).undo()
    assert is_state(net, before)


def test_merging_keeps_no_module_alive(net: DiT) -> None:
    small = nn.ModuleDict({"layer": nn.Linear(4, 4)})
    merge(small, [Lora("x", {"layer.weight": LoraPair(torch.ones(1, 4), torch.ones(4, 1), 1.0)})])
    there = weakref.ref(small)
    del small
    gc.collect()
    assert there() is None


def test_gradients_flow_to_merged_weights(net: DiT) -> None:
    merge(net, [random_lora()])
    latents, timesteps, text = inputs()
    net(latents, timesteps, Conditions(text)).sum().backward()
    assert net.get_parameter(f"{Q}.weight").grad is not None


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_the_delta_is_fp32_whatever_the_settings(precision: str) -> None:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(32, 512, generator=g), torch.randn(512, 32, generator=g).bfloat16()
    settings = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        set_to = [kind.fp32_precision for kind in settings]
        with torch.autocast("cpu", torch.bfloat16):
            delta = Lora("x", {"w": LoraPair(a, b, 1.5)}, 2.0).delta("w")
        assert [kind.fp32_precision for kind in settings] == set_to
    finally:
        torch.set_float32_matmul_precision(before)
    assert delta.dtype == torch.float32
    assert torch.allclose(delta.double(), 3 * (b.double() @ a.double()), rtol=1e-5, atol=1e-4)  # bf16: off by 0.1


def test_adapters_in_training_merge_without_a_graph(net: DiT) -> None:
    pair = LoraPair(nn.Parameter(torch.ones(1, 64)), nn.Parameter(torch.ones(64, 1)), 1.0)
    lora = Lora("training", {f"{Q}.weight": pair})
    assert not merged_weights(state(net), [lora])[f"{Q}.weight"].requires_grad


def test_weights_on_meta_or_quantised_are_refused(net: DiT) -> None:
    with torch.device("meta"):
        empty = DiT(CONFIG)
    with pytest.raises(ValueError, match=r"q_proj.weight is torch.float32 on meta: LoRAs go into fp32, bf16 or fp16"):
        merge(empty, [random_lora()])
    before = state(net.double())
    with pytest.raises(ValueError, match="torch.float64 on cpu"):
        merge(net, [random_lora()])
    assert is_state(net, before)


def test_a_lora_of_another_model_is_refused_before_anything_changes(net: DiT) -> None:
    before, lora = state(net), random_lora()
    pair = next(iter(lora.pairs.values()))
    for name, text in (
        ("blocks.9.self_attn.q_proj.weight", "in this model it is missing"),
        ("blocks.1.mlp.layer1.weight", r"of \[64, 64\]; in this model it is \[256, 64\]"),
    ):
        wrong = dataclasses.replace(lora, pairs={**lora.pairs, name: pair}, name="other.safetensors")
        with pytest.raises(InputError, match=f"other.safetensors is for a {name} .*{text}"):
            merge(net, [lora, wrong])
        with pytest.raises(InputError, match=text):
            merged_weights(net.state_dict(), [wrong])
    assert is_state(net, before)


# What is refused

Q1, MLP = "blocks.1.self_attn.q_proj", "blocks.1.mlp.layer1"


def halves(module: str, a: tuple[int, ...] = (4, 64), b: tuple[int, ...] = (64, 4)) -> dict[str, tuple[int, ...]]:
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}


GOOD = halves(f"base_model.model.{Q}")
FINE = {"r": 4, "lora_alpha": 8, "peft_type": "LORA"}


def adapter(folder: Path, shapes: dict[str, tuple[int, ...]], config: dict | str | None = None) -> Path:
    """An adapter as PEFT writes it, of ones."""
    folder.mkdir(exist_ok=True)
    save_file({key: torch.ones(shape) for key, shape in shapes.items()}, folder / "adapter_model.safetensors")
    if config is not None:
        text = config if isinstance(config, str) else json.dumps(config)
        (folder / "adapter_config.json").write_text(text)
    return folder


def test_a_good_adapter_of_this_kind_is_read(tmp_path: Path) -> None:
    assert read_lora(adapter(tmp_path / "x", GOOD, FINE), NAMES).pairs[f"{Q}.weight"].factor == 2


@pytest.mark.parametrize(
    "extra, text",
    [
        (halves("x.blocks.7"), r"2 keys cannot be used: x.blocks.7.lora_A.weight \(no such weight in this model\), x"),
        ({f"x{i}.lora_A.weight": (4, 64) for i in range(9)}, r"9 keys cannot be used: x0.* x1.* x2[^x]*, \.\.\.$"),
        ({f"{Q1}.lora_A.weight": (4, 64)}, r"1 keys cannot be used: blocks.1.*lora_A.weight \(without its B\)$"),
        ({f"{Q1}.lora_B.weight": (64, 4)}, r"\(without its A\)"),
        ({f"{Q1}.alpha": ()}, r"q_proj.alpha \(without its A and B\)"),
        (halves(MLP), r"\(A is \[4, 64\] and B \[64, 4\], the weight \[256, 64\]\)"),
        (halves(MLP, b=(256, 3)), r"A is \[4, 64\] and B \[256, 3\]"),
        (halves(MLP, a=(4, 32), b=(256, 4)), r"A is \[4, 32\]"),
        (halves(MLP, a=(0, 64), b=(256, 0)), r"A is \[0, 64\]"),
        (halves(MLP, a=(), b=(256, 0)), r"A is \[\]"),
        (halves("t_embedding_norm"), r"the weight \[64\]"),
        ({f"base_model.model.{Q}.lora_magnitude_vector": (64,)}, r"lora_magnitude_vector \(DoRA is not supported\)"),
        ({f"{Q}.dora_scale": (64,)}, r"dora_scale \(DoRA is not supported\)"),
        ({f"{Q}.lora_B.bias": (64,)}, r"lora_B.bias \(biases are not supported\)"),
        ({"base_model.model.crossattn_proj.0.bias": (16,)}, r"crossattn_proj.0.bias \(biases are not supported\)"),
        ({"view.lora_embedding_A": (4, 7)}, r"view.lora_embedding_A \(adapters of embeddings are not supported\)"),
        ({"base_model.model.final_layer.linear.weight": (64, 64)}, r"final_layer.linear.weight \(unknown\)"),
        ({f"{Q}.lora_down.weight": (4, 64)}, r"\(the same as .*lora_(A|down).weight\)"),
        (halves("transformer_blocks.0.attn1.to_q"), rf"another adapter for {Q}.weight"),
        ({f"{Q}.alpha": ()}, r"states alpha in 1 tensors, and in .*adapter_config.json; only one may"),
    ],
)
def test_every_key_must_fit(tmp_path: Path, extra: dict, text: str) -> None:
    with pytest.raises(InputError, match=text) as error:
        read_lora(adapter(tmp_path / "x", GOOD | extra, FINE), NAMES)
    assert str(tmp_path / "x") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "config, text",
    [
        (FINE | {"use_dora": True}, "use_dora is True; only plain LoRA is supported"),
        (FINE | {"use_qalora": True}, "use_qalora is True"),
        (FINE | {"lora_bias": True}, "lora_bias is True"),
        (FINE | {"modules_to_save": ["final_layer"]}, r"modules_to_save is \['final_layer'\]"),
        (FINE | {"kasa_config": {"rank": 2}}, "kasa_config is"),
        (FINE | {"invented_later": True}, "invented_later is True"),
        (FINE | {"bias": "all"}, "bias is 'all'; allowed are none"),
        (FINE | {"peft_type": "LOHA"}, "peft_type is 'LOHA'; allowed are LORA"),
        (FINE | {"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'; allowed are True"),
        ({"lora_alpha": 8}, "r of r is None; allowed are whole numbers of at least 1"),
        (FINE | {"r": 0}, "r of r is 0"),
        ({"r": 4}, "lora_alpha of lora_alpha is None; allowed are finite numbers"),
        (FINE | {"lora_alpha": "8"}, "lora_alpha is '8'"),
        (FINE | {"lora_alpha": math.nan}, "lora_alpha is nan"),
        (FINE | {"alpha_pattern": {"q_proj": None}}, "lora_alpha of q_proj is None"),
        (FINE | {"rank_pattern": {"q_proj[": 4}}, "rank_pattern is .* allowed are patterns and numbers"),
        (FINE | {"rank_pattern": [4]}, r"rank_pattern is \[4\]; allowed are patterns and numbers"),
        (FINE | {"rank_pattern": {"q_proj": 8}}, rf"gives {Q} the rank 8, its tensors have 4"),
        (FINE | {"r": 8}, rf"gives {Q} the rank 8, its tensors have 4"),
        ("{", "is no JSON table of PEFT's options"),
        ("[1]", "is no JSON table of PEFT's options"),
    ],
)
def test_options_that_are_not_plain_lora_are_refused(tmp_path: Path, config: dict | str, text: str) -> None:
    with pytest.raises(InputError, match=text) as error:
        read_lora(adapter(tmp_path / "x", GOOD, config), NAMES)
    assert "adapter_config.json" in str(error.value) and "\n" not in str(error.value)


def test_options_of_a_header_are_checked_as_well(tmp_path: Path) -> None:
    tensors = {key: torch.ones(shape) for key, shape in GOOD.items()}
    save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps({"transformer.r": 4})})
    with pytest.raises(InputError, match="the header of .*x.safetensors: lora_alpha of lora_alpha is None"):
        read_lora(tmp_path / "x.safetensors", NAMES)


def test_files_that_hold_no_lora(net: DiT, tmp_path: Path) -> None:
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    with pytest.raises(InputError, match=f"net.safetensors holds no LoRA: none of its {len(NAMES)} keys is"):
        read_lora(tmp_path / "net.safetensors", NAMES)
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(InputError, match="empty.safetensors holds no LoRA: none of its 0 keys is"):
        read_lora(tmp_path / "empty.safetensors", NAMES)
    with pytest.raises(InputError, match="holds no LoRA: it has none of adapter_model.safetensors, "):
        read_lora(tmp_path, NAMES)
    with pytest.raises(InputError, match="no such file"):
        read_lora(tmp_path / "gone.safetensors", NAMES)
    adapter(tmp_path, GOOD, FINE)
    save_file({"x": torch.ones(1)}, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(InputError, match="several LoRAs, name one: adapter_model.safetensors, pytorch_lora_weights"):
        read_lora(tmp_path, NAMES)


def test_in_a_whole_model_what_is_no_weight_of_it_is_refused(net: DiT, tmp_path: Path) -> None:
    official_file(net, tmp_path / "model.pt", averaged=False)
    table = torch.load(tmp_path / "model.pt", weights_only=True)
    torch.save(table | {"net.base_model.model.action_embedder.fc1.weight": torch.ones(2, 2)}, tmp_path / "model.pt")
    with pytest.raises(InputError, match="1 keys cannot be used: net.*action_embedder.fc1.weight .unknown"):
        read_lora(tmp_path / "model.pt", NAMES)


@pytest.mark.parametrize("half, value", [("A", math.nan), ("B", math.inf)])
def test_values_that_are_not_finite_are_refused(half: str, value: float) -> None:
    tensors = {key: torch.ones(shape) for key, shape in GOOD.items()}
    tensors[f"base_model.model.{Q}.lora_{half}.weight"][3, 3] = value
    with pytest.raises(InputError, match="not finite floating-point numbers"):
        lora_from_tensors(tensors, NAMES, "x")
    with pytest.raises(InputError, match="not finite floating-point numbers"):
        lora_from_tensors({key: torch.ones(shape, dtype=torch.int32) for key, shape in GOOD.items()}, NAMES, "x")


@pytest.mark.parametrize(
    "alphas, text",
    [
        ({f"{Q}.alpha": [2.0]}, "states alpha for 1 of its 2 modules; it must for all or none"),
        ({f"{Q}.alpha": [2.0], f"{Q1}.alpha": [1.0, 1.0]}, "blocks.1.*alpha must be one finite number, got .1.0, 1.0"),
        ({f"{Q}.alpha": [math.inf], f"{Q1}.alpha": [1.0]}, "blocks.0.*alpha must be one finite number, got .inf"),
    ],
)
def test_tensors_of_alpha_are_checked(alphas: dict, text: str) -> None:
    tensors = {key: torch.ones(shape) for key, shape in (halves(Q) | halves(Q1)).items()}
    tensors |= {key: torch.tensor(value) for key, value in alphas.items()}
    with pytest.raises(InputError, match=text):
        lora_from_tensors(tensors, NAMES, "x")


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_the_scale_must_be_finite(tmp_path: Path, scale: float) -> None:
    with pytest.raises(InputError, match=f"x: the scale of a LoRA must be a finite number, got {scale}"):
        read_lora(adapter(tmp_path / "x", GOOD, FINE), NAMES, scale)


def test_a_pair_must_fit_together() -> None:
    for a, b in (((4, 64), (64, 3)), ((4,), (64, 4)), ((0, 64), (64, 0))):
        with pytest.raises(ValueError, match="do not fit"):
            LoraPair(torch.ones(a), torch.ones(b), 1.0)
