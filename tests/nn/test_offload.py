"""Streamed blocks: the same numbers bit for bit, two blocks' weights at a time, usable again after an exception."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from orrery.nn.dit import Conditions, DiT, DiTConfig
from orrery.nn.offload import StreamedBlocks, _copy, _pieces, device_bytes, spread

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
    assert streamed.device_bytes == min(2, depth) * bytes_of(random_net(1).blocks[0]) >= min(2, depth) * one * 4
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


def bytes_of(block: nn.Module) -> int:
    """Each weight begins at a multiple of 256 bytes."""
    return sum(-(-parameter.nbytes // 256) * 256 for parameter in block.parameters())


def test_unequal_blocks_of_several_dtypes() -> None:
    net = random_net(4)
    net.blocks[1] = DiT(dataclasses.replace(CONFIG, mlp_ratio=2.0)).blocks[0].requires_grad_(False)
    for block in net.blocks[2:]:
        for modulation in (block.adaln_modulation_mlp, block.adaln_modulation_self_attn):
            modulation.bfloat16()  # computes in the dtype of its input
    expected = [answers(net, seed) for seed in range(2)]
    weights = [[p.clone() for p in block.parameters()] for block in net.blocks]
    sizes = [bytes_of(block) for block in net.blocks]
    assert len(set(sizes)) == 3
    streamed = net.walk = StreamedBlocks(net.blocks, "cpu")
    assert streamed.device_bytes == 2 * max(sizes)
    for block, held in zip(streamed(), weights, strict=True):
        found = list(block.parameters())
        assert [p.dtype for p in found] == [p.dtype for p in held]
        assert all(torch.equal(a, b) for a, b in zip(found, held, strict=True))
        assert all(p.data_ptr() % 64 == 0 and p.storage_offset() * p.itemsize % 256 == 0 for p in found)
    for seed in (0, 1, 0):
        assert all(torch.equal(a, b) for a, b in zip(answers(net, seed), expected[seed], strict=True))


@pytest.mark.parametrize("resident", range(6))
def test_some_blocks_stay(resident: int) -> None:
    net = random_net(5)
    expected = [answers(net, seed) for seed in range(2)]
    one, planned = bytes_of(net.blocks[0]), device_bytes(net.blocks, resident)
    streamed = net.walk = StreamedBlocks(net.blocks, "cpu", resident)
    stay = [bool(n) for n in resident_numbers(net)]
    assert sum(stay) == resident and stay[-1] == bool(resident)
    assert streamed.resident == {index for index, here in enumerate(stay) if here}
    assert streamed.device_bytes == planned == min(5, resident + 2) * one
    for seed in (0, 1, 0):
        assert all(torch.equal(a, b) for a, b in zip(answers(net, seed), expected[seed], strict=True))
        assert [bool(n) for n in resident_numbers(net)] == stay
    left = streamed()
    for _ in range(3):
        next(left)
    assert list(streamed()) == list(net.blocks)  # ends the one left half way
    assert [bool(n) for n in resident_numbers(net)] == stay


def test_what_stays_is_spread_evenly() -> None:
    for blocks in (1, 7, 28, 36):
        for resident in range(1, blocks + 1):
            stay = sorted(spread(blocks, resident))
            assert len(stay) == resident and stay[-1] == blocks - 1
            gaps = [b - a for a, b in zip([-1, *stay], stay)]
            assert max(gaps) - min(gaps) <= 1
    assert spread(3, 0) == frozenset()


@pytest.mark.parametrize("resident", [-1, 4])
def test_more_than_there_are_cannot_stay(resident: int) -> None:
    net = random_net(3)
    before = resident_numbers(net)
    with pytest.raises(ValueError, match=f"resident is {resident}; allowed are 0 to 3 blocks"):
        StreamedBlocks(net.blocks, "cpu", resident)
    assert resident_numbers(net) == before


def test_bytes_are_known_without_weights() -> None:
    with torch.device("meta"):
        blocks = DiT(dataclasses.replace(CONFIG, depth=4)).bfloat16().blocks
    one = bytes_of(blocks[0])
    assert [device_bytes(blocks, n) for n in range(5)] == [2 * one, 3 * one, 4 * one, 4 * one, 4 * one]
    blocks[-1].float()  # larger than the others: it decides the size of the two places, until it stays
    assert [device_bytes(blocks, n) for n in (0, 1)] == [2 * bytes_of(blocks[-1]), 2 * one + bytes_of(blocks[-1])]


@pytest.mark.parametrize("size", [0, 1, 2**20, 2**20 + 1, 75_497_472, 138_412_032, 786_432_256])
def test_pinned_memory_is_asked_for_in_powers_of_two(size: int) -> None:
    """Which torch rounds every allocation up to: at most a mebibyte is lost."""
    pieces = _pieces(size)
    assert sum(pieces) == size and all(pieces)
    rounded = sum(1 << (piece - 1).bit_length() for piece in pieces)
    assert rounded - size < 2**20 and len(pieces) < 12


def test_pieces_are_put_together_again() -> None:
    flat = torch.arange(2**20 + 2**19 + 300, dtype=torch.int32).view(torch.uint8)
    slot = torch.zeros(len(flat) + 10, dtype=torch.uint8)
    _copy(list(flat.split(_pieces(len(flat)))), slot)
    assert len(_pieces(len(flat))) > 2 and torch.equal(slot[:-10], flat) and not slot[-10:].any()
