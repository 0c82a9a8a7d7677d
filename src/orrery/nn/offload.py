"""Blocks whose weights stay on the host and visit the device two at a time: a network larger than its GPU's memory.

While a block computes, the weights of the next are copied beside it on a stream of their own, out of pinned memory, so
the copy hides behind the computation wherever that takes longer (for the 2B at 720p: some 100 ms against 6 ms).
"""

import weakref
from collections.abc import Callable, Generator, Iterator
from typing import Any

import torch
from torch import Tensor, nn


class StreamedBlocks:
    """Goes through blocks in order, each with its weights on the device while it is in hand.

    >>> net.walk = StreamedBlocks(net.blocks, "cuda")

    Args:
        blocks: with one dtype and equal shapes from block to block; their weights are moved to the host.
        device: where they compute. On a CPU this works too and saves nothing.

    Between visits a block's parameters are empty: its state dict is not to be saved, nor the network to be moved, and
    there are no gradients through it. One walk at a time: a new one ends an earlier one that was left half way.
    """

    def __init__(self, blocks: nn.ModuleList, device: torch.device | str) -> None:
        self.blocks = blocks
        self.device = torch.device(device)
        cuda = self.device.type == "cuda"
        shapes = [[tuple(p.shape) for p in block.parameters()] for block in blocks]
        dtypes = {p.dtype for p in blocks.parameters()}
        if len(dtypes) != 1 or any(each != shapes[0] for each in shapes):
            raise ValueError("blocks can be streamed when all have the same shapes and one dtype")
        (dtype,) = dtypes
        sizes = [p.numel() for p in blocks[0].parameters()]
        self._host: list[Tensor] = []
        for block in blocks:
            flat = torch.empty(sum(sizes), dtype=dtype, pin_memory=cuda)
            for piece, parameter in zip(flat.split(sizes), block.parameters(), strict=True):
                piece.copy_(parameter.detach().flatten())
                parameter.data = torch.empty(0, dtype=dtype)
            self._host.append(flat)
        self._slots = [torch.empty(sum(sizes), dtype=dtype, device=self.device) for _ in range(min(2, len(blocks)))]
        self._views = [
            [piece.view(shape) for piece, shape in zip(slot.split(sizes), shapes[0], strict=True)]
            for slot in self._slots
        ]
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
        return sum(slot.numel() * slot.element_size() for slot in self._slots)

    def __call__(self) -> Iterator[nn.Module]:
        """The blocks, one after the other; the weights of the one before are gone."""
        if (left := self._walk()) is not None:
            left.close()
        walk = self._visits()
        self._walk = weakref.ref(walk)
        return walk

    def _visits(self) -> Generator[nn.Module, None, None]:
        self._fetch(0)
        for index, block in enumerate(self.blocks):
            slot = index % len(self._slots)
            if index + 1 < len(self.blocks):
                self._fetch(index + 1)
            if self._copying is not None:
                torch.cuda.current_stream(self.device).wait_event(self._copied[slot])
            for parameter, view in zip(block.parameters(), self._views[slot], strict=True):
                parameter.data = view
            try:
                yield block
            finally:
                for parameter in block.parameters():
                    parameter.data = torch.empty(0, dtype=parameter.dtype)
                if self._copying is not None:
                    self._used[slot].record(torch.cuda.current_stream(self.device))

    def _fetch(self, index: int) -> None:
        """Begin to copy a block's weights into the slot that is not in use."""
        slot = index % len(self._slots)
        if self._copying is None:
            self._slots[slot].copy_(self._host[index])
            return
        with torch.cuda.stream(self._copying):
            self._copying.wait_event(self._used[slot])  # the block that had the slot before has computed
            self._slots[slot].copy_(self._host[index], non_blocking=True)
            self._copied[slot].record(self._copying)
