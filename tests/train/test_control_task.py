"""Training a control branch: the base stays as it is, the branch learns, and the run resumes bit for bit."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from orrery.control.edge import edge_map
from orrery.control.segmentation import seg_map
from orrery.data.clips import ClipDataset
from orrery.errors import InputError
from orrery.nn.control import ControlBranch
from orrery.nn.dit import Conditions
from orrery.train.checkpoint import CheckpointFolder
from orrery.train.control import ControlClips, ControlTask
from orrery.train.recipe import BranchRecipe, load_recipe
from orrery.train.start import open_run, train
from orrery.weights import load_model, load_part
from orrery.weights.sources import find_model

FAST = {"name": "adamw", "lr": 3e-3, "matrix_lr": None, "warmup": 0, "decay": "none"}
FAST = {key: value for key, value in FAST.items() if value is not None}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_vae: Path, dataset: Path) -> Path:
    """A model folder with random weights, nothing in the transformer at zero."""
    from orrery.nn.dit import DiT, DiTConfig
    from orrery.nn.text import TextConfig, TextEncoder, word_tokenizer
    from orrery.train.export import load_vae
    from orrery.weights import Model, ModelConfig, Sampling, save_model

    torch.manual_seed(1)
    vae, _ = load_vae(tiny_vae)
    text = TextConfig(hidden_size=16, layers=2, heads=2, kv_heads=1, mlp=32, vocab_size=32, length=12)
    transformer = DiT(
        DiTConfig(width=32, depth=2, heads=2, adaln_rank=8, text_dim=text.text_dim, context_dim=16, padding_mask=False)
    )
    for layer in transformer.zero_initialised():
        torch.nn.init.normal_(layer.weight, std=0.1)
    config = ModelConfig(
        transformer=transformer.config, vae=vae.config, text=text, sampling=Sampling(steps=2, guidance=0.0),
        fps=10.0, frames=5, resolution=(16, 16), training={},
    )  # fmt: skip
    encoder = TextEncoder(text, word_tokenizer(ClipDataset(dataset).captions))
    folder = tmp_path_factory.mktemp("base") / "model"
    return save_model(folder, Model(config, transformer, vae, encoder), "# base", dtype=torch.float32)


def opened(recipe: Path):
    return open_run(load_recipe(recipe), torch.device("cpu"))


def test_the_branch_learns_and_the_base_stays(tmp_path: Path, base: Path, write_recipe: Callable[..., Path]) -> None:
    trainer = opened(
        write_recipe("control", tmp_path / "run", 80, base, data={"max_clips": 4}, batch=4, optimizer={"ema": 0.9})
    )
    task = trainer.task
    assert isinstance(task, ControlTask)
    before = {name: value.clone() for name, value in task.base.state_dict().items()}
    fixed = [task.batch() for _ in range(4)]

    def loss(model: torch.nn.Module) -> float:
        with torch.no_grad():
            return float(np.mean([float(task.loss(model, batch)[0]) for batch in fixed]))

    first = loss(task.model)
    plain = [task._errors(task.model, b.x0, b.noise, b.t, b.count, task.base["text"](b.tokens)) for b in fixed]
    assert first == pytest.approx(float(torch.cat(plain).mean()), rel=1e-5), "step 0 is the base model"
    for _ in range(80):
        trainer.train_step()
    assert loss(task.model) < 0.9 * first
    assert all(torch.equal(value, before[name]) for name, value in task.base.state_dict().items())
    assert not any(p.requires_grad for p in task.base.parameters())


@pytest.mark.parametrize("kind", ["edge", "blur", "depth", "seg"])
def test_every_kind_is_exported_and_acts(
    kind: str, tmp_path: Path, base: Path, write_recipe: Callable[..., Path]
) -> None:
    folder = train(write_recipe("control", tmp_path / kind, 3, base, control={"kind": kind}))
    files = find_model(folder)
    assert list(files.config.controls) == [kind]
    branch = load_part(files, f"control-{kind}")
    trained = opened(write_recipe("control", tmp_path / kind, 3, base, control={"kind": kind})).ema.model
    for name, value in trained.get_submodule("branch").state_dict().items():
        assert torch.allclose(value.half().float(), branch.state_dict()[name], atol=1e-7), name
    assert isinstance(branch, ControlBranch) and any(bool(layer.weight.any()) for layer in branch.zero_initialised())
    about = files.config.training["controls"][kind]
    assert about["step"] == 3 and about["validation"]["without"] > 0
    assert list((tmp_path / kind / "sheets").glob("*.png"))
    assert all(
        torch.equal(value, load_model(base).transformer.state_dict()[name])
        for name, value in load_model(folder).transformer.state_dict().items()
    )


def test_branches_gather_in_one_folder(tmp_path: Path, base: Path, write_recipe: Callable[..., Path]) -> None:
    for kind in ("seg", "edge"):
        recipe = write_recipe("control", tmp_path / kind, 2, base, control={"kind": kind})
        train(recipe)
        train(recipe, export=tmp_path / "together")
    assert list(find_model(tmp_path / "together").config.controls) == ["edge", "seg"]
    card = (tmp_path / "together" / "README.md").read_text()
    assert "## Control branch: edge" in card and "## Control branch: seg" in card and "## VAE" in card


def test_stopped_and_resumed_is_bitwise_the_same(tmp_path: Path, base: Path, write_recipe: Callable[..., Path]) -> None:
    """Stopped after step 6, where a checkpoint is written, and started again by the same command."""
    whole, parts = (
        write_recipe("control", tmp_path / name, 10, base, checkpoint={"steps": 3}) for name in ("whole", "parts")
    )
    train(whole)
    trainer = opened(parts)
    for _ in range(6):
        trainer.train_step()
    trainer.save()
    del trainer
    train(parts)
    states = [
        CheckpointFolder.load(CheckpointFolder(tmp_path / name / "checkpoints", 1).latest())  # type: ignore[arg-type]
        for name in ("whole", "parts")
    ]
    for part in ("model", "ema"):
        assert all(torch.equal(value, states[1][part][name]) for name, value in states[0][part].items())
    assert states[0]["task"] == states[1]["task"] and torch.equal(*(each["random"]["torch"] for each in states))


def test_control_videos_are_of_the_clip_they_stand_for(dataset: Path) -> None:
    clips = ClipDataset(dataset)
    edge = ControlClips(clips, BranchRecipe(kind="edge", strength="low"))
    assert np.array_equal(edge[3].frames, edge_map(clips[3].frames, "low")) and edge[3].caption == clips[3].caption
    seg = ControlClips(clips, BranchRecipe(kind="seg"))[2].frames
    with np.load(dataset / clips.entries[2].id / "segmentation.npz") as truth:
        assert np.array_equal(seg.any(-1), truth["front"] > 0)
        assert len(np.unique(seg_map(truth["front"]).reshape(-1, 3), axis=0)) == 2
    depth = ControlClips(clips, BranchRecipe(kind="depth"))[2].frames
    assert set(np.unique(depth)) == {0, 255} and np.array_equal(depth[..., 0] == 255, seg.any(-1)), "near is bright"
    drawn = ControlClips(clips, BranchRecipe(kind="blur"))
    again = ControlClips(clips, BranchRecipe(kind="blur"))
    assert np.array_equal(drawn[1].frames, again[1].frames), "a clip's strength follows from its name"


def test_mirrored_and_midstream_batches_keep_control_and_clip_together(
    tmp_path: Path, base: Path, write_recipe: Callable[..., Path]
) -> None:
    task = opened(write_recipe("control", tmp_path / "run", 1, base, batch=8, loss={"midstream": 1.0, "draws": 2})).task
    assert isinstance(task, ControlTask)
    batch = task.batch()
    assert batch.control is not None and batch.control.shape == batch.x0.shape == (16, 16, 1, 2, 2)
    pairs = [(i, side) for i in range(8) for side in range(2)]
    for row in range(16):
        own = [p for p in pairs if torch.equal(task.cache.latents[p].float()[:, 1:], batch.x0[row])]
        assert any(torch.equal(task.control.latents[p].float()[:, 1:], batch.control[row]) for p in own)


def test_without_a_branch_is_the_base(tmp_path: Path, base: Path, write_recipe: Callable[..., Path]) -> None:
    task = opened(write_recipe("control", tmp_path / "run", 1, base)).task
    conditions = task._conditions(task.model, torch.zeros(1, 12, 32), None, None)
    assert isinstance(conditions, Conditions) and not conditions.controls


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"control": {"kind": "sketch"}}, "control.kind = 'sketch'; allowed: 'edge', 'blur', 'depth' or 'seg'"),
        ({"control": {"every": 2}}, "needs a deeper base than 2 blocks"),
        ({"control": {"channels": 8}}, "control latents have 16 channels, channels is 8"),
        (
            {"control": {"kind": "edge", "strength": "huge"}},
            "control.strength = 'huge' for edge; allowed: random, none",
        ),
        ({"base": "nowhere"}, "unknown model 'nowhere'"),
        ({"control": {"blocs": 3}}, "unknown key control.blocs = 3; allowed: kind, blocks, every"),
    ],
)
def test_refused(change: dict, message: str, tmp_path: Path, base: Path, write_recipe: Callable[..., Path]) -> None:
    with pytest.raises(InputError) as error:
        opened(write_recipe("control", tmp_path / "run", 1, base, **change))
    assert message in str(error.value)


def test_clips_without_the_truth_of_a_control_are_left_out(
    tmp_path: Path, base: Path, write_recipe: Callable[..., Path], more_clips: Callable, capsys: pytest.CaptureFixture
) -> None:
    root = tmp_path / "bare"
    more_clips(root, [0, 1, 1000])
    (root / "drop-0000000" / "depth.npz").unlink()
    change = {"control": {"kind": "depth"}, "data": {"root": str(root)}}
    opened(write_recipe("control", tmp_path / "run", 1, base, **change))
    seen = json.loads((tmp_path / "run" / "clips.json").read_text())
    assert [entry["id"] for entry in seen["train"]] == ["drop-0000001"]
    assert "1 of 3 clips have no depth.npz; left out" in capsys.readouterr().err
    for seed in (1, 1000):
        (root / f"drop-{seed:07d}" / "depth.npz").unlink()
    with pytest.raises(InputError, match="none of the 3 clips of .* has a depth.npz; make the dataset with"):
        opened(write_recipe("control", tmp_path / "other", 1, base, **change))


def test_missing_truth_is_named(tmp_path: Path, more_clips: Callable) -> None:
    root = tmp_path / "bare"
    more_clips(root, [0])
    (root / "drop-0000000" / "depth.npz").unlink()
    clips = ControlClips(ClipDataset(root), BranchRecipe(kind="depth"))
    with pytest.raises(InputError, match="depth.npz does not exist: the clip was made without depth"):
        clips[0]
