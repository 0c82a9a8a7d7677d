"""Small random parts of diffusers' pipelines, and stand-ins for what they need and this machine may lack."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

WORDS = (
    "a red ball falls and bounces system user You are helpful assistant who will provide prompts to an image generator"
)


class Unguarded:
    """In place of the guardrail, which needs models of its own."""

    def to(self, device):
        return self

    def check_text_safety(self, prompt):
        return True

    def check_video_safety(self, video):
        return video


class NoGuardrail:
    """Called like the guardrail's class, makes an `Unguarded`: which is no instance of it, so that Predict's pipeline
    does not round to whole grey levels for a check that is not made."""

    def __new__(cls):
        return Unguarded()


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """For torchvision, which serves the oracle to resize a mask and to read an image and may be missing beside a CPU
    torch; and for the guardrail, which a pipeline without one would make."""
    pytest.importorskip("diffusers.pipelines.cosmos.pipeline_cosmos2_5_transfer")
    from diffusers.models.controlnets import controlnet_cosmos
    from diffusers.models.transformers import transformer_cosmos
    from diffusers.pipelines.cosmos import pipeline_cosmos2_5_predict, pipeline_cosmos2_5_transfer

    for module in (pipeline_cosmos2_5_predict, pipeline_cosmos2_5_transfer):
        monkeypatch.setattr(module, "CosmosSafetyChecker", NoGuardrail)
    resize = SimpleNamespace(
        functional=SimpleNamespace(
            resize=lambda x, size, interpolation: torch.nn.functional.interpolate(x, size=size, mode="nearest")
        ),
        InterpolationMode=SimpleNamespace(NEAREST="nearest"),
    )
    read = SimpleNamespace(
        transforms=SimpleNamespace(
            functional=SimpleNamespace(
                to_tensor=lambda image: torch.from_numpy(np.asarray(image)).permute(2, 0, 1).float() / 255
            )
        )
    )
    monkeypatch.setattr(transformer_cosmos, "transforms", resize, raising=False)
    monkeypatch.setattr(controlnet_cosmos, "transforms", resize, raising=False)
    monkeypatch.setattr(pipeline_cosmos2_5_predict, "torchvision", read, raising=False)


def tokenizer():
    """Words, and Qwen's chat with its marks, as the published tokenizer has them."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    from orrery.weights.conversion import CHAT

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "[UNK]"]
    words = sorted(set(WORDS.split()) | {"."})
    vocabulary = {word: index for index, word in enumerate([*special, *words])}
    base = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    base.pre_tokenizer = pre_tokenizers.Whitespace()
    base.add_special_tokens(special[:3])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=base, pad_token="<|endoftext|>", padding_side="right")
    fast.chat_template = CHAT
    return fast


def randomised(module: torch.nn.Module, gain: float = 0.8, sharp: float = 1.0) -> torch.nn.Module:
    """Every parameter drawn, so that nothing starts at zero or one; outputs of about one. sharp: of queries and keys,
    so that attention picks words out of a long padding."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim < 2 or "gamma" in name:
                mean = 0.0 if "bias" in name else sharp if ".norm_q." in name or ".norm_k." in name else 1.0
                parameter.normal_(mean=mean, std=0.2)
            else:
                parameter.normal_(std=gain / parameter[0].numel() ** 0.5)
    return module.eval()


def text_encoder() -> torch.nn.Module:
    import transformers

    return transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(
            text_config=dict(
                hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=1, vocab_size=64, rms_norm_eps=1e-6, bos_token_id=None, eos_token_id=None,
                rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
            ),
            vision_config=dict(
                depth=1, hidden_size=32, num_heads=2, intermediate_size=32, out_hidden_size=32,
                fullatt_block_indexes=[0],
            ),
            image_token_id=60, video_token_id=61, vision_start_token_id=62, vision_end_token_id=63,
        )
    )  # fmt: skip


@pytest.fixture(scope="session")
def oracle() -> SimpleNamespace:
    """tokenizer(), text_encoder(), vae(): new and random; randomised(module); Unguarded."""
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("transformers")

    def vae() -> torch.nn.Module:
        return randomised(diffusers.AutoencoderKLWan(base_dim=8))

    return SimpleNamespace(
        tokenizer=tokenizer, text_encoder=lambda: randomised(text_encoder()), vae=vae, randomised=randomised,
        Unguarded=Unguarded,
    )  # fmt: skip
