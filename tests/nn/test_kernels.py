"""The function in front of the attention kernels: the reference, the others (by stand-ins where there is no GPU), the
measuring, and what is said."""

import dataclasses
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from orrery.nn import kernels
from orrery.nn.kernels import KERNELS, Kernel, Package, attention, choose, find_kernel, measure, using
from orrery.world.memory import peak_bytes

Shape = tuple[int, int, int, int]


@pytest.fixture(autouse=True)
def reset() -> Iterator[None]:
    """Nothing that was imported, set or chosen outlives a test."""
    kernels._function.cache_clear()
    yield
    kernels._function.cache_clear()
    kernels._choices.clear()
    assert kernels.current_kernel() == "sdpa"


def qkv(queries: Shape = (2, 7, 3, 16), keys: Shape = (2, 9, 3, 16)) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape, generator=generator) for shape in (queries, keys, keys))
    return q, k, v


def spelled_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhqk,bkhd->bqhd", weights.softmax(-1), v)


def stand_in(name: str, run: Callable[..., Tensor], exact: bool = True) -> Kernel:
    return Kernel(name, exact, run, dtypes=None, capabilities=None)


def tripled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Tells itself apart from the reference."""
    return 3 * spelled_out(q, k, v)


def test_attention_is_its_definition() -> None:
    q, k, v = qkv()
    assert torch.allclose(attention(q, k, v), spelled_out(q, k, v), atol=1e-6)


def test_keys_of_batch_one_serve_every_item() -> None:
    q, k, v = qkv(keys=(1, 9, 3, 16))
    expected = torch.cat([spelled_out(one, k, v) for one in q.split(1)])
    assert torch.allclose(attention(q, k, v), expected, atol=1e-6)


def test_other_kernels_are_given_keys_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append((k.stride(0), v.stride(0), k.shape[0]))
        return spelled_out(q, k, v)

    monkeypatch.setitem(KERNELS, "other", stand_in("other", run))
    with using("other"):
        attention(*qkv(keys=(1, 9, 3, 16)))
    assert seen == [(9 * 3 * 16, 9 * 3 * 16, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_and_their_gradients_are_those_of_sdpa(dtype: torch.dtype) -> None:
    found = []
    for name in ("products", "sdpa"):
        q, k, v = (each.detach().to(dtype).requires_grad_() for each in qkv())
        with using(name, dtype):
            out = attention(q, k, v)
        out.float().square().sum().backward()
        assert out.dtype == dtype
        found.append([out, q.grad, k.grad, v.grad])
    for mine, theirs in zip(*found, strict=True):
        assert (mine - theirs).abs().max() < {torch.float32: 2e-6, torch.bfloat16: 0.02}[dtype] * theirs.abs().max()


def test_a_kernel_that_holds_all_scores_is_not_tried_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu(monkeypatch, (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
    monkeypatch.setattr(kernels, "random_qkv", lambda *_: (None, None, None))
    tried: list[str] = []

    def measured(candidates: dict[str, object], device: torch.device) -> kernels.Measured:
        tried.extend(candidates)
        return kernels.Measured(best="sdpa")

    monkeypatch.setattr(kernels, "measure", measured)
    kernels._measured_choice((1, 8, 1, 16), (1, 8, 1, 16), torch.bfloat16, torch.device("cuda"))
    assert "sdpa" in tried and "products" not in tried


@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
def test_sdpa_can_be_held_to_a_kernel(backend: SDPBackend) -> None:
    q, k, v = qkv()
    assert torch.allclose(kernels._held_to(backend)(q, k, v), spelled_out(q, k, v), atol=1e-6)


@pytest.mark.parametrize(
    "name, module, in_tuple",
    [
        ("flash-attn-2", "flash_attn", False),
        ("flash-attn-3", "flash_attn_interface", False),
        ("flash-attn-3", "flash_attn_3.flash_attn_interface", True),  # some versions return the log-sum-exp too
        ("flash-attn-4", "flash_attn.cute", True),
        ("sage-attention", "sageattention", False),
    ],
)
def test_packages_are_called_as_they_are_written(
    name: str, module: str, in_tuple: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    def function(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor | tuple[Tensor, Tensor]:
        given.append(options)
        assert q.shape == (2, 7, 3, 16) and k.shape == v.shape == (2, 9, 3, 16)
        out = spelled_out(q, k, v)
        return (out, out[..., 0]) if in_tuple else out

    for part in {module.split(".")[0], module}:
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    setattr(sys.modules[module], "sageattn" if name == "sage-attention" else "flash_attn_func", function)
    q, k, v = qkv()
    assert torch.allclose(KERNELS[name].run(q, k, v), spelled_out(q, k, v), atol=1e-6)
    assert given == [{"tensor_layout": "NHD"} if name == "sage-attention" else {}]


def test_why_a_package_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    missing = Package(("orrery_no_such_package", "orrery_nor_this"), "f")
    assert missing.problem() == "the package orrery_no_such_package is not installed"
    assert Package(("orrery_no_such.part",), "f").problem() == "the package orrery_no_such.part is not installed"
    (tmp_path / "orrery_half_there.py").write_text("import orrery_what_it_needs")
    monkeypatch.syspath_prepend(tmp_path)
    half = Package(("orrery_half_there", "orrery_no_such_package"), "f")
    assert half.problem() == "the package orrery_half_there cannot be used: No module named 'orrery_what_it_needs'"
    monkeypatch.setitem(sys.modules, "orrery_broken", types.ModuleType("orrery_broken"))
    assert "orrery_broken cannot be used: module 'orrery_broken' has no" in Package(("orrery_broken",), "f").problem()


def on_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)


def test_what_a_gpu_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu(monkeypatch, (12, 0))
    find = {name: kernel.unavailable(torch.bfloat16, "cuda") for name, kernel in KERNELS.items()}
    assert [name for name, reason in find.items() if not reason][:5] == [
        "sdpa", "products", "sdpa-cudnn", "sdpa-flash", "sdpa-efficient",
    ]  # fmt: skip
    assert find["flash-attn-3"] == "it is built for compute capability 9.x, this GPU has 12.0"
    assert "torch.float32" in KERNELS["sdpa-flash"].unavailable(torch.float32, "cuda")
    assert not KERNELS["sdpa-efficient"].unavailable(torch.float32, "cuda")


def test_unknown_and_unavailable_kernels_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"'flash'; allowed are sdpa, products; not available are .*flash-attn-3.*CUDA GPU"
    ):
        find_kernel("flash", device="cpu")
    with pytest.raises(ValueError, match=r"'flash-attn-3' is not available: it needs a CUDA GPU.*available are sdpa"):
        find_kernel("flash-attn-3", device="cpu")


def test_a_kernel_set_for_a_gpu_is_not_replaced_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu(monkeypatch, (9, 0))
    with using("sdpa-cudnn"), pytest.raises(ValueError, match="'sdpa-cudnn' needs a CUDA GPU, the tensors are on cpu"):
        attention(*qkv())


def test_a_dtype_that_a_kernel_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel("half", True, spelled_out, (torch.float16,), None)
    monkeypatch.setitem(KERNELS, "half", kernel)
    with using("half", torch.float16), pytest.raises(ValueError, match="'half' takes .*float16.*got torch.float32"):
        attention(*qkv())


def test_using_nests_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KERNELS, "tripled", stand_in("tripled", tripled))
    q, k, v = qkv()
    plain = attention(q, k, v)
    with using("tripled"):
        assert torch.allclose(attention(q, k, v), 3 * plain, atol=1e-5)
        with using("sdpa"):
            assert torch.equal(attention(q, k, v), plain)
        with pytest.raises(RuntimeError), using("sdpa"):
            raise RuntimeError
        assert kernels.current_kernel() == "tripled"
    assert torch.equal(attention(q, k, v), plain)


def test_threads_whose_blocks_overlap_leave_what_was(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("first", "second"):
        monkeypatch.setitem(KERNELS, name, stand_in(name, tripled))
    entered, left = threading.Event(), threading.Event()

    def other() -> None:
        with using("second"):
            entered.set()
            left.wait(10)

    with using("first"):
        thread = threading.Thread(target=other)
        thread.start()
        assert entered.wait(10)
    assert kernels.current_kernel() == "second"
    left.set()
    thread.join(10)
    assert kernels.current_kernel() == "sdpa"


def test_on_meta_it_is_always_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a plan counts a fused kernel's memory, whichever kernel is set."""
    monkeypatch.setitem(KERNELS, "tripled", stand_in("tripled", tripled))
    q = torch.empty(1, 1000, 4, 16, device="meta")
    with using("tripled"):
        assert peak_bytes(lambda: attention(q, q, q)) == q.numel() * 4


@pytest.mark.parametrize("package", [False, True])
def test_compiled_without_a_break_and_told_of_a_change(package: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Package(("orrery_stand_in",), "run") if package else tripled
    module = types.ModuleType("orrery_stand_in")
    vars(module)["run"] = lambda q, k, v: (tripled(q, k, v).transpose(1, 2).contiguous().transpose(1, 2), None)
    monkeypatch.setitem(sys.modules, "orrery_stand_in", module)
    monkeypatch.setitem(KERNELS, "tripled", stand_in("tripled", run))
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k, v: attention(q, k, v) + 1, backend="aot_eager", fullgraph=True)
    q, k, v = qkv(keys=(1, 9, 3, 16))
    plain = attention(q, k, v)
    assert torch.allclose(compiled(q, k, v), plain + 1, atol=1e-6)
    with using("tripled"):
        assert torch.allclose(compiled(q, k, v), 3 * plain + 1, atol=1e-5)
    assert torch.allclose(compiled(q, k, v), plain + 1, atol=1e-6)


def test_gradients_of_packages_and_none_of_inexact_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("orrery_stand_in")
    vars(module)["run"] = tripled
    monkeypatch.setitem(sys.modules, "orrery_stand_in", module)
    kernel = stand_in("tripled", Package(("orrery_stand_in",), "run"))
    monkeypatch.setitem(KERNELS, "tripled", kernel)
    monkeypatch.setitem(KERNELS, "rough", dataclasses.replace(kernel, name="rough", exact=False))
    q, k, v = qkv()
    q.requires_grad_()
    (expected,) = torch.autograd.grad(3 * attention(q, k, v).sum(), q)
    with using("tripled"):
        (found,) = torch.autograd.grad(attention(q, k, v).sum(), q)
    assert torch.allclose(found, expected, atol=1e-5)
    monkeypatch.setattr(kernels, "SAMPLE", (1, 8, 2, 16))
    with using("rough", torch.float32), pytest.raises(ValueError, match="'rough', which has no gradients; allowed"):
        attention(q, k, v)


def test_an_inexact_kernel_says_how_inexact(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def rough(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return 1.25 * F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    monkeypatch.setitem(KERNELS, "rough", stand_in("rough", rough, exact=False))
    monkeypatch.setattr(kernels, "SAMPLE", (1, 8, 2, 16))
    with using("rough", torch.float32, "cpu"):
        pass
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "rough, which is inexact" in said and "25.00%" in said
    with using("sdpa"):
        pass
    assert not capsys.readouterr().err


def test_measuring_keeps_the_fastest_that_is_right() -> None:
    base = torch.randn(1, 400, 400, 1)

    def slow() -> Tensor:
        for _ in range(200):
            out = base * 2
        return out

    def fails() -> Tensor:
        raise AssertionError("head dim 80 is not\nsupported")

    result = measure(
        {"slow": slow, "fast": lambda: base * 2, "wrong": lambda: base, "nan": lambda: base * torch.nan, "bad": fails},
        torch.device("cpu"),
    )
    assert result.best == "fast" and set(result.milliseconds) == {"slow", "fast"}
    assert result.refused["bad"] == "head dim 80 is not supported"
    assert result.refused["wrong"] == "its answer is 5.0e-01 away from that of slow"
    assert "nan" in result.refused
    assert str(result).startswith("fast ") and "left out: " in str(result)
    with pytest.raises(AssertionError):
        measure({"bad": fails}, torch.device("cpu"))


def test_the_reference_stays_where_nothing_is_clearly_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1.0, 1.0, 1.0, 0.99, 0.99, 0.99])
    monkeypatch.setattr(kernels, "_milliseconds", lambda run, device: next(times))
    one = torch.ones(1, 1, 1, 1)
    assert measure({"a": lambda: one, "b": lambda: one}, torch.device("cpu")).best == "a"


def test_choosing_on_a_cpu_measures_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert choose((1, 10**9, 16, 128), (1, 10**9, 16, 128), torch.bfloat16, "cpu") == "sdpa"
    assert not capsys.readouterr().err


def test_a_choice_is_made_once_for_a_class_of_shapes_and_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    on_gpu(monkeypatch, (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
    monkeypatch.setattr(Package, "problem", lambda package: f"no {package.modules[0]}")
    monkeypatch.setattr(kernels, "random_qkv", lambda q, kv, dtype, device: qkv(q, kv))
    asked = []

    def fake_measure(candidates: dict[str, Callable[[], Tensor]], device: torch.device) -> kernels.Measured:
        asked.append(list(candidates))
        return kernels.Measured({"sdpa": 2.0, "sdpa-cudnn": 1.0}, {"sdpa-flash": "no"}, "sdpa-cudnn")

    monkeypatch.setattr(kernels, "measure", fake_measure)
    shape = (1, 40, 2, 16)
    assert choose(shape, shape, torch.bfloat16, "cuda") == "sdpa-cudnn"
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "sdpa-cudnn, as measured: sdpa-cudnn 1 ms, sdpa 2 ms; left out: " in said
    assert "flash-attn-2 (no flash_attn)" in said and "sage" not in said
    assert choose((1, 50, 2, 16), (1, 50, 2, 16), torch.bfloat16, "cuda") == "sdpa-cudnn"
    assert not capsys.readouterr().err
    choose((1, 80, 2, 16), (1, 80, 2, 16), torch.bfloat16, "cuda")
    assert asked == [["sdpa", "sdpa-cudnn", "sdpa-flash", "sdpa-efficient"]] * 2


def test_measuring_leaves_the_seed_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    kernels.random_qkv((1, 8, 2, 4), (1, 8, 2, 4), torch.float32, torch.device("cpu"))
    assert torch.equal(torch.rand(2), expected)
