"""Text encoder: tokenizers, padding, normalisation, training of the mini (base_model.md section 5)."""

import copy
import json
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch

from orrery.nn.text import CHAT_TEMPLATE, PRESETS, TextConfig, TextEncoder, word_tokenizer

CAPTIONS = ["A red ball falls, and bounces.", "a blue cube slides left"]
SMALL = TextConfig(hidden_size=32, layers=3, heads=4, kv_heads=2, mlp=64, vocab_size=32, length=12)


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return TextEncoder(SMALL, word_tokenizer(CAPTIONS))


def test_importing_the_module_does_not_import_transformers():
    code = "import sys, orrery.nn.text; print([m for m in ('transformers', 'tokenizers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_word_tokenizer_depends_on_the_words_alone():
    tokenizer = word_tokenizer(CAPTIONS)
    assert tokenizer.to_str() == word_tokenizer([c.upper() for c in reversed(CAPTIONS)]).to_str()
    vocabulary = tokenizer.get_vocab()
    assert vocabulary["[PAD]"] == 0 and vocabulary["[UNK]"] == 1
    assert sorted(vocabulary, key=vocabulary.get)[2:] == sorted(
        set("a red ball falls , and bounces . blue cube slides left".split())
    )
    assert tokenizer.encode("Red  CUBE, green").ids == [vocabulary[w] for w in ("red", "cube", ",", "[UNK]")]
    with pytest.raises(ValueError, match="at least one caption"):
        word_tokenizer(["  "])


def test_tokens_are_padded_on_the_right_or_cut(encoder):
    tokens = encoder.tokenize(["a red ball", "", "a " * 20])
    assert tokens.shape == (3, 12) and tokens.dtype == torch.int64
    vocabulary = encoder.tokenizer.get_vocab()
    assert tokens[0].tolist() == [vocabulary["a"], vocabulary["red"], vocabulary["ball"]] + [0] * 9
    assert tokens[1].tolist() == [0] * 12 and tokens[2].tolist() == [vocabulary["a"]] * 12
    assert [encoder.reader.tokens_cut(p) for p in ("a red ball", "a " * 20)] == [0, 8]
    assert encoder.tokenize([]).shape == (0, 12)


def test_unknown_words_are_listed_once_in_order(encoder):
    assert encoder.reader.unknown_words("A GREEN ball, a {purple} green cube") == ["green", "{", "purple", "}"]
    assert encoder.reader.unknown_words("") == []


def test_each_layer_is_standardised_per_token(encoder):
    out = encoder.encode(["a red ball falls", "a blue cube"])
    assert out.shape == (2, 12, 96) and SMALL.text_dim == 96
    layers = out.unflatten(-1, (3, 32))
    assert torch.allclose(layers.mean(-1), torch.zeros(()), atol=1e-5)
    assert torch.allclose(layers.std(-1, correction=1), torch.ones(()), atol=1e-4)
    assert not torch.allclose(layers[..., 0, :], layers[..., 1, :], atol=0.1)


def test_a_token_sees_what_is_before_it_and_nothing_after(encoder):
    first, second, third = encoder.encode(["a red ball falls", "a red cube", "blue red ball falls"])
    assert torch.allclose(first[:2], second[:2], atol=1e-6)
    assert not torch.allclose(first[2], second[2], atol=1e-2)
    assert not torch.allclose(first[3], third[3], atol=1e-3)


def test_padding_is_an_ordinary_token_that_sees_the_prompt(encoder):
    first, second = encoder.encode(["a red ball", "a blue cube"])
    assert not torch.allclose(first[-1], second[-1], atol=1e-3)
    assert encoder.model.embed_tokens.weight[0].abs().sum() > 0


def test_gradients_reach_the_embeddings_of_words_and_padding(encoder):
    out = encoder.encode(["a red ball"])
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    rows = encoder.model.embed_tokens.weight.grad.abs().sum(-1)
    vocabulary = encoder.tokenizer.get_vocab()
    assert all(rows[vocabulary[word]] > 0 for word in ("a", "red", "ball", "[PAD]")) and rows[vocabulary["cube"]] == 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


def test_the_encoder_can_learn_to_tell_prompts_apart():
    torch.manual_seed(0)
    encoder = TextEncoder(SMALL, word_tokenizer(CAPTIONS))
    head = torch.nn.Linear(SMALL.text_dim, 2)
    optimiser = torch.optim.Adam([*encoder.parameters(), *head.parameters()], lr=1e-2)
    losses = []
    for _ in range(30):
        logits = head(encoder.encode(["a red ball", "a blue ball"]).mean(1))
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1]))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 < losses[0]


def test_same_prompt_same_bits(encoder):
    assert torch.equal(encoder.encode(CAPTIONS), encoder.encode(CAPTIONS))


def test_state_dict_round_trip_through_safetensors(encoder, tmp_path):
    from safetensors.torch import load_file, save_file

    assert set(encoder.state_dict()) == {name for name, _ in encoder.named_parameters()}
    save_file(encoder.state_dict(), tmp_path / "text.safetensors")
    with torch.device("meta"):
        empty = TextEncoder(SMALL, encoder.tokenizer)
    empty.load_state_dict(load_file(tmp_path / "text.safetensors"), strict=True, assign=True)
    assert torch.equal(empty.encode(CAPTIONS), encoder.encode(CAPTIONS))


def test_rotary_angles_are_computed_in_fp32_whatever_the_weights_are(encoder):
    cast = copy.deepcopy(encoder).bfloat16()
    assert cast.encode(["a red ball"]).dtype == torch.bfloat16
    exact = encoder.model._rotary(SMALL.length, torch.zeros(1))
    rounded = cast.model._rotary(SMALL.length, torch.zeros(1, dtype=torch.bfloat16))
    assert all(torch.equal(a.bfloat16(), b) for a, b in zip(exact, rounded))
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, encoder.model._rotary(SMALL.length, torch.zeros(1)), exact))


def test_an_encoder_does_not_wait_for_transformers():
    code = (
        "import sys\nfrom orrery.nn.text import PRESETS, TextEncoder, word_tokenizer\n"
        "TextEncoder(PRESETS['mini'], word_tokenizer(['a ball'])).encode(['a ball'])\n"
        "assert 'transformers' not in sys.modules and 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_config_survives_json():
    for config in PRESETS.values():
        assert TextConfig(**json.loads(json.dumps(asdict(config)))) == config


def test_presets_have_the_published_sizes():
    assert PRESETS["mini"].text_dim == 256 and PRESETS["mini"].length == 40
    published = PRESETS["reason1-7b"]
    assert published.text_dim == 100352 and published.length == 512
    tokenizer = word_tokenizer(CAPTIONS)
    with torch.device("meta"):
        encoder = TextEncoder(replace(published, pad_token="[PAD]"), tokenizer)
    assert sum(p.numel() for p in encoder.parameters()) == 7_070_619_136
    assert encoder.model.layers[27].self_attn.k_proj.weight.shape == (512, 3584)


def chat_tokenizer():
    """A byte-level BPE tokenizer without merges, with the special tokens of the chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return tokenizer


@pytest.mark.parametrize("family", ["tokenizers", "transformers"])
def test_chat_template_with_either_family_of_tokenizers(family):
    bpe = chat_tokenizer()
    tokenizer = bpe
    if family == "transformers":
        from transformers import PreTrainedTokenizerFast

        tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<|endoftext|>")
    config = replace(SMALL, vocab_size=300, length=160, template=CHAT_TEMPLATE, pad_token="<|endoftext|>")
    encoder = TextEncoder(config, tokenizer)
    tokens = encoder.tokenize(["a {red} ball"])[0].tolist()
    start, end, pad = (bpe.token_to_id(t) for t in ("<|im_start|>", "<|im_end|>", "<|endoftext|>"))
    assert (tokens[0], tokens.count(start), tokens.count(end), tokens[-1]) == (start, 2, 2, pad)
    text = bpe.decode(tokens, skip_special_tokens=False)
    assert text.split("<|endoftext|>")[0] == (
        "<|im_start|>system\nYou are a helpful assistant who will provide prompts to an image generator.<|im_end|>\n"
        "<|im_start|>user\na {red} ball<|im_end|>\n"
    )
    assert encoder.reader.unknown_words("zxqv") == []
    long = encoder.tokenize(["x" * 500])[0].tolist()
    assert len(long) == 160 and long.count(end) == 1 and pad not in long  # the closing tag is lost


def test_impossible_configurations_are_refused(encoder):
    with pytest.raises(ValueError, match="'bert'.*qwen2"):
        TextConfig(kind="bert")
    with pytest.raises(ValueError, match="layers is 0"):
        TextConfig(layers=0)
    with pytest.raises(ValueError, match="hidden_size 130"):
        TextConfig(hidden_size=130)
    with pytest.raises(ValueError, match="must contain"):
        TextConfig(template="prompt")
    with pytest.raises(ValueError, match="sum to half a head, 16"):
        TextConfig(kind="qwen2_5_vl")
    with pytest.raises(ValueError, match="14 tokens; vocab_size is 8"):
        TextEncoder(replace(SMALL, vocab_size=8), word_tokenizer(CAPTIONS))
    with pytest.raises(ValueError, match="<pad>"):
        TextEncoder(replace(SMALL, pad_token="<pad>"), word_tokenizer(CAPTIONS))
    with pytest.raises(ValueError, match=r"\[B, 12\]; got \[1, 11\]"):
        encoder(torch.zeros(1, 11, dtype=torch.int64))
