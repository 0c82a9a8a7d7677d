"""Transfer from words and a control video to frames, against diffusers' Cosmos2_5_TransferPipeline: small random
models, the same noise, one chunk and several."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import orrery
from orrery.flow import numpy_noise
from orrery.video import Video
from orrery.world import Signal, World, transfer

diffusers = pytest.importorskip("diffusers")
pipeline_module = pytest.importorskip("diffusers.pipelines.cosmos.pipeline_cosmos2_5_transfer")
transformer_module = pytest.importorskip("diffusers.models.transformers.transformer_cosmos")
controlnet_module = pytest.importorskip("diffusers.models.controlnets.controlnet_cosmos")

pytestmark = pytest.mark.usefixtures("stand_ins")

PER_PIXEL = 1e-3  # on [0, 1]
HEIGHT, WIDTH, FRAMES, STEPS, SEED = 32, 48, 9, 6, 3
PROMPT, NEGATIVE = "a red ball bounces", "a ball falls"
COPIED = ("time_embed", "crossattn_proj", "img_context_proj")


def new_pipeline(oracle, image: int):
    torch.manual_seed(0)
    shared = dict(
        num_attention_heads=2, attention_head_dim=24, text_embed_dim=32, adaln_lora_dim=8, rope_scale=(1.0, 3.0, 3.0),
        extra_pos_embed_type=None, use_crossattn_projection=True, crossattn_proj_in_channels=64,
        encoder_hidden_states_channels=32, img_context_dim_in=image or None, img_context_dim_out=48,
        max_size=(128, 240, 240), patch_size=(1, 2, 2),
    )  # fmt: skip
    tokens = dict(img_context_num_tokens=256) if image else {}
    transformer = transformer_module.CosmosTransformer3DModel(
        in_channels=17, out_channels=16, num_layers=4, controlnet_block_every_n=2, **shared, **tokens
    )
    controlnet = controlnet_module.CosmosControlNetModel(
        n_controlnet_blocks=2, in_channels=130, latent_channels=18, model_channels=48, **shared
    )
    oracle.randomised(transformer, gain=1.5, sharp=3.0)
    oracle.randomised(controlnet, gain=1.5, sharp=3.0)
    controlnet.patch_embed_base.load_state_dict(transformer.patch_embed.state_dict())
    for name in COPIED:
        if getattr(controlnet, name) is not None:
            getattr(controlnet, name).load_state_dict(getattr(transformer, name).state_dict())
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, use_karras_sigmas=True, sigma_max=200.0,
        sigma_min=0.01, final_sigmas_type="zero",
    )  # fmt: skip
    return pipeline_module.Cosmos2_5_TransferPipeline(
        text_encoder=oracle.text_encoder(), tokenizer=oracle.tokenizer(), transformer=transformer, vae=oracle.vae(),
        scheduler=scheduler, controlnet=controlnet, safety_checker=oracle.Unguarded(),
    )  # fmt: skip


@pytest.fixture(scope="module", params=[0, 12], ids=["plain", "image context"])
def saved(request, tmp_path_factory: pytest.TempPathFactory, oracle) -> Path:
    """A directory that diffusers saved."""
    pipeline = new_pipeline(oracle, request.param)
    pipeline.register_modules(safety_checker=None)
    folder = tmp_path_factory.mktemp("diffusers") / "pipeline"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _mean_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipeline samples the VAE's posterior for control and chained frames; the official code takes its mean."""
    monkeypatch.setattr(pipeline_module, "retrieve_latents", lambda output, generator=None: output.latent_dist.mode())


def moving(count: int) -> Video:
    rng = np.random.default_rng(1)
    return Video(rng.integers(0, 256, (count, 4, 6, 3), dtype=np.uint8).repeat(8, axis=1).repeat(8, axis=2), 16)


def from_diffusers(folder: Path, control: Video, weight: float, chunk: int, overlap: int) -> np.ndarray:
    """uint8 frames [T, H, W, 3]: the pipeline rounds for its guardrail whatever it is asked for."""
    pipeline = pipeline_module.Cosmos2_5_TransferPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    noise = numpy_noise(SEED, (1, 16, (chunk - 1) // 4 + 1, HEIGHT // 8, WIDTH // 8))
    frames = pipeline(
        controls=[Image.fromarray(frame) for frame in control.frames], controls_conditioning_scale=weight,
        prompt=PROMPT, negative_prompt=NEGATIVE, height=HEIGHT, width=WIDTH, num_frames_per_chunk=chunk,
        num_inference_steps=STEPS + 1, guidance_scale=3.0, latents=noise, num_ar_latent_conditional_frames=overlap,
        num_ar_conditional_frames=None, output_type="np",
    ).frames[0]  # fmt: skip
    return frames


def load(folder: Path) -> World:
    return orrery.load(folder, device="cpu", controls=["edge"])


def from_us(world: World, control: Video, weight: float, chunk: int, overlap: int, monkeypatch) -> np.ndarray:
    """[T, H, W, 3] on [0, 1], before the rounding to uint8. Their chunks all begin with the same noise."""
    decoded: list[torch.Tensor] = []
    with warnings.catch_warnings(), monkeypatch.context() as patch:
        warnings.simplefilter("ignore", UserWarning)  # of sizes and lengths that no model was trained at
        patch.setattr("orrery.world.world.numpy_noise", lambda seed, shape: numpy_noise(SEED, shape))
        request = world.transfer_request(
            PROMPT, None, {"edge": Signal(control, weight)}, seed=SEED, steps=STEPS, guidance=3.0,
            negative_prompt=NEGATIVE, size=(HEIGHT, WIDTH), chunk=chunk, overlap=overlap, handover="frames",
        )  # fmt: skip
        original = Video.from_tensor
        patch.setattr(
            Video, "from_tensor", staticmethod(lambda tensor, fps: decoded.append(tensor) or original(tensor, fps))
        )
        video = transfer.run_transfer(world, request).video
    assert len(video) == len(control)
    return video.frames / 255, decoded


@pytest.mark.parametrize("weight", [1.0, 0.4])
def test_the_whole_pipeline(saved: Path, weight: float, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = from_diffusers(saved, moving(FRAMES), weight, FRAMES, 1)
    rounded, decoded = from_us(load(saved), moving(FRAMES), weight, FRAMES, 1, monkeypatch)
    ours = torch.cat([piece[0] for piece in decoded], dim=1).clamp(-1, 1).permute(1, 2, 3, 0).numpy() / 2 + 0.5
    assert expected.shape == ours.shape == (FRAMES, HEIGHT, WIDTH, 3)
    assert 0.1 < expected.std() < 0.5
    # Theirs is cut off to whole grey levels: ours lies within that level, but for the tolerance.
    above = ours - expected
    assert above.min() >= -PER_PIXEL and above.max() <= 1 / 255 + PER_PIXEL
    assert np.abs(rounded - ours).max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize("overlap", [1, 2])
def test_chunks(saved: Path, overlap: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chained through frames, as the pipeline does it; it hands on unrounded frames, we hand on what is written."""
    repeated = 4 * (overlap - 1) + 1
    control = moving(FRAMES + 2 * (FRAMES - repeated))
    expected = from_diffusers(saved, control, 0.7, FRAMES, overlap)
    ours, _ = from_us(load(saved), control, 0.7, FRAMES, overlap, monkeypatch)
    assert np.abs(ours[:FRAMES] - expected[:FRAMES]).max() <= 1.5 / 255 + PER_PIXEL
    assert np.abs(ours - expected).mean() < 0.02 and expected[FRAMES:].std() > 0.1


def test_everything_matters_to_these_random_models(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the parity above would prove nothing."""
    world = load(saved)
    first, _ = from_us(world, moving(FRAMES), 1.0, FRAMES, 1, monkeypatch)
    for name, other in (("PROMPT", "You falls You falls"), ("NEGATIVE", "an image")):
        with monkeypatch.context() as patch:
            patch.setitem(globals(), name, other)
            assert np.abs(from_us(world, moving(FRAMES), 1.0, FRAMES, 1, monkeypatch)[0] - first).max() > 0.02, name
    for control, weight in ((Video(255 - moving(FRAMES).frames, 16), 1.0), (moving(FRAMES), 0.5)):
        assert np.abs(from_us(world, control, weight, FRAMES, 1, monkeypatch)[0] - first).max() > 0.02
