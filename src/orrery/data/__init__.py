"""Clips on disk -> batches: the dataset reader, the resumable order of an epoch, cached latents."""

from orrery.data.clips import Clip, ClipDataset, ClipEntry, mirror_caption, read_index, split
from orrery.data.order import ShuffledOrder

__all__ = ["Clip", "ClipDataset", "ClipEntry", "ShuffledOrder", "mirror_caption", "read_index", "split"]
