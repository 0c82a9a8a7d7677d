"""The dataset reader: index, split, captions, order, latents."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from orrery.data import ClipDataset, ClipEntry, ShuffledOrder, mirror_caption, read_index, split
from orrery.data.latents import cache_latents
from orrery.errors import InputError
from orrery.video import Video, to_pixels


def make_clip(root: Path, seed: int, scene: str = "drop", caption: str = "a ball rolls to the left") -> str:
    """One 5-frame clip whose left half is dark and whose brightness tells the seed."""
    name = f"{scene}-{seed:07d}"
    frames = np.full((5, 16, 16, 3), 60 + seed % 100, np.uint8)
    frames[:, :, 8:] = 200
    (root / name).mkdir(parents=True)
    Video(frames, 10).save(root / name / "rgb.mp4", crf=1, pixel_format="yuv444p")
    ids = np.zeros((5, 16, 16), np.uint8)
    ids[:, :4, :4] = 2
    np.savez_compressed(root / name / "segmentation.npz", front=ids, side=np.zeros_like(ids))
    line = {"id": name, "scene": scene, "seed": seed, "caption": caption, "frames": 5, "look": "real", "unused": 1}
    with open(root / "index.jsonl", "a", encoding="utf-8") as index:
        index.write(json.dumps(line) + "\n")
    return name


def test_index_is_ordered_and_survives_a_half_written_line(tmp_path: Path) -> None:
    for seed, scene in ((3, "drop"), (1, "push"), (1, "drop")):
        make_clip(tmp_path, seed, scene)
    with open(tmp_path / "index.jsonl", "a", encoding="utf-8") as index:
        index.write('{"id": "drop-0000009", "sce')
    assert [entry.id for entry in read_index(tmp_path)] == ["drop-0000001", "push-0000001", "drop-0000003"]


def test_index_errors_name_the_place(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no dataset at .*index\.jsonl does not exist"):
        read_index(tmp_path)
    (tmp_path / "index.jsonl").write_text('not json\n{"id": "a"}\n')
    with pytest.raises(InputError, match="line 1: not JSON"):
        read_index(tmp_path)
    (tmp_path / "index.jsonl").write_text('{"id": "a", "scene": "drop"}\n')
    with pytest.raises(InputError, match="lacks 'seed'"):
        read_index(tmp_path)


def test_held_out_are_the_seeds_from_a_number_on() -> None:
    entries = [ClipEntry(str(seed), "drop", seed, "x", 5) for seed in (1, 99, 100, 101)]
    train, heldout = split(entries, 100)
    assert [e.seed for e in train] == [1, 99] and [e.seed for e in heldout] == [100, 101]


def test_clip_has_its_pixels_and_the_first_cameras_foreground(tmp_path: Path) -> None:
    make_clip(tmp_path, 7)
    clip = ClipDataset(tmp_path, foreground=True)[0]
    assert clip.frames.shape == (5, 16, 16, 3) and clip.frames.dtype == np.uint8
    assert abs(int(clip.frames[2, 8, 2, 0]) - 67) <= 3 and abs(int(clip.frames[2, 8, 13, 0]) - 200) <= 3
    assert clip.foreground is not None and clip.foreground.sum() == 5 * 16 and clip.foreground[0, :4, :4].all()


def test_memory_cache_holds_what_fits_and_no_more(tmp_path: Path) -> None:
    for seed in range(3):
        make_clip(tmp_path, seed)
    dataset = ClipDataset(tmp_path, cache_gb=2.5 * 5 * 16 * 16 * 3 / 1e9)
    first = [dataset[i] for i in range(3)]
    assert [dataset[i] is first[i] for i in range(3)] == [True, True, False]


def test_an_unreadable_clip_is_named(tmp_path: Path) -> None:
    name = make_clip(tmp_path, 1)
    (tmp_path / name / "rgb.mp4").write_text("no video")
    with pytest.raises(InputError, match=name):
        ClipDataset(tmp_path)[0]


@pytest.mark.parametrize(
    ("caption", "mirrored"),
    [
        ("a red ball rolls to the left", "a red ball rolls to the right"),
        ("Left of it, a leftover cube slides right", "Right of it, a leftover cube slides left"),
        ("a bright cube", "a bright cube"),
    ],
)
def test_mirrored_caption_swaps_sides_as_whole_words(caption: str, mirrored: str) -> None:
    assert mirror_caption(caption) == mirrored
    assert mirror_caption(mirrored) == caption


def test_order_shows_every_clip_once_an_epoch_and_resumes_anywhere() -> None:
    order = ShuffledOrder(7, seed=4)
    stream = order.take(21)
    epochs = [stream[i : i + 7] for i in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    for position in (0, 3, 7, 10, 14):
        before, after = ShuffledOrder(7, seed=4), ShuffledOrder(7, seed=4)
        before.take(position)
        after.load_state(before.state())
        assert after.take(21 - position) == stream[position:]
    assert ShuffledOrder(7, seed=5).take(7) != epochs[0]


class Encoder:
    """Stands for a VAE: latents are 8x8 block means of the first colour; counts the clips it saw."""

    def __init__(self) -> None:
        self.clips = 0

    def __call__(self, pixels: Tensor) -> Tensor:
        self.clips += len(pixels)
        return torch.nn.functional.avg_pool3d(pixels[:, :1], (1, 8, 8))


def test_latent_cache_encodes_once_and_mirrors_pixels_and_words(tmp_path: Path) -> None:
    for seed in (5, 300, 301):  # 300 and 301 share a shard
        make_clip(tmp_path / "data", seed)
    dataset, encode = ClipDataset(tmp_path / "data"), Encoder()
    cache = cache_latents(tmp_path / "cache", dataset, encode, "vae1", frames=5, batch=2)
    assert encode.clips == 6 and cache.latents.shape == (3, 2, 1, 5, 2, 2) and cache.latents.dtype == torch.float16
    assert cache.captions[0] == ("a ball rolls to the left", "a ball rolls to the right")
    for i in range(3):
        frames = dataset[i].frames[None]
        for m, view in enumerate((frames, frames[:, :, :, ::-1])):
            assert torch.allclose(cache.latents[i, m].float(), Encoder()(to_pixels(view))[0], atol=1e-3)
    again = cache_latents(tmp_path / "cache", dataset, encode, "vae1", frames=5)
    assert encode.clips == 6 and torch.equal(again.latents, cache.latents)


def test_latent_cache_is_not_reused_for_another_vae_or_caption_and_grows_by_shards(tmp_path: Path) -> None:
    for seed in (5, 300):
        make_clip(tmp_path / "data", seed)
    encode = Encoder()

    def clips_encoded(vae: str = "vae1") -> int:
        before = encode.clips
        cache_latents(tmp_path / "cache", ClipDataset(tmp_path / "data"), encode, vae, frames=5, mirror=False)
        return encode.clips - before

    assert clips_encoded() == 2 and clips_encoded() == 0
    assert clips_encoded("vae2") == 2
    make_clip(tmp_path / "data", 600)
    assert clips_encoded() == 1, "only the new shard"
    index = tmp_path / "data" / "index.jsonl"
    index.write_text(index.read_text().replace("left", "right", 1))
    assert clips_encoded() == 1, "the shard whose caption changed"
    shard = next((tmp_path / "cache").glob("drop-00002-*"))
    shard.write_bytes(b"broken")
    assert clips_encoded() == 1, "the broken shard"
