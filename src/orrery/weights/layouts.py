"""Key layouts: one table for each, used by loading, saving and converting alike.

Our networks carry the names of the published files: the transformer those of Cosmos-Predict2.5 without `net.`, the VAE
those of `Wan2.1_VAE.pth`, the text encoder those of Qwen2.5-VL's language tower. So a layout is a rename of our names,
a prefix that a file may put before them, and the keys of a file that carry no weight of the network. Specification of
the base model, sections 2.1, 2.2 and 3.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from torch import Tensor

from orrery.nn.dit import DiTConfig
from orrery.nn.rope import axis_sizes
from orrery.nn.vae import VAEConfig

Rename = Callable[[str], str]

# Of the transformer: ours (and official), diffusers'. Applied in this order to a dotted name.
DIFFUSERS_TRANSFORMER = (
    (r"^x_embedder\.proj\.1\.", "patch_embed.proj."),
    (r"^t_embedder\.1\.", "time_embed.t_embedder."),
    (r"^t_embedding_norm\.", "time_embed.norm."),
    (r"^final_layer\.adaln_modulation\.(\d)\.", r"norm_out.linear_\1."),
    (r"^final_layer\.linear\.", "proj_out."),
    (r"^blocks\.", "transformer_blocks."),
    (r"\.adaln_modulation_self_attn\.(\d)\.", r".norm1.linear_\1."),
    (r"\.adaln_modulation_cross_attn\.(\d)\.", r".norm2.linear_\1."),
    (r"\.adaln_modulation_mlp\.(\d)\.", r".norm3.linear_\1."),
    (r"\.self_attn\.", ".attn1."),
    (r"\.cross_attn\.", ".attn2."),
    (r"\.([qkv])_proj\.", r".to_\1."),
    (r"\.output_proj\.", ".to_out.0."),
    (r"\.([qk])_norm\.", r".norm_\1."),
    (r"\.mlp\.layer1\.", ".ff.net.0.proj."),
    (r"\.mlp\.layer2\.", ".ff.net.2."),
)

# Of the VAE, levels apart (see `diffusers_vae_key`).
DIFFUSERS_VAE = (
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"coder\.conv1\.", "coder.conv_in."),
    (r"\.head\.0\.", ".norm_out."),
    (r"\.head\.2\.", ".conv_out."),
    (r"\.middle\.0\.", ".mid_block.resnets.0."),
    (r"\.middle\.1\.", ".mid_block.attentions.0."),
    (r"\.middle\.2\.", ".mid_block.resnets.1."),
    (r"\.residual\.0\.", ".norm1."),
    (r"\.residual\.2\.", ".conv1."),
    (r"\.residual\.3\.", ".norm2."),
    (r"\.residual\.6\.", ".conv2."),
    (r"\.shortcut\.", ".conv_shortcut."),
)

OFFICIAL_PREFIXES = ("net_ema.", "net.", "")  # training files hold both; the averaged weights are the model
WRAPPERS = ("model", "module", "state_dict")  # of official converters: the weights are one key down
# Keys of official files that are no weights: counters, rotary tables, what TransformerEngine adds.
OFFICIAL_EXTRA = re.compile(r"^(accum_\w+|pos_embedder\.\w+|.*_extra_state)$")

# What a file of Cosmos-Transfer2.5 holds beside the base: its control branch, and what cross-attention to a reference
# image takes (in the base and in the branch; diffusers has the same names).
CONTROL_KEYS = re.compile(r"^control_(blocks|embedder)\.")
IMAGE_KEYS = re.compile(r"(^|\.)(img_context_proj|[qkv]_img|[qk]_img_norm)\.")

# The language tower inside the files of Qwen2.5-VL, from the newest way of saving it to the oldest.
TEXT_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.", "")
TEXT_EXTRA = re.compile(r"^(.*\bvisual\..*|(.*\.)?lm_head\.weight|.*rotary_emb\.inv_freq)$")


def _renamed(name: str, table: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    return name


def diffusers_transformer_key(name: str) -> str:
    """Name in diffusers' CosmosTransformer3DModel of one of our transformer's parameters."""
    return _renamed(name, DIFFUSERS_TRANSFORMER)


def diffusers_control_keys(branch: Iterable[str], base: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Names in diffusers' CosmosControlNetModel: of our control branch's parameters, and of the base's parameters that
    it keeps copies of (patch and time embedding, projections of text and image)."""
    own = {}
    for name in branch:
        inner = re.sub(r"^control_blocks\.", "blocks.", name).replace("control_embedder.", "x_embedder.", 1)
        own[name] = diffusers_transformer_key(inner).replace("transformer_blocks.", "control_blocks.", 1)
    copies = ("x_embedder.", "t_embedder.", "t_embedding_norm.", "crossattn_proj.", "img_context_proj.")
    copied = {name: diffusers_transformer_key(name) for name in base if name.startswith(copies)}
    return own, {name: key.replace("patch_embed.", "patch_embed_base.", 1) for name, key in copied.items()}


def diffusers_vae_key(name: str, config: VAEConfig) -> str:
    """Name in diffusers' AutoencoderKLWan of one of our VAE's parameters."""
    name = _renamed(name, DIFFUSERS_VAE)
    resampler = "resample" in name or "time_conv" in name
    if config.shortcuts:
        name = re.sub(r"(down|up)(samples\.)(\d+)\.\1samples\.(\d+)\.", r"\1_blocks.\3.@\4.", name)
        kind = "downsampler." if "encoder" in name else "upsampler."
        return re.sub(r"@(\d+)\.", kind if resampler else r"resnets.\1.", name)
    name = name.replace("encoder.downsamples.", "encoder.down_blocks.")
    match = re.match(r"decoder\.upsamples\.(\d+)\.(.*)", name)
    if not match:
        return name
    blocks = config.decoder_res_blocks or config.res_blocks + 1
    level, place = divmod(int(match[1]), blocks + 1)
    return f"decoder.up_blocks.{level}.{'upsamplers.0' if resampler else f'resnets.{place}'}.{match[2]}"


def text_key(name: str, prefix: str = "model.language_model.") -> str:
    """Name in a Qwen2.5-VL file of one of our text encoder's parameters (`model.layers.0...`)."""
    return prefix + name.removeprefix("model.")


def official_prefix(keys: Collection[str]) -> str:
    """The prefix of an official file's weights: the averaged ones where there are two sets; "" for none."""
    return next(prefix for prefix in OFFICIAL_PREFIXES if any(key.startswith(prefix) for key in keys))


def text_prefix(keys: Collection[str]) -> str:
    """Where the language tower is in a file of Qwen2.5-VL; "model." if nowhere (the missing keys then say so)."""
    return next((p for p in TEXT_PREFIXES if f"{p}embed_tokens.weight" in keys), "model.")


def vision_prefix(keys: Collection[str]) -> str:
    """Where the vision tower is in a file of SigLIP 2: in a whole model, or by itself."""
    return "vision_model." if any(key.startswith("vision_model.") for key in keys) else ""


def unwrapped(weights: Mapping[str, object]) -> Mapping[str, object]:
    """The table of weights itself, out of the wrapper that a converter put around it."""
    while len(weights) <= 4:
        inner = next((weights[key] for key in WRAPPERS if isinstance(weights.get(key), Mapping)), None)
        if not isinstance(inner, Mapping):
            break
        weights = inner
    return weights


def official_buffers(config: DiTConfig) -> dict[str, Tensor]:
    """Buffers that an official file holds beside the weights, in bfloat16: the rotary tables (section 1.5)."""
    time, rows, _ = axis_sizes(config.head_dim)
    longest = max(n // p for n, p in zip(config.max_size, config.patch, strict=True))
    return {
        "pos_embedder.seq": torch.arange(longest).bfloat16(),
        "pos_embedder.dim_spatial_range": (torch.arange(0, rows, 2) / rows).bfloat16(),
        "pos_embedder.dim_temporal_range": (torch.arange(0, time, 2) / time).bfloat16(),
    }
