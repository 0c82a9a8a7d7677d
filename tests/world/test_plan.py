"""Plans: better with more memory, true to their sums, exact where they can be, and as they were asked to be."""

import dataclasses
import itertools
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import orrery
from orrery.errors import InputError
from orrery.nn.dit import DiT
from orrery.weights import ModelConfig, find_model
from orrery.world import plan as planning
from orrery.world.plan import CONTEXT, GIB, MARGIN, PLACEMENTS, Needs, Plan, Shape, make_plan, measure

CARDS = (8, 12, 16, 24, 32, 48, 80)
BF16 = torch.bfloat16
STAGES = {"text encoder", "transformer", "VAE"}


def published(name: str) -> ModelConfig:
    return find_model(name).config


def plans(name: str, sizes: tuple[int, ...] = CARDS, **options) -> dict[int, Plan]:
    shape = Shape((704, 1280), 93, given=5)
    return {size: make_plan(published(name), shape, size * GIB, BF16, BF16, **options) for size in sizes}


def streamed(rest: int, block: int, blocks: int) -> tuple[int, ...]:
    """What is on the device where so many blocks stay: they, the two slots of the others, and the rest."""
    return tuple(rest + block * min(blocks, n + 2) for n in range(blocks + 1))


def needs(**changes: Any) -> Needs:
    """Numbers of which every sum is another one. Blocks: 8 of 40, so two of them and the rest are 180."""
    return Needs(
        **{
            "text": 1000, "text_peak": 10, "transformer": 420, "streamed": streamed(100, 40, 8),
            "transformer_peak": 103, "batch_peak": 207, "vae": 31, "vae_peak": 300, "tile_peak": 52,
        } | changes
    )  # fmt: skip


def plan_for(
    monkeypatch: pytest.MonkeyPatch, capacity: float, of: Needs, cuda: bool = True, texts: int = 2, **options
) -> Plan:
    """The plan for hand-made needs and so many bytes after margin and context."""
    monkeypatch.setattr(planning, "measure", lambda *_: of)
    memory = (capacity + (CONTEXT if cuda else 0)) / (1 - MARGIN)
    config, shape = published("predict2.5-2b"), Shape((704, 1280), 93, texts=texts)
    plan = make_plan(config, shape, memory, BF16, BF16, cuda, **options)
    assert plan.capacity == pytest.approx(capacity)
    return dataclasses.replace(plan, capacity=capacity)


# The published models.


@pytest.mark.parametrize("name", ["predict2.5-2b", "predict2.5-14b"])
def test_more_memory_is_never_worse(name: str) -> None:
    found = plans(name)
    for less, more in itertools.pairwise(found.values()):
        assert PLACEMENTS.index(more.placement) <= PLACEMENTS.index(less.placement)
        assert more.fits >= less.fits
        assert more.tiled <= less.tiled and more.text_on_cpu <= less.text_on_cpu
    for plan in found.values():
        assert set(plan.peaks) == STAGES and plan.peak == max(plan.peaks.values())
        assert plan.fits == all(peak <= plan.capacity for peak in plan.peaks.values())
        assert plan.placement != "resident" or not plan.tiled
    assert found[80].placement == "resident" and found[80].fits and found[80].side_by_side


def test_the_2b_at_720p_fits_into_8_gib_and_the_14b_does_not() -> None:
    two, fourteen = plans("predict2.5-2b"), plans("predict2.5-14b")
    assert two[8].fits and two[8].placement == "blocks" and two[8].text_on_cpu and two[8].tiled
    assert all(plan.fits for plan in two.values())
    assert two[12].placement == "stages" and not two[12].tiled
    assert not fourteen[8].fits and fourteen[8].placement == "blocks"
    assert fourteen[8].peak > fourteen[8].capacity
    assert fourteen[16].fits and fourteen[16].placement == "blocks"
    assert two[32].placement == "resident" and fourteen[48].placement == "stages"


def test_weights_of_the_published_models() -> None:
    """Billions of parameters, as the model cards and the paper count them; two bytes each."""
    shape = Shape((704, 1280), 93, given=5)
    for name, billions in (("predict2.5-2b", 2.06), ("predict2.5-14b", 14.4)):
        found = measure(published(name), shape, BF16, BF16)
        assert found.transformer / 2e9 == pytest.approx(billions, rel=0.01)
        assert found.text / 2e9 == pytest.approx(7.07, rel=0.01)  # a Qwen2.5 of 7 billion without its output layer
        assert found.vae / 2e9 == pytest.approx(0.127, rel=0.01)
        assert found.streamed[-1] == pytest.approx(found.transformer, rel=1e-3)  # but for the room between weights
        assert found.streamed[0] < 0.2 * found.transformer
    with torch.device("meta"):
        block = DiT(dataclasses.replace(published("predict2.5-2b").transformer, depth=1)).blocks[0]
    whole = measure(published("predict2.5-2b"), shape, BF16, BF16)
    assert len(whole.streamed) == 29
    one = 2 * sum(p.numel() for p in block.parameters())
    assert whole.streamed[10] - whole.streamed[9] == pytest.approx(one, rel=1e-3)


def test_peaks_move_as_they_should() -> None:
    config = published("predict2.5-2b")
    full, small, short, float32, single = (
        measure(config, shape, dtype, dtype)
        for shape, dtype in (
            (Shape((704, 1280), 93, 5), BF16),
            (Shape((352, 640), 93, 5), BF16),
            (Shape((704, 1280), 45, 5), BF16),
            (Shape((704, 1280), 93, 5), torch.float32),
            (Shape((704, 1280), 93, 5, texts=1), BF16),
        )
    )
    for peak in ("transformer_peak", "batch_peak"):
        assert 2.5 < getattr(full, peak) / getattr(small, peak) < 4  # a quarter of the tokens, and the same texts
        assert 1.6 < getattr(full, peak) / getattr(short, peak) < 2
    assert full.vae_peak == short.vae_peak  # streamed
    assert small.tile_peak <= full.tile_peak == short.tile_peak < 0.25 * full.vae_peak
    assert float32.transformer == 2 * full.transformer and float32.vae_peak > 1.9 * full.vae_peak
    assert single.batch_peak == single.transformer_peak < full.transformer_peak


# The sums.


def test_resident_holds_everything_all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_for(monkeypatch, 10_000, needs())
    assert plan == Plan("resident", False, False, True, 10_000, plan.peaks)
    assert plan.peaks == {"text encoder": 1451 + 10, "transformer": 1451 + 207, "VAE": 1451 + 300}
    assert plan.peak == 1751 and plan.fits


def test_stages_hold_one_network(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_for(monkeypatch, 1750, needs())  # one byte too few to stay
    assert plan == Plan("stages", False, False, True, 1750, plan.peaks)
    assert plan.peaks == {"text encoder": 1010, "transformer": 420 + 207, "VAE": 331}


def test_blocks_hold_two_of_them_and_what_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_for(monkeypatch, 522, needs())  # a byte less than the transformer with its peak
    assert plan == Plan("blocks", True, False, True, 522, plan.peaks, resident=3)  # and three, as there is room
    assert plan.peaks == {"text encoder": 0, "transformer": 180 + 3 * 40 + 207, "VAE": 331}
    few = plan_for(monkeypatch, 522, needs(transformer=420, streamed=streamed(0, 210, 2)))
    assert few.peaks["transformer"] == 420 + 103 and not few.fits  # two blocks are all it has


@pytest.mark.parametrize(
    "capacity, placement, text_on_cpu, tiled, side_by_side, resident, peak",
    [
        (1751, "resident", False, False, True, 0, 1751),
        (1750, "stages", False, False, True, 0, 1010),
        (1010, "stages", False, False, True, 0, 1010),
        (1009, "stages", True, False, True, 0, 627),
        (627, "stages", True, False, True, 0, 627),
        (626, "stages", True, False, False, 0, 523),
        (523, "stages", True, False, False, 0, 523),
        (522, "blocks", True, False, True, 3, 507),
        (387, "blocks", True, False, True, 0, 387),
        (386, "blocks", True, False, False, 2, 363),
        (331, "blocks", True, False, False, 1, 331),
        (330, "blocks", True, True, False, 1, 323),
        (283, "blocks", True, True, False, 0, 283),
        (282, "blocks", True, True, False, 0, 283),
    ],
)
def test_every_threshold(
    monkeypatch: pytest.MonkeyPatch,
    capacity: int, placement: str, text_on_cpu: bool, tiled: bool, side_by_side: bool, resident: int, peak: int,
) -> None:  # fmt: skip
    plan = plan_for(monkeypatch, capacity, needs())
    assert plan == Plan(placement, text_on_cpu, tiled, side_by_side, capacity, plan.peaks, resident)
    assert plan.peak == peak and plan.fits == (capacity >= 283)


def test_a_large_picture_goes_stage_by_stage_rather_than_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resident would fit in tiles; but tiles are close, not equal."""
    plan = plan_for(monkeypatch, 2000, needs(vae_peak=900))
    assert plan.placement == "stages" and not plan.tiled
    asked = plan_for(monkeypatch, 2000, needs(vae_peak=900), placement="resident")
    assert asked.placement == "resident" and asked.tiled and asked.fits and asked.peaks["VAE"] == 1451 + 52


def test_without_guidance_there_is_nothing_to_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_for(monkeypatch, 10_000, needs(), texts=1)
    assert not plan.side_by_side and plan.peaks["transformer"] == 1451 + 103


@pytest.mark.parametrize("capacity", [1750, 522, 200, 1])
def test_on_a_cpu_there_is_nothing_to_offload_to(monkeypatch: pytest.MonkeyPatch, capacity: int) -> None:
    plan = plan_for(monkeypatch, capacity, needs(), cuda=False)
    assert plan.placement == "stages" and not plan.text_on_cpu
    assert plan.peaks["text encoder"] == 1010 and plan.fits == (capacity >= 1010)


def test_margins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "measure", lambda *_: needs())
    config, shape = published("predict2.5-2b"), Shape((704, 1280), 93)
    assert make_plan(config, shape, 24 * GIB, BF16, BF16).capacity == pytest.approx(24 * GIB * 0.92 - 0.6 * GIB)
    assert make_plan(config, shape, 24 * GIB, BF16, BF16, cuda=False).capacity == pytest.approx(24 * GIB * 0.92)


def test_any_needs_and_any_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the numbers: more memory is never worse, what fits does, and nothing better would have fitted."""
    draw = random.Random(0)
    for _ in range(300):
        sizes: dict[str, Any] = {field.name: draw.randrange(1, 1000) for field in dataclasses.fields(Needs)}
        sizes["streamed"] = streamed(draw.randrange(100), draw.randrange(1, 1000), draw.randrange(1, 9))
        sizes["transformer"] = sizes["streamed"][-1]
        for small, large in (("transformer_peak", "batch_peak"), ("tile_peak", "vae_peak")):
            sizes[large] = sizes[small] + draw.randrange(1000)
        of, cuda = Needs(**sizes), draw.random() < 0.8
        found = [plan_for(monkeypatch, capacity, of, cuda) for capacity in range(50, 12_000, 400)]
        for less, more in itertools.pairwise(found):
            assert PLACEMENTS.index(more.placement) <= PLACEMENTS.index(less.placement)
            assert more.fits >= less.fits and more.tiled <= less.tiled and more.text_on_cpu <= less.text_on_cpu
        for plan in found:
            assert plan.fits == all(peak <= plan.capacity for peak in plan.peaks.values())
            better = PLACEMENTS[: PLACEMENTS.index(plan.placement)]
            for placement in better:
                forced = plan_for(monkeypatch, plan.capacity, of, cuda, placement=placement)
                assert not forced.fits or (placement == "resident" and forced.tiled)


# What is asked for.


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("size", [8, 80])
def test_placement_is_forced(placement: str, size: int) -> None:
    plan = plans("predict2.5-2b", (size,), placement=placement)[size]
    assert plan.placement == placement and plan.fits == (size == 80 or placement == "blocks")


@pytest.mark.parametrize("placement", ["gpu", "", "Resident"])
def test_another_placement_is_refused(placement: str, tiny_folder: Path) -> None:
    with pytest.raises(InputError, match=f"placement is '{placement}'; allowed are resident, stages, blocks"):
        plans("predict2.5-2b", (24,), placement=placement)
    with pytest.raises(InputError, match=f"placement is '{placement}'; allowed are resident, stages, blocks"):
        orrery.load(tiny_folder, "cpu", placement=placement)


def test_a_plan_in_words() -> None:
    words = str(Plan("blocks", True, True, False, 6 * GIB, {"VAE": int(4.4 * GIB), "transformer": GIB}))
    assert words == "blocks, text encoder on the CPU, VAE in tiles, guidance one by one; peak 4.4 of 6.0 GiB"
    assert str(Plan("resident", False, False, True, 8 * GIB, {"VAE": GIB})) == (
        "resident, guidance in one batch; peak 1.0 of 8.0 GiB"
    )
    assert "guidance one by one, 3 blocks stay" in str(Plan("blocks", True, True, False, 6 * GIB, {"VAE": GIB}, 3))


@pytest.mark.parametrize("size", [24, 32])
def test_weights_in_8_bits_take_less(size: int) -> None:
    config, shape = published("predict2.5-14b"), Shape((704, 1280), 93, given=5)
    plain = make_plan(config, shape, size * GIB, BF16, BF16)
    rounded = make_plan(config, dataclasses.replace(shape, quantise="int8"), size * GIB, BF16, BF16)
    assert PLACEMENTS.index(rounded.placement) <= PLACEMENTS.index(plain.placement)
    assert rounded.fits >= plain.fits and (rounded.placement, rounded.resident) != (plain.placement, plain.resident)
    whole = [
        measure(config, each, BF16, BF16).transformer for each in (shape, dataclasses.replace(shape, quantise="int8"))
    ]
    assert whole[1] == pytest.approx(0.54 * whole[0], rel=0.01)


def test_a_small_model_is_resident_at_once(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(planning, "measure", refuse)
    monkeypatch.setattr("orrery.world.devices.measure", refuse)
    for name in (tiny_folder, "mini"):
        world = orrery.load(name, "cpu")
        plan = world.plan(world.config.resolution, world.config.frames)
        assert plan == Plan("resident", False, False, True, math.inf, plan.peaks) and plan.fits
        assert not world.plan(world.config.resolution, world.config.frames, guidance=False).side_by_side
    with pytest.raises(AssertionError, match="measured"):
        orrery.load(tiny_folder, "cpu", placement="resident")


def test_a_world_plans_for_what_is_drawn_at_once(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = orrery.load(tiny_folder, "cpu", placement="stages")
    asked: list[Shape] = []
    monkeypatch.setattr(planning, "measure", lambda config, shape, *_: asked.append(shape) or needs())
    world.plan((32, 48), 41)
    world.plan((32, 64), 5, given=1, guidance=False)
    assert asked == [Shape((32, 48), 17, 5, 2), Shape((32, 64), 17, 1, 1)]  # chunks of 17; never fewer
    asked.clear()
    world.config = dataclasses.replace(world.config, any_length=True)
    world.plan((32, 48), 41), world.plan((32, 48), 5)
    assert [shape.frames for shape in asked] == [17, 5]
