"""The whole way from words to frames against diffusers' Cosmos2_5_PredictBasePipeline: small random models, the same
noise; the directory that diffusers saved loads here, and the one that we write loads there."""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import orrery
from orrery.errors import InputError
from orrery.flow import numpy_noise
from orrery.video import Video
from orrery.weights import convert, find_model
from orrery.world import World

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pipeline_module = pytest.importorskip("diffusers.pipelines.cosmos.pipeline_cosmos2_5_predict")
transformer_module = pytest.importorskip("diffusers.models.transformers.transformer_cosmos")

pytestmark = pytest.mark.usefixtures("stand_ins")

PER_PIXEL = 1e-3  # on [0, 1]
HEIGHT, WIDTH, FRAMES, STEPS, SEED = 32, 48, 9, 6, 3
PROMPT, NEGATIVE = "a red ball bounces", "a ball falls"


def new_pipeline(oracle):
    torch.manual_seed(0)
    text = oracle.text_encoder()
    transformer = transformer_module.CosmosTransformer3DModel(
        in_channels=17, out_channels=16, num_attention_heads=2, attention_head_dim=24, num_layers=2,
        text_embed_dim=32, adaln_lora_dim=8, rope_scale=(1.0, 3.0, 3.0), extra_pos_embed_type=None,
        use_crossattn_projection=True, crossattn_proj_in_channels=64, encoder_hidden_states_channels=32,
    )  # fmt: skip
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, use_karras_sigmas=True, sigma_max=200.0,
        sigma_min=0.01, final_sigmas_type="zero",
    )  # fmt: skip
    return pipeline_module.Cosmos2_5_PredictBasePipeline(
        text_encoder=text, tokenizer=oracle.tokenizer(), vae=oracle.vae(), scheduler=scheduler,
        transformer=oracle.randomised(transformer, gain=1.5, sharp=3.0), safety_checker=oracle.Unguarded(),
    )  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, oracle) -> Path:
    """A directory that diffusers saved."""
    pipeline = new_pipeline(oracle)
    pipeline.register_modules(safety_checker=None)
    folder = tmp_path_factory.mktemp("diffusers") / "pipeline"
    pipeline.save_pretrained(folder)
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "Cosmos2_5_PredictBasePipeline"
    return folder


def theirs(folder: Path):
    pipeline = pipeline_module.Cosmos2_5_PredictBasePipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def moving() -> Video:
    rng = np.random.default_rng(1)
    return Video(rng.integers(0, 256, (5, 4, 6, 3), dtype=np.uint8).repeat(8, axis=1).repeat(8, axis=2), 16)


STARTS = {"text2world": None, "image2world": moving()[0], "video2world": moving()}


def from_diffusers(pipeline, start: Video | None, frames: int = FRAMES) -> torch.Tensor:
    """Frames [T, 3, H, W] on [0, 1]."""
    given = {}
    if start is not None and len(start) == 1:
        given["image"] = Image.fromarray(start.frames[0])
    elif start is not None:
        given["video"] = start.to_tensor()
    noise = numpy_noise(SEED, (1, 16, (frames - 1) // 4 + 1, HEIGHT // 8, WIDTH // 8))
    if start is None:
        # Without a start the pipeline ignores `latents`: it draws its own, which are put in the way of.
        draw = pipeline_module.randn_tensor
        pipeline_module.randn_tensor = lambda *_, **__: noise.clone()
    try:
        return pipeline(
            prompt=PROMPT, negative_prompt=NEGATIVE, height=HEIGHT, width=WIDTH, num_frames=frames,
            num_inference_steps=STEPS + 1, guidance_scale=7.0, latents=noise.clone(), output_type="pt", **given,
        ).frames[0]  # fmt: skip
    finally:
        if start is None:
            pipeline_module.randn_tensor = draw


def from_us(world: World, start: Video | None, frames: int = FRAMES) -> torch.Tensor:
    """The same, before the rounding to uint8."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of sizes that no model was trained at
        request = world.request(
            PROMPT, start, seed=SEED, steps=STEPS, guidance=7.0, negative_prompt=NEGATIVE, frames=frames,
            size=(HEIGHT, WIDTH),
        )  # fmt: skip
    plan = world.plan(request.size, request.frames)
    with torch.no_grad():
        video = world.model.vae.decode(world._latents(request, plan, None))
    rounded = world.run(request)
    pixels = (video[0].clamp(-1, 1) / 2 + 0.5).permute(1, 0, 2, 3)
    assert np.abs(rounded.frames / 255 - pixels.permute(0, 2, 3, 1).numpy()).max() <= 0.5 / 255 + 1e-6
    return pixels


def load(folder: Path, **options) -> World:
    return orrery.load(folder, device="cpu", **options)


@pytest.mark.parametrize("task", STARTS)
def test_the_whole_pipeline(task: str, saved: Path) -> None:
    pipeline, world = theirs(saved), load(saved)
    expected = from_diffusers(pipeline, STARTS[task])
    ours = from_us(world, STARTS[task])
    assert expected.shape == ours.shape == (FRAMES, 3, HEIGHT, WIDTH)
    assert 0.1 < expected.std() < 0.5 and (expected[-1] - expected[0]).abs().mean() > 0.02
    assert (ours - expected).abs().max().item() <= PER_PIXEL


def test_one_frame(saved: Path) -> None:
    expected = from_diffusers(theirs(saved), None, frames=1)
    assert (from_us(load(saved), None, frames=1) - expected).abs().max().item() <= PER_PIXEL


def test_everything_matters_to_these_random_models(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the parity above would prove nothing: words, what to lead away from, time, and the start are all seen."""
    world = load(saved)
    for task, start in STARTS.items():
        expected = from_us(world, start)
        for name, other in (("PROMPT", "You falls You falls"), ("NEGATIVE", "an image")):
            with monkeypatch.context() as patch:
                patch.setitem(globals(), name, other)
                assert (from_us(world, start) - expected).abs().max() > 10 * PER_PIXEL, (task, name)
        assert task == "text2world" or (from_us(world, None) - expected).abs().max() > 10 * PER_PIXEL
    sinusoid = world.model.transformer.t_embedder[0]
    forward = sinusoid.forward
    monkeypatch.setattr(sinusoid, "forward", lambda times: forward(1 - times))
    assert (from_us(world, None) - from_us(load(saved), None)).abs().max() > 10 * PER_PIXEL


def test_official_conventions_can_be_had(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = load(saved, conventions="official")
    assert world.config.transformer.rope_bf16 and not load(saved).config.transformer.rope_bf16
    told: list[float] = []
    sinusoid = world.model.transformer.t_embedder[0]
    forward = sinusoid.forward
    monkeypatch.setattr(sinusoid, "forward", lambda times: told.extend(times.flatten().tolist()) or forward(times))
    from_us(world, None)
    assert told and all(abs(1000 * time - round(1000 * time)) < 1e-3 for time in told)  # truncated to whole numbers


@pytest.mark.parametrize("through", ["diffusers", "orrery"])
def test_what_we_write_loads_in_diffusers(through: str, saved: Path, tmp_path: Path) -> None:
    files = find_model(saved)
    if through == "orrery":
        files = find_model(convert(files, tmp_path / "ours", "orrery"))
        again = from_us(load(tmp_path / "ours"), STARTS["video2world"])
        assert torch.equal(again, from_us(load(saved), STARTS["video2world"]))
    convert(files, tmp_path / "pipeline", "diffusers")
    expected = from_diffusers(theirs(saved), STARTS["video2world"])
    assert torch.equal(from_diffusers(theirs(tmp_path / "pipeline"), STARTS["video2world"]), expected)
    ours = from_us(load(tmp_path / "pipeline"), STARTS["video2world"])
    assert (ours - expected).abs().max().item() <= PER_PIXEL


def test_guidance_side_by_side_is_guidance_one_by_one(saved: Path) -> None:
    world = load(saved, placement="resident")
    request = dict(frames=FRAMES, size=(HEIGHT, WIDTH), steps=3, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        settled = world.request(PROMPT, STARTS["video2world"], **request)
    plan = world.plan(settled.size, settled.frames)
    assert plan.side_by_side
    with torch.no_grad():
        together = world._latents(settled, plan, None)
        singly = world._latents(settled, type(plan)(**plan.__dict__ | {"side_by_side": False}), None)
    assert (together - singly).abs().max() < 1e-4 * singly.abs().max()


def test_a_broken_directory_is_named(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "p"))
    config = folder / "transformer" / "config.json"
    values = json.loads(config.read_text())
    for change, message in (
        ({"num_layers": None}, "lacks the key 'num_layers'"),
        ({"_class_name": "WanTransformer3DModel"}, "is of a WanTransformer3DModel; allowed is Cosmos"),
        ({"num_layers": 3}, "lacks 20 of 69 weights: transformer_blocks.2."),
    ):
        changed = {key: value for key, value in (values | change).items() if value is not None or key != "num_layers"}
        config.write_text(json.dumps(changed))
        with pytest.raises(InputError, match=message) as error:
            load(folder)
        assert "\n" not in str(error.value)
    (folder / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    with pytest.raises(InputError, match="holds a WanPipeline; allowed is Cosmos2_5_PredictBasePipeline"):
        load(folder)
