"""A tiny model of the real classes with random weights, for tests of everything above the networks."""

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch

from orrery.kinds import KINDS
from orrery.nn.control import ControlBranch, ControlConfig
from orrery.nn.dit import DiT, DiTConfig
from orrery.nn.text import TextConfig, TextEncoder, word_tokenizer
from orrery.nn.vae import VAE, VAEConfig
from orrery.weights import ActionConfig, Model, ModelConfig, Sampling, load_model, save_control, save_model

WORDS = "a red blue ball cube falls and bounces rolls to the left right"


def _reason() -> str:
    """Why nothing can be simulated here, or an empty string."""
    from orrery.errors import OrreryError
    from orrery.sim.render import import_mujoco

    try:
        mujoco = import_mujoco()
    except OrreryError as error:
        return str(error)
    try:
        mujoco.GLContext(16, 16).free()
    except Exception as error:  # each backend raises its own
        return f"no headless OpenGL context: {error}"
    return ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what draws where nothing can be drawn."""
    ours = [item for item in items if item.path.parent.name in ("sim", "env")]
    if ours and (reason := _reason()):
        for item in ours:
            item.add_marker(pytest.mark.skip(reason=reason))


def tiny_model() -> Model:
    """Random weights throughout: what starts at zero is drawn as well, else every prompt would give the same video."""
    torch.manual_seed(0)
    tokenizer = word_tokenizer([WORDS])
    text = TextConfig(hidden_size=16, layers=2, heads=2, kv_heads=1, mlp=32, vocab_size=32, length=12)
    config = ModelConfig(
        transformer=DiTConfig(
            width=48,
            depth=2,
            heads=2,
            adaln_rank=8,
            text_dim=text.text_dim,
            context_dim=24,
            padding_mask=False,
            rope_ratios=(1.0, 1.0, 1.0),
            rope_bf16=False,
            max_size=(32, 32, 32),
        ),
        vae=VAEConfig(
            base=8,
            multipliers=(1, 2),
            res_blocks=1,
            temporal_down=(False,),
            patch=4,
            temporal_patch=4,
            factorised=True,
            attention=False,
        ),
        text=text,
        sampling=Sampling(shift=3.0, steps=4, guidance=1.0, conditional_timestep=0.0),
        fps=10.0,
        frames=17,
        resolution=(32, 48),
        training={"recipe": "none: random"},
    )
    model = Model(config, DiT(config.transformer), VAE(config.vae), TextEncoder(text, tokenizer))
    with torch.no_grad():
        for layer in model.transformer.zero_initialised():
            torch.nn.init.normal_(layer.weight, std=0.3)
    return model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model, saved in float32."""
    return save_model(tmp_path_factory.mktemp("models") / "tiny", tiny_model(), "# tiny", dtype=torch.float32)


@pytest.fixture(scope="session")
def controlled_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with branches for all four kinds of control, of random weights, nothing at zero; in float32."""
    place = Path(shutil.copytree(tiny_folder, tmp_path_factory.mktemp("models") / "controlled"))
    base = load_model(place).transformer
    for seed, kind in enumerate(KINDS):
        torch.manual_seed(seed)
        branch = ControlBranch(base.config, ControlConfig(blocks=2, every=1, channels=16)).initialise(base)
        with torch.no_grad():
            for layer in branch.zero_initialised():
                layer.weight.normal_(std=0.15)
                layer.bias.normal_(std=0.1)
        save_control(place, kind, branch, {"recipe": "none: random"}, dtype=torch.float32)
    return place


def tiny_acting_model(handover: str = "latents", window: int = 4, given: int = 3) -> Model:
    """The tiny model at the tabletop's size, told two numbers a frame."""
    base = tiny_model()
    told = ActionConfig(("x", "y"), (0.1, -0.2), (0.5, 0.8), window=window, given=given, handover=handover)
    config = dataclasses.replace(
        base.config,
        transformer=dataclasses.replace(base.config.transformer, actions=8),
        sampling=dataclasses.replace(base.config.sampling, steps=3, guidance=0.0),
        frames=1 + 4 * (window - 1),
        fps=12.0,
        resolution=(64, 64),
        any_length=True,
        actions=told,
    )
    torch.manual_seed(1)
    transformer = DiT(config.transformer)
    with torch.no_grad():
        for layer in transformer.zero_initialised():
            torch.nn.init.normal_(layer.weight, std=0.3)
    return Model(config, transformer, base.vae, base.text)


@pytest.fixture(scope="session")
def acting_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model with the tabletop's actions, of random weights, which hands on latents."""
    return save_model(tmp_path_factory.mktemp("models") / "acting", tiny_acting_model(), "# a", dtype=torch.float32)


@pytest.fixture(scope="session")
def chunked_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, but it draws three latent frames at once and hands on its last frame, as the published model does."""
    model = tiny_acting_model("frames", given=1)
    return save_model(tmp_path_factory.mktemp("models") / "chunked", model, "# c", dtype=torch.float32)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing more than `size` bytes to a file fails, as on a full disk: by the kernel, in whatever library writes."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def full_disk() -> Callable[[int], AbstractContextManager[None]]:
    """`with full_disk(1000): ...` lets no file grow beyond 1000 bytes."""
    return largest_file


@pytest.fixture(scope="session")
def qwen_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2.5-VL, vision tower and all, with a tokenizer that knows WORDS, as transformers saves them."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("qwen") / "reason1"
    torch.manual_seed(0)
    text = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=1, vocab_size=64)
    text |= dict(num_key_value_heads=1, bos_token_id=None, eos_token_id=None, rms_norm_eps=1e-6)
    text |= dict(rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]})
    vision = dict(depth=1, hidden_size=16, num_heads=1, intermediate_size=16, out_hidden_size=16)
    marks = dict(image_token_id=60, video_token_id=61, vision_start_token_id=62, vision_end_token_id=63)
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision | {"fullatt_block_indexes": [0]}, **marks
    )
    transformers.Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>"]
    words = {word: index for index, word in enumerate([*special, *sorted(set(WORDS.split()))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(special[:3])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|endoftext|>")
    fast.save_pretrained(folder)
    return folder
