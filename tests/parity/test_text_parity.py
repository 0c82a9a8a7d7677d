"""Text encoder against hidden states that `transformers`' whole Qwen2.5-VL and Qwen2 give: at most 1e-5 apart."""

import numpy as np
import pytest
import torch

from orrery.nn.text import TextConfig, TextEncoder, word_tokenizer

transformers = pytest.importorskip("transformers")

PROMPTS = ["a red ball falls", "two blue cubes collide and slide to the left side", ""]
SIZES = {"hidden_size": 64, "heads": 4, "kv_heads": 2, "mlp": 96, "layers": 3, "vocab_size": 64}
SHAPE = {**SIZES, "length": 24, "rope_theta": 1e6}
QWEN = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "rms_norm_eps": 1e-6,
    "bos_token_id": None,
    "eos_token_id": None,
}
VISION = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "fullatt_block_indexes": [0]}
ROPE = {"rope_type": "default", "rope_theta": 1e6}


def randomise(model):
    """Every parameter gets noise, so that biases and norms that start at 0 or 1 take part."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def reference(hidden_states):
    """Section 5 in NumPy float64: indices 1..n, mean, unbiased deviation, concatenation."""
    parts = []
    for hidden in hidden_states[1:]:
        h = hidden.detach().double().numpy()
        spread = np.sqrt(np.square(h - h.mean(-1, keepdims=True)).sum(-1, keepdims=True) / (h.shape[-1] - 1))
        parts.append((h - h.mean(-1, keepdims=True)) / (spread + 1e-8))
    return np.concatenate(parts, axis=-1)


def whole_vision_language_model():
    torch.manual_seed(0)
    config = transformers.Qwen2_5_VLConfig(
        text_config={**QWEN, "rope_parameters": {**ROPE, "mrope_section": [2, 3, 3]}},
        vision_config={**VISION, "out_hidden_size": 64},
        image_token_id=60,
        video_token_id=61,
        vision_start_token_id=62,
        vision_end_token_id=63,
        attn_implementation="eager",
    )
    return transformers.Qwen2_5_VLModel(config)


@torch.no_grad()
def test_language_tower_of_a_vision_language_model():
    oracle = whole_vision_language_model().eval()
    randomise(oracle)
    encoder = TextEncoder(TextConfig(kind="qwen2_5_vl", mrope_section=(2, 3, 3), **SHAPE), word_tokenizer(PROMPTS))
    encoder.model.load_state_dict(oracle.language_model.state_dict(), strict=True)
    tokens = encoder.tokenize(PROMPTS)
    states = oracle(input_ids=tokens, output_hidden_states=True).hidden_states
    assert len(states) == 4
    ours = encoder.encode(PROMPTS)
    assert ours.shape == (3, 24, 192)
    assert np.abs(ours.numpy() - reference(states)).max() <= 1e-5


@torch.no_grad()
def test_small_qwen2():
    torch.manual_seed(0)
    encoder = TextEncoder(TextConfig(kind="qwen2", **SHAPE), word_tokenizer(PROMPTS)).eval()
    randomise(encoder)
    config = transformers.Qwen2Config(**QWEN, rope_parameters=ROPE, attn_implementation="eager")
    oracle = transformers.Qwen2ForCausalLM(config).eval()
    oracle.model.load_state_dict(encoder.model.state_dict(), strict=True)
    states = oracle(input_ids=encoder.tokenize(PROMPTS), output_hidden_states=True).hidden_states
    assert np.abs(encoder.encode(PROMPTS).numpy() - reference(states)).max() <= 1e-5


@torch.no_grad()
def test_bfloat16_is_rounded_where_transformers_rounds():
    """Both round a residual stream of 8 bits; the same order of operations keeps them closer to each other than either
    is to float32."""
    torch.manual_seed(0)
    encoder = TextEncoder(TextConfig(kind="qwen2", **SHAPE), word_tokenizer(PROMPTS)).eval()
    randomise(encoder)
    exact = encoder.encode(PROMPTS)
    oracle = transformers.Qwen2Model(transformers.Qwen2Config(**QWEN, rope_parameters=ROPE)).eval()
    oracle.load_state_dict(encoder.model.state_dict(), strict=True)
    states = oracle.bfloat16()(input_ids=encoder.tokenize(PROMPTS), output_hidden_states=True).hidden_states
    ours, theirs = encoder.bfloat16().encode(PROMPTS).float().numpy(), reference(states)
    rounding = np.abs(theirs - exact.numpy()).mean()
    assert rounding > 1e-3 and np.abs(ours - theirs).mean() < 0.5 * rounding


@torch.no_grad()
def test_last_state_is_after_the_final_norm():
    torch.manual_seed(0)
    encoder = TextEncoder(TextConfig(kind="qwen2", **SHAPE), word_tokenizer(PROMPTS)).eval()
    before = encoder.encode(PROMPTS)
    encoder.model.norm.weight[:32] *= 3  # changes the shape of the last state, and only of that one
    after = encoder.encode(PROMPTS)
    assert torch.equal(before[..., :128], after[..., :128])
    assert (before[..., 128:] - after[..., 128:]).abs().max() > 0.1
