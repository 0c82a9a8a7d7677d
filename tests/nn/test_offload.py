"""Streamed blocks: the same numbers bit for bit, two blocks' weights at a time, usable again after an exception."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from orrery.nn.dit import Conditions, DiT, DiTConfig
from orrery.nn.offload import StreamedBlocks

CONFIG = DiTConfig(
    width=48, depth=3, heads=2, adaln_rank=8, text_dim=16, context_dim=24, padding_mask=False, rope_bf16=False,
    max_size=(8, 8, 8),
)  # fmt: skip


def random_net(depth: int, dtype: torch.dtype = torch.float32) -> DiT:
    """Nothing zero, so that every block matters; frozen, as models are loaded."""
    torch.manual_seed(depth)
    net = DiT(dataclasses.replace(CONFIG, depth=depth))
    for parameter in net.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    return net.to(dtype).eval().requires_grad_(False)


def call(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, times and text."""
    torch.manual_seed(seed)
    return torch.randn(2, 16, 2, 4, 4), torch.tensor([100.0 * seed, 900.0]), torch.randn(1, 5, 16)


def answers(net: DiT, seed: int) -> list[Tensor]:
    """Velocities with text and with text encoded before, and that text's keys and values, all by `net`."""
    latents, times, text = call(seed)
    context = net.encode_text(text)
    velocities = [net(latents, times, Conditions(each)) for each in (text, context)]
    return velocities + [tensor for layer in context.layers for tensor in layer]


def resident_numbers(net: DiT) -> list[int]:
    return [sum(parameter.numel() for parameter in block.parameters()) for block in net.blocks]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_the_same_numbers_call_after_call(depth: int, dtype: torch.dtype) -> None:
    net = random_net(depth, dtype)
    expected = [answers(net, seed) for seed in range(3)]
    assert not torch.equal(expected[0][0], expected[1][0])
    net.walk = StreamedBlocks(net.blocks, "cpu")
    for seed in (0, 1, 2, 0):
        found = answers(net, seed)
        assert len(found) == len(expected[seed]) == 2 + 2 * depth
        assert all(torch.equal(a, b) for a, b in zip(found, expected[seed])), seed


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_no_more_than_two_blocks_are_here(depth: int) -> None:
    net = random_net(depth)
    one = resident_numbers(net)[0]
    weights = [[p.clone() for p in block.parameters()] for block in net.blocks]
    streamed = StreamedBlocks(net.blocks, "cpu")
    assert resident_numbers(net) == [0] * depth
    assert streamed.device_bytes == min(2, depth) * one * 4
    places = set()
    for _ in range(2):
        for index, block in enumerate(streamed()):
            assert block is net.blocks[index]
            assert resident_numbers(net) == [one * (other == index) for other in range(depth)]
            assert all(torch.equal(a, b) for a, b in zip(block.parameters(), weights[index], strict=True))
            places |= {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
        assert index == depth - 1 and resident_numbers(net) == [0] * depth
    assert len(places) == min(2, depth)  # visits share the memory of two blocks


@pytest.mark.parametrize("where", [0, 1, 4])
def test_an_exception_half_way_leaves_it_usable(where: int, monkeypatch: pytest.MonkeyPatch) -> None:
    net = random_net(5)
    expected = answers(net, 1)
    net.walk = StreamedBlocks(net.blocks, "cpu")
    for part in ("mlp", "cross_attn.k_proj"):  # in `forward`, and in `encode_text`
        with monkeypatch.context() as patch:
            patch.setattr(net.blocks[where].get_submodule(part), "forward", lambda x: 1 / 0)
            with pytest.raises(ZeroDivisionError) as held:
                answers(net, 0)
        assert sum(map(bool, resident_numbers(net))) <= 1  # the traceback may hold the walk, with a block in hand
        assert all(torch.equal(a, b) for a, b in zip(answers(net, 1), expected))
        assert resident_numbers(net) == [0] * 5
        del held
        assert all(torch.equal(a, b) for a, b in zip(answers(net, 1), expected))


def test_a_walk_left_half_way_does_not_disturb_the_next() -> None:
    """Its reader may hold on to it, and let go while a block of the next walk is in hand."""
    net = random_net(3)
    streamed = StreamedBlocks(net.blocks, "cpu")
    left = streamed()
    next(left), next(left)
    for index, _ in enumerate(streamed()):
        assert [bool(n) for n in resident_numbers(net)] == [other == index for other in range(3)]
        if index == 1:
            del left
        assert [bool(n) for n in resident_numbers(net)] == [other == index for other in range(3)]
    left = streamed()
    next(left)
    next(streamed())
    with pytest.raises(StopIteration):
        next(left)


def test_gradients_are_not_wrong_in_silence() -> None:
    net = random_net(3)
    net.walk = StreamedBlocks(net.blocks, "cpu")
    latents, times, text = call(0)
    velocity = net(latents.requires_grad_(), times, Conditions(text))
    with pytest.raises(RuntimeError, match="size"):
        velocity.sum().backward()


def test_a_context_of_another_depth_is_refused_as_before() -> None:
    net = random_net(3)
    latents, times, text = call(0)
    context = net.encode_text(text)
    net.walk = StreamedBlocks(net.blocks, "cpu")
    with pytest.raises(ValueError, match="3 blocks, the TextContext is for 2"):
        net(latents, times, Conditions(dataclasses.replace(context, layers=context.layers[:2])))


def test_unequal_blocks_are_refused_untouched() -> None:
    other_shape, other_dtype, mixed = random_net(3), random_net(3), random_net(3)
    other_shape.blocks[2] = DiT(dataclasses.replace(CONFIG, mlp_ratio=2.0)).blocks[0]
    other_dtype.blocks[1].bfloat16()
    for block in mixed.blocks:
        block.mlp.layer1.bfloat16()
    for net in (other_shape, other_dtype, mixed):
        before = resident_numbers(net)
        with pytest.raises(ValueError, match="the same shapes and one dtype"):
            StreamedBlocks(net.blocks, "cpu")
        assert resident_numbers(net) == before
