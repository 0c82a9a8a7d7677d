"""8-bit weights: every rule of the rounding against an emulation written another way, and what stays as it was."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orrery.errors import InputError
from orrery.nn.control import ActiveControl, ControlBranch, ControlConfig
from orrery.nn.dit import PRESETS, Conditions, DiT, DiTConfig
from orrery.nn.offload import StreamedBlocks
from orrery.nn.quantise import (
    FP8,
    WAYS,
    QuantisedLinear,
    dequantised,
    fp8_linear,
    fp8_problem,
    quantise,
    quantise_rows,
)
from orrery.weights.lora import Lora, LoraPair, merge
from orrery.weights.sources import find_model
from orrery.weights.store import load_part

CONFIG = DiTConfig(
    width=48, depth=3, heads=2, adaln_rank=8, text_dim=16, context_dim=32, padding_mask=False, rope_bf16=False,
    max_size=(8, 8, 8),
)  # fmt: skip
LAYERS = 10  # of a block: q, k, v and output of two attentions, two of the MLP


def random_net(dtype: torch.dtype = torch.float32, config: DiTConfig = CONFIG) -> DiT:
    """Nothing zero, frozen."""
    torch.manual_seed(0)
    net = DiT(config)
    for layer in net.zero_initialised():
        nn.init.normal_(layer.weight, std=0.5 * layer.in_features**-0.5)
    return net.to(dtype).eval().requires_grad_(False)


def random_branch(net: DiT) -> ControlBranch:
    branch = ControlBranch(net.config, ControlConfig(blocks=2, every=1, channels=16)).initialise(net)
    for layer in branch.zero_initialised():
        nn.init.normal_(layer.weight, std=0.1)
        nn.init.normal_(layer.bias, std=0.1)
    return branch.eval().requires_grad_(False)


def call() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(2, 16, 2, 4, 4), torch.tensor([100.0, 900.0]), torch.randn(1, 5, 16)


def velocity(net: DiT, branch: ControlBranch | None = None) -> Tensor:
    latents, times, text = call()
    controls = [] if branch is None else [ActiveControl(branch, latents[:1] * 0.5)]
    return net(latents, times, Conditions(text, controls=controls))


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def nearest(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The nearest number, of two the even one; e4m3 from its definition: 3 bits of mantissa, exponents -6 to 8."""
    if dtype == torch.int8:
        return np.rint(values)
    exponent = np.floor(np.log2(np.maximum(np.abs(values), 2.0**-6)))
    step = 2.0 ** (exponent - 3)
    return np.rint(values / step) * step


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.int8, FP8])
def test_rows_are_rounded_to_the_nearest_number(dtype: torch.dtype, given: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(8, 512) * torch.logspace(-6, 6, 8)[:, None]).to(given)
    rounded, scale = quantise_rows(x, dtype)
    assert rounded.dtype == dtype and scale.dtype == torch.float32 and scale.shape == (8, 1)
    largest = 127 if dtype == torch.int8 else 448
    steps = x.double().abs().amax(1, keepdim=True) / largest
    assert torch.allclose(scale.double(), steps, rtol=1e-6, atol=0)
    divided = x / scale if dtype == torch.int8 else (x / scale).to(given)
    expected = nearest(divided.double().numpy(), dtype)
    assert np.array_equal(rounded.float().numpy(), expected)
    assert (rounded.float().abs().amax(1) == largest).all()


@pytest.mark.parametrize("dtype", [torch.int8, FP8])
def test_a_row_of_zeros_and_a_tiny_row_stay_finite(dtype: torch.dtype) -> None:
    x = torch.tensor([[0.0, 0.0], [1e-30, -1e-30], [3e38, -1e38]])
    rounded, scale = quantise_rows(x, dtype)
    back = rounded.float() * scale
    assert back.isfinite().all() and (back[0] == 0).all()
    assert relative(back[2] / 1e38, x[2] / 1e38) < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [torch.int8, FP8])
def test_dequantising_rounds_once(kind: torch.dtype, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rounded, scale = quantise_rows(torch.randn(16, 32), kind)
    found = dequantised(rounded, scale, dtype)
    assert found.dtype == dtype
    assert torch.equal(found, (rounded.float() * scale).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fp8_multiplies_the_rounded_numbers(dtype: torch.dtype) -> None:
    """Against float64 over numbers rounded by hand."""
    torch.manual_seed(0)
    x, weight = (3 * torch.randn(2, 3, 64)).to(dtype), torch.randn(32, 64)
    qweight, scale = quantise_rows(weight, FP8)
    found = fp8_linear(x, qweight, scale)
    assert found.shape == (2, 3, 32) and found.dtype == dtype
    row_scale = (x.float().abs().amax(-1, keepdim=True) / 448).double()
    rows = nearest((x.double() / row_scale).to(dtype).double().numpy(), FP8) * row_scale.numpy()
    columns = nearest((weight / scale).double().numpy(), FP8) * scale.double().numpy()
    expected = rows @ columns.T
    # a number on the border of two may go either way: one in a thousand at most
    assert relative(found, torch.from_numpy(expected)) < {torch.float32: 1e-3}.get(dtype, 6e-3)
    assert 0.01 < relative(found, F.linear(x.float(), weight)) < 0.06


def test_the_kernel_of_torch_multiplies_the_same_numbers() -> None:
    """torch's own float8 product, which a GPU runs, on the CPU: layouts and scales as `fp8_linear` passes them."""
    torch.manual_seed(0)
    x, weight = torch.randn(48, 64), torch.randn(32, 64)
    qweight, scale = quantise_rows(weight, FP8)
    rows, row_scale = quantise_rows(x, FP8)
    theirs = torch._scaled_mm(
        rows, qweight.t(), scale_a=row_scale, scale_b=scale.view(1, -1), out_dtype=torch.bfloat16, use_fast_accum=True
    )
    assert relative(theirs, fp8_linear(x, qweight, scale)) < 3e-3  # bfloat16's rounding


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_whole_network_against_one_with_rounded_weights(how: str, dtype: torch.dtype) -> None:
    net = random_net(dtype)
    exact, emulated = velocity(net), copy.deepcopy(net)
    report = quantise(net, how)
    for name in report.errors:
        layer = emulated.get_submodule(name)
        rounded, scale = quantise_rows(layer.weight, torch.int8 if how == "int8" else FP8)
        layer.weight.data = (rounded.float() * scale).to(dtype)
        if how == "fp8":
            layer.register_forward_pre_hook(lambda module, args: tuple(map(_through_float8, args)))
    found, expected = velocity(net), velocity(emulated)
    bound = 2e-3 if dtype == torch.float32 else 1.5e-2 if how != "fp8" else 3e-2  # float8 enlarges what bfloat16 rounds
    assert relative(found, expected) < bound
    assert (1e-3 if how == "int8" else 5e-3) < relative(found, exact) < (0.03 if how == "int8" else 0.1)


def _through_float8(x: Tensor) -> Tensor:
    rounded, scale = quantise_rows(x.flatten(0, -2), FP8)
    return (rounded.float() * scale).to(x.dtype).view_as(x)


@pytest.mark.parametrize("how", WAYS)
def test_what_is_replaced_and_what_stays(how: str) -> None:
    net, branch = random_net(), random_branch(random_net())
    before, plain = copy.deepcopy(net), velocity(net, branch)
    report = quantise(net, how, keep=(0, -1))
    names = [f"blocks.1.{name}" for name, _ in _layers(before.blocks[1])]
    assert list(report.errors) == names and len(names) == LAYERS
    assert len(report.kept) == 2 * LAYERS and all(name.startswith(("blocks.0.", "blocks.2.")) for name in report.kept)
    assert [name for name, module in net.named_modules() if isinstance(module, QuantisedLinear)] == names
    left = dict(net.named_parameters())
    for name, parameter in before.named_parameters():
        assert name.removesuffix(".weight") in names or torch.equal(left[name], parameter)
    of_branch = quantise(branch, how)
    assert len(of_branch.errors) == 2 * LAYERS and of_branch.kept == ()
    assert all(isinstance(layer, nn.Linear) for layer in branch.zero_initialised())
    assert 0 < relative(velocity(net, branch), plain) < 0.1


def _layers(block: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [
        (f"{part}.{name}", module)
        for part in ("self_attn", "cross_attn", "mlp")
        for name, module in block.get_submodule(part).named_modules()
        if isinstance(module, nn.Linear)
    ]


def test_by_default_the_last_block_stays() -> None:
    report = quantise(random_net(), "int8")
    assert {name.split(".")[1] for name in report.errors} == {"0", "1"}
    assert {name.split(".")[1] for name in report.kept} == {"2"}
    assert len(quantise(random_net(config=dataclasses.replace(CONFIG, depth=1)), "int8").errors) == LAYERS


def test_image_context_is_quantised_too() -> None:
    net = random_net(config=dataclasses.replace(CONFIG, image_context=16))
    report = quantise(net, "int8")
    assert [name for name in report.errors if "_img" in name] == [
        f"blocks.{index}.cross_attn.{name}_img" for index in (0, 1) for name in "qkv"
    ]
    assert velocity(net).isfinite().all()


def test_the_report_counts_bytes_and_errors() -> None:
    net = random_net()
    weights = {name: net.get_submodule(name).weight.clone() for name, _ in _named_layers(net)}
    report = quantise(net, "int8", keep=())
    gone = sum(weight.numel() for weight in weights.values())
    scales = sum(len(weight) for weight in weights.values())
    assert report.before - report.after == gone * 4 - gone - scales * 4
    assert report.after == sum(parameter.nbytes for parameter in net.parameters())
    for name, weight in weights.items():
        layer = net.get_submodule(name)
        expected = relative(layer.qweight.double() * layer.scale.double(), weight)
        assert report.errors[name] == pytest.approx(expected, rel=1e-4) and 0.002 < expected < 0.02
    worst = max(report.errors.values())
    assert str(report).startswith("int8: 30 linear layers in 8 bits (0 kept)") and f"{worst:.2%}" in str(report)
    assert not report.emulated and quantise(random_net(), "fp8").emulated


def _named_layers(net: DiT) -> list[tuple[str, nn.Linear]]:
    return [(f"blocks.{i}.{name}", layer) for i, block in enumerate(net.blocks) for name, layer in _layers(block)]


@pytest.mark.parametrize("how", WAYS)
def test_weights_move_with_the_network_and_keep_their_dtype(how: str) -> None:
    net = random_net()
    quantise(net, how)
    expected = velocity(net)
    held = {name: p.clone() for name, p in net.named_parameters() if "qweight" in name or "scale" in name}
    assert len(held) == 4 * LAYERS and not any(p.requires_grad for p in net.parameters())
    net.to(torch.bfloat16)
    for name, parameter in net.named_parameters():
        if name in held:
            assert parameter.dtype == held[name].dtype and torch.equal(parameter.float(), held[name].float())
        else:
            assert parameter.dtype == torch.bfloat16
    assert 0 < relative(velocity(net), expected) < 0.05
    assert {p.device.type for p in net.to("meta").parameters()} == {"meta"}


@pytest.mark.parametrize("how", WAYS)
def test_on_the_meta_device_it_has_shapes_and_bytes_but_no_errors(how: str) -> None:
    """What plans are made with."""
    real = quantise(random_net(), how)
    with torch.device("meta"):
        net = DiT(CONFIG)
        counted = quantise(net, how)
        latents, times, text = (tensor.to("meta") for tensor in call())
        assert net(latents, times, Conditions(text)).shape == latents.shape
    assert (counted.before, counted.after, list(counted.errors)) == (real.before, real.after, list(real.errors))
    assert all(error != error for error in counted.errors.values())


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("resident", [0, 1])
def test_quantised_blocks_can_be_streamed(how: str, resident: int) -> None:
    net = random_net(torch.bfloat16)
    quantise(net, how)
    expected = velocity(net)
    net.walk = StreamedBlocks(net.blocks, "cpu", resident)
    assert all(torch.equal(velocity(net), expected) for _ in range(2))


def test_a_gradient_reaches_what_comes_before() -> None:
    torch.manual_seed(0)
    rounded, scale = quantise_rows(torch.randn(8, 16), torch.int8)
    x = torch.randn(3, 16, requires_grad=True)
    QuantisedLinear(rounded, scale)(x).sum().backward()
    assert torch.allclose(x.grad, (rounded.float() * scale).sum(0).expand(3, -1), atol=1e-5)


def test_loras_go_in_before_and_not_after() -> None:
    name = "blocks.0.mlp.layer1.weight"
    plain, changed, late = random_net(), random_net(), random_net()
    a, b = torch.randn(2, 48), torch.randn(192, 2)
    lora = Lora("of a test", {name: LoraPair(a, b, 0.1)})
    merge(changed, [lora])
    for net in (plain, changed, late):
        quantise(net, "int8")
    assert relative(velocity(changed), velocity(plain)) > 0.01
    held = {key: value.clone() for key, value in late.state_dict().items()}
    with pytest.raises(InputError, match="blocks.0.mlp.layer1.weight of .*missing"):
        merge(late, [lora])
    assert all(torch.equal(value.float(), held[key].float()) for key, value in late.state_dict().items())


def test_a_merge_cannot_be_undone_after_quantising() -> None:
    net = random_net()
    merged = merge(
        net, [Lora("of a test", {"blocks.0.mlp.layer1.weight": LoraPair(torch.ones(2, 48), torch.ones(192, 2), 1.0)})]
    )
    quantise(net, "int8")
    with pytest.raises(KeyError, match="blocks.0.mlp.layer1.weight"):
        merged.undo()


def test_what_cannot_be_quantised_is_refused_untouched() -> None:
    net = random_net()
    for wrong, how, keep, message in (
        (nn.Linear(4, 4), "int8", (), "only a DiT or a ControlBranch can be quantised, got Linear"),
        (net.blocks[0], "int8", (), "got Block"),
        (net, "int4", (), "how is 'int4'; allowed are int8, fp8"),
        (net, "int8", (3,), "keep names block 3; allowed are -3 to 2"),
        (net, "int8", (0, 1, 2), "leave nothing to quantise"),
    ):
        with pytest.raises(ValueError, match=message):
            quantise(wrong, how, keep=keep)
    assert not any(isinstance(module, QuantisedLinear) for module in net.modules())
    quantise(net, "int8")
    with pytest.raises(ValueError, match="quantised already"):
        quantise(net, "fp8")
    streamed = random_net()
    streamed.walk = StreamedBlocks(streamed.blocks, "cpu")
    with pytest.raises(ValueError, match="quantise before blocks are streamed"):
        quantise(streamed, "int8")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("how", WAYS)
def test_weights_that_are_not_finite_are_refused(how: str, value: float) -> None:
    net = random_net()
    net.blocks[1].mlp.layer2.weight[3, 5] = value
    with pytest.raises(ValueError, match="blocks.1.mlp.layer2 holds weights that are not finite"):
        quantise(net, how)


def test_layers_that_float8_kernels_cannot_take_stay() -> None:
    net = random_net(config=dataclasses.replace(CONFIG, context_dim=24))
    report = quantise(net, "fp8", keep=())
    assert report.kept == tuple(f"blocks.{i}.cross_attn.{name}_proj" for i in range(3) for name in "kv")
    assert not quantise(random_net(config=dataclasses.replace(CONFIG, context_dim=24)), "int8", keep=()).kept


def test_an_old_gpu_refuses_fp8_and_says_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "compute capability 8.9, this one has 8.0: int8 runs" in fp8_problem(torch.device("cuda"))
    with pytest.raises(ValueError, match="this one has 8.0"):
        quantise(random_net(), "fp8", device="cuda")
    for capability in ((8, 9), (9, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert fp8_problem(torch.device("cuda")) == ""
    assert fp8_problem(torch.device("cpu")) == ""


def test_the_model_in_the_package_stays_close() -> None:
    """With its trained weights; on real latents and texts it is closer (0.3 % in int8, 1.1 to 1.7 % in float8)."""
    trained = load_part(find_model("mini"), "transformer").eval().requires_grad_(False)
    assert trained.config == PRESETS["mini"]
    torch.manual_seed(0)
    latents, text = torch.randn(1, 16, 3, 8, 8), torch.randn(1, 40, 256)

    def run(net: DiT) -> Tensor:
        return net(latents, torch.tensor([700.0]), Conditions(text))

    expected, off = run(trained), {}
    for how in WAYS:
        net = copy.deepcopy(trained)
        report = quantise(net, how)
        off[how] = relative(run(net), expected)
        assert report.after < 0.5 * report.before
    assert 0.001 < off["int8"] < 0.008
    assert 3 * off["int8"] < off["fp8"] < 0.05
