"""Blocks whose weights stay on the host and visit the device in turn: a network larger than its GPU's memory.

While a block computes, the weights of the next are copied beside it on a stream of their own, out of pinned memory. The
copy hides behind the computation where a block sees at least (bytes a weight) * (arithmetic a second) / (2 * bytes
copied a second) tokens, whatever its width; attention lowers that further. At 600 TFLOP/s and 55 GB/s that is 11,000
tokens in bfloat16 and half as many in 8 bits. The 2B at 720p has 84,480 (111 ms of computation a block, 2.5 ms of
copying), at 480p 31,104 (25 and 2.5 ms), a single picture 3,520 (1 and 2.5 ms: there the copy is what is waited for).
Two blocks' worth of room are enough: the slower of copying and computing sets the pace, however many wait.
"""

import weakref
from collections.abc import Callable, Generator, Iterator
from typing import Any

import torch
from torch import Tensor, nn

ALIGNED = 256  # bytes: where a weight may begin, as allocators place tensors and float8 kernels want them
SMALLEST_PIECE = 2**20  # bytes of pinned memory: torch rounds each allocation up to a power of two
SLOTS = 2


class StreamedBlocks:
    """Goes through blocks in order, each with its weights on the device while it is in hand.

    >>> net.walk = StreamedBlocks(net.blocks, "cuda", resident=10)

    Args:
        blocks: of any shapes and dtypes (see nn.quantise); their weights are moved to the host.
        device: where they compute. On a CPU this works too and saves nothing.
        resident: so many blocks are moved to the device for good, evenly spread and the last one among them, so that a
            copy has the time of several blocks.

    Between visits the parameters of a block that is not resident are empty: its state dict is not to be saved, nor the
    network to be moved, and there are no gradients through it. One walk at a time: a new one ends an earlier one that
    was left half way.
    """

    def __init__(self, blocks: nn.ModuleList, device: torch.device | str, resident: int = 0) -> None:
        self.blocks = blocks
        self.device = torch.device(device)
        self.resident = spread(len(blocks), resident)
        cuda = self.device.type == "cuda"
        away = [index for index in range(len(blocks)) if index not in self.resident]
        for index in self.resident:
            blocks[index].to(self.device)
        size = max((_size(blocks[index]) for index in away), default=0)
        self._slots = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in away[:SLOTS]]
        self._views = [  # of streamed block after streamed block, each in the slot that it visits
            _views(blocks[index], self._slots[turn % len(self._slots)]) for turn, index in enumerate(away)
        ]
        self._host = [_moved_out(blocks[index], pinned=cuda) for index in away]
        self._copying: Any = torch.cuda.Stream(self.device) if cuda else None
        self._copied: list[Any] = [torch.cuda.Event() for _ in self._slots] if cuda else []
        self._used: list[Any] = [torch.cuda.Event() for _ in self._slots] if cuda else []
        if self._copying is not None:
            for slot, used in zip(self._slots, self._used, strict=True):
                used.record(torch.cuda.current_stream(self.device))  # what had this memory before may still compute
                slot.record_stream(self._copying)  # and whoever has it next waits for the copies
        self._walk: Callable[[], Any] = lambda: None  # the walk under way, if its reader still holds it

    @property
    def device_bytes(self) -> int:
        """Of the weights that are on the device at any time."""
        return sum(slot.nbytes for slot in self._slots) + sum(_size(self.blocks[index]) for index in self.resident)

    def __call__(self) -> Iterator[nn.Module]:
        """The blocks, one after the other; the weights of the one before are gone, unless it is resident."""
        if (left := self._walk()) is not None:
            left.close()
        walk = self._visits()
        self._walk = weakref.ref(walk)
        return walk

    def _visits(self) -> Generator[nn.Module, None, None]:
        for turn in range(len(self._slots)):
            self._fetch(turn)
        turn = 0
        for index, block in enumerate(self.blocks):
            if index in self.resident:
                yield block
                continue
            slot = turn % len(self._slots)
            if self._copying is not None:
                torch.cuda.current_stream(self.device).wait_event(self._copied[slot])
            for parameter, view in zip(block.parameters(), self._views[turn], strict=True):
                parameter.data = view
            try:
                yield block
            finally:
                for parameter in block.parameters():
                    parameter.data = torch.empty(0, dtype=parameter.dtype)
                if self._copying is not None:
                    self._used[slot].record(torch.cuda.current_stream(self.device))
            if turn + len(self._slots) < len(self._host):
                self._fetch(turn + len(self._slots))
            turn += 1

    def _fetch(self, turn: int) -> None:
        """Begin to copy the weights of a streamed block into the slot that it visits, when that is free."""
        number = turn % len(self._slots)
        slot = self._slots[number]
        if self._copying is None:
            _copy(self._host[turn], slot)
            return
        with torch.cuda.stream(self._copying):
            self._copying.wait_event(self._used[number])  # the block that had the slot before has computed
            _copy(self._host[turn], slot)
            self._copied[number].record(self._copying)


def spread(blocks: int, resident: int) -> frozenset[int]:
    """Which of so many blocks stay on the device: evenly spread, and the last one. ValueError: more than there are."""
    if not 0 <= resident <= blocks:
        raise ValueError(f"resident is {resident}; allowed are 0 to {blocks} blocks")
    return frozenset((turn + 1) * blocks // resident - 1 for turn in range(resident))


def device_bytes(blocks: nn.ModuleList, resident: int = 0) -> int:
    """What `StreamedBlocks(blocks, device, resident)` keeps on the device, without making it: of weights that are in
    their blocks, or on the meta device."""
    stay = spread(len(blocks), resident)
    sizes = [_size(block) for block in blocks]
    away = [size for index, size in enumerate(sizes) if index not in stay]
    return sum(sizes[index] for index in stay) + max(away, default=0) * len(away[:SLOTS])


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


def _size(block: nn.Module) -> int:
    """Bytes of its weights, one after the other."""
    return sum(_aligned(parameter.nbytes) for parameter in block.parameters())


def _views(block: nn.Module, flat: Tensor) -> list[Tensor]:
    """Places in a buffer of bytes for the weights of a block, in their shapes and dtypes."""
    views, start = [], 0
    for parameter in block.parameters():
        views.append(flat[start : start + parameter.nbytes].view(parameter.dtype).view(parameter.shape))
        start += _aligned(parameter.nbytes)
    return views


def _moved_out(block: nn.Module, pinned: bool) -> list[Tensor]:
    """The weights of a block as bytes on the host, in pieces; its parameters are empty afterwards."""
    flat = torch.empty(_size(block), dtype=torch.uint8)
    for view, parameter in zip(_views(block, flat), block.parameters(), strict=True):
        view.copy_(parameter.detach())
        parameter.data = torch.empty(0, dtype=parameter.dtype)
    return [piece.pin_memory() for piece in flat.split(_pieces(len(flat)))] if pinned else [flat]


def _pieces(size: int) -> list[int]:
    """Sizes that add up to `size`, powers of two down to SMALLEST_PIECE, so that little pinned memory is lost."""
    sizes = []
    while size > SMALLEST_PIECE:
        sizes.append(1 << (size.bit_length() - 1))
        size -= sizes[-1]
    return sizes + [size] * bool(size)


def _copy(pieces: list[Tensor], slot: Tensor) -> None:
    start = 0
    for piece in pieces:
        slot[start : start + len(piece)].copy_(piece, non_blocking=True)
        start += len(piece)
