"""Text encoder: the hidden states of a Qwen2.5 language model, as the transformer's cross-attention wants them.

The published models use the language tower of Cosmos-Reason1-7B (a Qwen2.5-VL-7B); the mini has a small Qwen2 of its
own, trained together with its transformer. Both go the same way: the prompt is put into a template, cut or padded on
the right to exactly L tokens, and run without an attention mask (causal, so padding never reaches a real token; the
transformer does see the padded positions). The outputs of all layers, the last one after the final norm, are each
brought to mean 0 and deviation 1 per token, and are concatenated.

The network is `nn.qwen`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from orrery.nn.qwen import Qwen2

if TYPE_CHECKING:
    import tokenizers

KINDS = ("qwen2", "qwen2_5_vl")
PAD, UNKNOWN = "[PAD]", "[UNK]"
CHAT_TEMPLATE = (
    "<|im_start|>system\nYou are a helpful assistant who will provide prompts to an image generator.<|im_end|>\n"
    "<|im_start|>user\n{prompt}<|im_end|>\n"
)


@dataclass(frozen=True)
class TextConfig:
    """Shape of a text encoder. `text_dim` = layers * hidden_size is the width that it hands to the transformer.

    kind: "qwen2", or "qwen2_5_vl" for the language tower of a Qwen2.5-VL. length: L. template: how a prompt is
    wrapped; must contain {prompt}. pad_token: the tokenizer's padding. mrope_section: how the rotary frequencies of
    one head are split over time, height and width ("qwen2_5_vl" only; text has equal positions on all three).
    """

    kind: str = "qwen2"
    hidden_size: int = 128
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 512
    vocab_size: int = 256
    length: int = 40
    template: str = "{prompt}"
    pad_token: str = PAD
    rope_theta: float = 10000.0
    mrope_section: tuple[int, int, int] = (16, 24, 24)
    norm_eps: float = 1e-6

    def __post_init__(self):
        object.__setattr__(self, "mrope_section", tuple(self.mrope_section))  # JSON gives a list
        if self.kind not in KINDS:
            raise ValueError(f"text kind is {self.kind!r}; allowed are {', '.join(KINDS)}")
        for name in ("hidden_size", "layers", "heads", "kv_heads", "mlp", "vocab_size", "length"):
            if getattr(self, name) < 1:
                raise ValueError(f"text {name} is {getattr(self, name)}; it must be at least 1")
        if self.hidden_size % (2 * self.heads) or self.heads % self.kv_heads:
            raise ValueError(
                f"text hidden_size {self.hidden_size} must be an even multiple of heads {self.heads}, "
                f"and heads a multiple of kv_heads {self.kv_heads}"
            )
        if self.kind == "qwen2_5_vl" and sum(self.mrope_section) != self.hidden_size // self.heads // 2:
            raise ValueError(
                f"mrope_section {self.mrope_section} must sum to half a head, {self.hidden_size // self.heads // 2}"
            )
        if "{prompt}" not in self.template:
            raise ValueError(f"text template {self.template!r} must contain {{prompt}}")

    @property
    def text_dim(self) -> int:
        """Width of the encoder's output."""
        return self.layers * self.hidden_size


PRESETS = {
    "mini": TextConfig(),
    "reason1-7b": TextConfig(
        kind="qwen2_5_vl",
        hidden_size=3584,
        layers=28,
        heads=28,
        kv_heads=4,
        mlp=18944,
        vocab_size=152064,
        length=512,
        template=CHAT_TEMPLATE,
        pad_token="<|endoftext|>",
        rope_theta=1e6,
    ),
}


def word_tokenizer(captions: Iterable[str]) -> "tokenizers.Tokenizer":
    """A tokenizer whose vocabulary is the words and punctuation marks of `captions`, lower-cased, in alphabetical
    order after [PAD] = 0 and [UNK] = 1. The same set of words gives the same tokenizer. ValueError without any word.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    splitter = pre_tokenizers.Whitespace()
    words = {word for caption in captions for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(caption))}
    if not words:
        raise ValueError("a word tokenizer needs at least one caption with a word in it; got none")
    vocabulary = {word: index for index, word in enumerate([PAD, UNKNOWN, *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    return tokenizer


class PromptReader:
    """A prompt as the encoder will see it: template, tokenizer, cut or padded to L. Needs no network.

    Args:
        config: template, length, padding.
        tokenizer: a `tokenizers.Tokenizer` or a tokenizer of `transformers`; its ids must fit into vocab_size.
    """

    def __init__(self, config: TextConfig, tokenizer: Any):
        self.config = config
        self.tokenizer = tokenizer
        self._ids, self._pad, size = _reader(tokenizer, config.pad_token)
        if size > config.vocab_size:
            raise ValueError(f"the tokenizer has {size} tokens; vocab_size is {config.vocab_size}, which is too few")

    def ids(self, prompt: str) -> list[int]:
        """Exactly L token ids: the first L of the wrapped prompt, or padded on the right."""
        found = self._all(prompt)[: self.config.length]
        return found + [self._pad] * (self.config.length - len(found))

    def unknown_words(self, prompt: str) -> list[str]:
        """Words of the prompt, in order and once each, that a word tokenizer does not know; [] for a BPE tokenizer."""
        closed = getattr(getattr(self.tokenizer, "model", None), "unk_token", None) == UNKNOWN
        if not closed or self.tokenizer.normalizer is None:  # none of `word_tokenizer`
            return []
        text = self.tokenizer.normalizer.normalize_str(prompt)
        words = [word for word, _ in self.tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        return list(dict.fromkeys(word for word in words if self.tokenizer.token_to_id(word) is None))

    def tokens_cut(self, prompt: str) -> int:
        """How many tokens of the wrapped prompt `ids` cuts off because they do not fit into L; mostly 0."""
        return max(0, len(self._all(prompt)) - self.config.length)

    def _all(self, prompt: str) -> list[int]:
        return self._ids(self.config.template.replace("{prompt}", prompt))  # not format(): a prompt may contain braces


class TextEncoder(nn.Module):
    """Prompts or token ids -> [B, L, layers * hidden_size].

    Args:
        config: the shape.
        tokenizer: a `tokenizers.Tokenizer` or a tokenizer of `transformers`; its ids must fit into vocab_size.

    `.model` has fresh weights; the state dict holds its parameters and nothing else, under the names of `transformers`.
    """

    def __init__(self, config: TextConfig, tokenizer: Any):
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.reader = PromptReader(config, tokenizer)
        self.model = Qwen2(
            config.vocab_size, config.hidden_size, config.layers, config.heads, config.kv_heads, config.mlp,
            config.rope_theta, config.norm_eps,
        )  # fmt: skip

    def tokenize(self, prompts: list[str]) -> Tensor:
        """Token ids [B, L] int64 on the model's device: template, then cut to the first L or padded on the right."""
        rows = torch.tensor([self.reader.ids(prompt) for prompt in prompts], dtype=torch.int64)
        return rows.reshape(-1, self.config.length).to(self.model.embed_tokens.weight.device)

    def forward(self, tokens: Tensor) -> Tensor:
        """Hidden states of layers 1 to n for token ids [B, L], normalised and concatenated: [B, L, text_dim] in the
        model's dtype. ValueError when the length is not L."""
        if tokens.ndim != 2 or tokens.shape[1] != self.config.length:
            raise ValueError(f"tokens must be [B, {self.config.length}]; got {list(tokens.shape)}")
        return torch.cat([_standardise(hidden) for hidden in self.model(tokens)], dim=-1)

    def encode(self, prompts: list[str]) -> Tensor:
        """`forward` of `tokenize`: [B, L, text_dim]. An empty prompt is encoded like any other."""
        return self(self.tokenize(prompts))


def _standardise(hidden: Tensor) -> Tensor:
    """(h - mean) / (std + 1e-8) over the last axis, with the unbiased deviation, in h's dtype."""
    std, mean = torch.std_mean(hidden, dim=-1, keepdim=True, correction=1)
    return (hidden - mean) / (std + 1e-8)


def _reader(tokenizer: Any, pad_token: str) -> tuple[Callable[[str], list[int]], int, int]:
    """What is needed of either family of tokenizers: text -> ids, the padding's id, and the number of tokens."""
    if hasattr(tokenizer, "convert_tokens_to_ids"):  # transformers
        pad, size = tokenizer.get_vocab().get(pad_token), len(tokenizer)

        def ids(text: str) -> list[int]:
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    else:  # tokenizers
        pad, size = tokenizer.token_to_id(pad_token), tokenizer.get_vocab_size()

        def ids(text: str) -> list[int]:
            return tokenizer.encode(text, add_special_tokens=False).ids

    if pad is None:
        raise ValueError(f"the tokenizer has no token {pad_token!r}, which the text configuration pads with")
    return ids, pad, size
