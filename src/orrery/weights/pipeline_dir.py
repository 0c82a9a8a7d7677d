"""A diffusers directory of Cosmos2_5_PredictBasePipeline, or of Cosmos2_5_TransferPipeline with its control network:
its config files read as ours, and ours written as its.

Weights are renamed by `layouts`; here are only the JSON files around them. Specification, sections 2.2, 3, 5 and 6; of
Transfer, section 1.5.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from orrery.errors import InputError, note, one_line
from orrery.nn.control import ControlConfig
from orrery.nn.dit import IMAGE_TOKENS, DiTConfig
from orrery.nn.image import ImageConfig
from orrery.nn.text import CHAT_TEMPLATE, TextConfig
from orrery.nn.vae import VAEConfig
from orrery.weights.catalogue import NEGATIVE_PROMPT
from orrery.weights.config import ModelConfig, Sampling
from orrery.weights.official import even_spread

INDEX = "model_index.json"
SIDECAR = "orrery.json"  # beside it, where we wrote the directory: our whole config
PIPELINE, TRANSFER = "Cosmos2_5_PredictBasePipeline", "Cosmos2_5_TransferPipeline"
FOLDERS = {"transformer": "transformer", "vae": "vae", "text": "text_encoder"}
CONTROLNET = "controlnet"
TEXT_CLASSES = ("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLTextModel", "Qwen2_5_VLModel")
TEXT_LENGTH = 512


class _Options(dict[str, Any]):
    """The options of a file; asking for one that is not there is an error of that file."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.path = path

    def __missing__(self, key: str) -> Any:
        raise InputError(f"{self.path} lacks the key {key!r}")


def read_json(path: Path) -> _Options:
    """A JSON object of a file, or an InputError that names it."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"cannot read {path}: it is not JSON ({one_line(error)})") from error
    if not isinstance(values, dict):
        raise InputError(f"cannot read {path}: it holds no table of options")
    return _Options(path, values)


def read_pipeline(folder: Path, text_folder: Path | None = None) -> ModelConfig:
    """The config of a directory that diffusers saved, under diffusers' own conventions (specification, section 6).

    text_folder: where the text encoder's config and tokenizer are, if not in the directory.

    Raises:
        InputError: another pipeline, a missing file, an option that this library has no equal of.
    """
    index = read_json(folder / INDEX)
    kind = index.get("_class_name")
    if kind not in (PIPELINE, TRANSFER):
        raise InputError(f"{folder} holds a {kind}; allowed is {PIPELINE} or {TRANSFER}")
    try:
        return ModelConfig(
            transformer=transformer_config(folder / "transformer" / "config.json"),
            vae=vae_config(folder / "vae" / "config.json"),
            text=text_config(text_folder or folder / "text_encoder", (text_folder or folder / "tokenizer")),
            sampling=_sampling(folder / "scheduler" / "scheduler_config.json", transfer=kind == TRANSFER),
            fps=16.0,
            frames=93,
            resolution=(704, 1280),
            any_length=True,
            vae_dtype="bfloat16",
        )
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{folder}: {one_line(error)}") from error


def transformer_config(path: Path) -> DiTConfig:
    """Of a CosmosTransformer3DModel's config.json."""
    given = read_json(path)
    if given.get("_class_name", "CosmosTransformer3DModel") != "CosmosTransformer3DModel":
        raise InputError(f"{path} is of a {given['_class_name']}; allowed is CosmosTransformer3DModel")
    _no_learnt_positions(given)
    heads, dim = given["num_attention_heads"], given["attention_head_dim"]
    image = given.get("img_context_dim_in") or 0
    for key, needed in (("img_context_dim_out", heads * dim), ("img_context_num_tokens", IMAGE_TOKENS)):
        if image and given.get(key, needed) != needed:
            raise InputError(f"{path}: {key} is {given[key]!r}; it must be {needed}")
    return DiTConfig(
        latent_channels=given["in_channels"] - 1,
        width=heads * dim,
        depth=given["num_layers"],
        heads=heads,
        mlp_ratio=given["mlp_ratio"],
        adaln_rank=given["adaln_lora_dim"],
        patch=tuple(given["patch_size"]),
        text_dim=given["crossattn_proj_in_channels"],
        context_dim=given["encoder_hidden_states_channels"]
        if given["use_crossattn_projection"]
        else given["text_embed_dim"],
        text_projection=given["use_crossattn_projection"],
        max_size=tuple(given["max_size"]),
        rope_ratios=tuple(given["rope_scale"]),
        rope_bf16=False,
        padding_mask=given["concat_padding_mask"],
        image_context=image,
    )


def _no_learnt_positions(given: _Options) -> None:
    if given.get("extra_pos_embed_type") is not None:
        kind = given["extra_pos_embed_type"]
        raise InputError(f"{given.path}: extra_pos_embed_type is {kind!r}: learnt positions are not supported")


def transformer_json(config: DiTConfig, control: ControlConfig | None = None) -> dict[str, Any]:
    """config.json of a CosmosTransformer3DModel with the weights of this network, and with a branch beside it or none.

    Raises:
        InputError: an option that diffusers has no equal of.
    """
    foreign = {"rope_fps_modulation": False, "timestep_scale": 0.001}
    for key, needed in foreign.items():
        if getattr(config, key) != needed:
            raise InputError(f"diffusers knows no transformer with {key} = {getattr(config, key)}; it must be {needed}")
    if not config.adaln_rank:
        raise InputError("diffusers knows no transformer of full-rank modulation (adaln_rank 0)")
    if config.actions:
        raise InputError(
            "diffusers knows no Cosmos-Predict2.5 that is told actions: its CosmosTransformer3DModel has no "
            "action_embedder_B_D and action_embedder_B_3D; write the model as orrery or official"
        )
    more: dict[str, Any] = {"controlnet_block_every_n": control.every} if control else {}
    if config.image_context:
        more |= {"img_context_dim_in": config.image_context, "img_context_num_tokens": IMAGE_TOKENS}
        more["img_context_dim_out"] = config.width
    return more | {
        "_class_name": "CosmosTransformer3DModel",
        "in_channels": config.latent_channels + 1,
        "out_channels": config.latent_channels,
        "num_attention_heads": config.heads,
        "attention_head_dim": config.head_dim,
        "num_layers": config.depth,
        "mlp_ratio": config.mlp_ratio,
        "text_embed_dim": config.context_dim,
        "adaln_lora_dim": config.adaln_rank,
        "max_size": list(config.max_size),
        "patch_size": list(config.patch),
        "rope_scale": list(config.rope_ratios),
        "concat_padding_mask": config.padding_mask,
        "extra_pos_embed_type": None,
        "use_crossattn_projection": config.text_projection,
        "crossattn_proj_in_channels": config.text_dim,
        "encoder_hidden_states_channels": config.context_dim,
    }


def known_control(folder: Path) -> tuple[str | None, int | None]:
    """Of a directory's control network: its kind, where we wrote it, and `every`, where the transformer says it."""
    if (folder / SIDECAR).is_file():
        for kind, control in dict(read_json(folder / SIDECAR).get("controls") or {}).items():
            return kind, control["every"]
    path = folder / "transformer" / "config.json"
    return None, read_json(path).get("controlnet_block_every_n") if path.is_file() else None


def control_config(path: Path, base: DiTConfig, every: int | None = None) -> tuple[ControlConfig, bool]:
    """Of a CosmosControlNetModel's config.json, for a base of this config; and whether it has image context.

    every: base blocks from one of its places to the next; None: its blocks are spread evenly.
    """
    given = read_json(path)
    if given.get("_class_name") != "CosmosControlNetModel":
        raise InputError(f"{path} is of a {given.get('_class_name')}; allowed is CosmosControlNetModel")
    _no_learnt_positions(given)
    blocks, masks = given["n_controlnet_blocks"], base.input_channels - base.latent_channels
    try:
        config = ControlConfig(blocks, every or even_spread(blocks, base), given["in_channels"] - masks)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    return config, bool(given.get("img_context_dim_in"))


def control_json(control: ControlConfig, base: DiTConfig) -> dict[str, Any]:
    """config.json of a CosmosControlNetModel with the weights of this branch.

    Raises:
        InputError: an option that diffusers has no equal of.
    """
    if not base.padding_mask:
        raise InputError("diffusers knows no control network without a padding mask")
    apart = ("in_channels", "out_channels", "num_layers", "concat_padding_mask", "img_context_num_tokens")
    shared = {key: value for key, value in transformer_json(base).items() if key not in apart}
    return shared | {
        "_class_name": "CosmosControlNetModel",
        "n_controlnet_blocks": control.blocks,
        "in_channels": control.channels + base.input_channels - base.latent_channels,
        "latent_channels": base.input_channels,
        "model_channels": base.width,
    }


def vae_config(path: Path) -> VAEConfig:
    """Of an AutoencoderKLWan's config.json."""
    given = read_json(path)
    if given.get("attn_scales"):
        raise InputError(
            f"{path}: attn_scales is {given['attn_scales']}; a VAE with attention in its levels is unknown"
        )
    return VAEConfig(
        base=given["base_dim"],
        decoder_base=given.get("decoder_base_dim"),
        multipliers=given["dim_mult"],
        res_blocks=given["num_res_blocks"],
        temporal_down=given["temperal_downsample"],
        latent_channels=given["z_dim"],
        patch=given.get("patch_size") or 1,
        shortcuts=given.get("is_residual", False),
        latent_mean=given["latents_mean"],
        latent_std=given["latents_std"],
    )


def vae_json(config: VAEConfig) -> dict[str, Any]:
    """config.json of an AutoencoderKLWan with the weights of this VAE.

    Raises:
        InputError: a VAE that is none of Wan's.
    """
    foreign = {"temporal_patch": 1, "factorised": False, "attention": True}
    for key, needed in foreign.items():
        if getattr(config, key) != needed:
            raise InputError(f"diffusers knows no VAE with {key} = {getattr(config, key)}; it must be {needed}")
    if config.decoder_res_blocks not in (None, config.res_blocks + 1):
        raise InputError(f"diffusers knows no VAE with decoder_res_blocks = {config.decoder_res_blocks}")
    patched = config.patch > 1
    return {
        "_class_name": "AutoencoderKLWan",
        "base_dim": config.base,
        "decoder_base_dim": config.decoder_base,
        "z_dim": config.latent_channels,
        "dim_mult": list(config.multipliers),
        "num_res_blocks": config.res_blocks,
        "attn_scales": [],
        "temperal_downsample": list(config.temporal_down),
        "dropout": 0.0,
        "latents_mean": list(config.latent_mean) or [0.0] * config.latent_channels,
        "latents_std": list(config.latent_std) or [1.0] * config.latent_channels,
        "is_residual": config.shortcuts,
        "in_channels": config.pixel_channels,
        "out_channels": config.pixel_channels,
        "patch_size": config.patch if patched else None,
        "scale_factor_temporal": 2 ** sum(config.temporal_down),
        "scale_factor_spatial": config.patch * 2 ** len(config.temporal_down),
    }


def text_config(folder: Path, tokenizer: Path) -> TextConfig:
    """Of the config.json of a Qwen2.5-VL (or its language tower) that transformers saved, and its tokenizer."""
    from transformers import AutoConfig

    read_json(folder / "config.json")
    try:
        config: Any = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"cannot read {folder / 'config.json'}: {one_line(error)}") from error
    config = getattr(config, "text_config", None) or config
    if not str(config.model_type).startswith("qwen2_5_vl"):
        raise InputError(f"{folder} holds a text encoder of kind {config.model_type!r}; allowed is qwen2_5_vl")
    rope = config.rope_parameters
    half = config.hidden_size // config.num_attention_heads // 2
    return TextConfig(
        kind="qwen2_5_vl",
        hidden_size=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        mlp=config.intermediate_size,
        vocab_size=config.vocab_size,
        length=TEXT_LENGTH,
        template=CHAT_TEMPLATE,
        pad_token=_pad_token(tokenizer),
        rope_theta=rope["rope_theta"],
        mrope_section=tuple(rope.get("mrope_section") or (half - 2 * (half // 3), half // 3, half // 3)),
        norm_eps=config.rms_norm_eps,
    )


def text_json(config: TextConfig) -> dict[str, Any]:
    """config.json of a Qwen2_5_VLTextModel with the weights of this encoder."""
    if config.kind != "qwen2_5_vl":
        raise InputError(f"diffusers' pipeline takes a text encoder of kind qwen2_5_vl; this one is {config.kind}")
    return {
        "architectures": ["Qwen2_5_VLTextModel"],
        "model_type": "qwen2_5_vl_text",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
        "max_position_embeddings": 128000,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": config.rope_theta,
            "mrope_section": list(config.mrope_section),
        },
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def image_config(folder: Path, width: int) -> ImageConfig:
    """Of the config.json of a SigLIP 2 (or its vision tower) that transformers saved.

    width: of its tokens, as the transformer takes them.
    """
    from transformers import AutoConfig

    read_json(folder / "config.json")
    try:
        config: Any = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"cannot read {folder / 'config.json'}: {one_line(error)}") from error
    config = getattr(config, "vision_config", None) or config
    if config.model_type != "siglip2_vision_model":
        raise InputError(f"{folder} holds an image encoder of kind {config.model_type!r}; allowed is siglip2")
    if config.hidden_size != width:
        raise InputError(f"the transformer takes image tokens of width {width}, {folder} gives {config.hidden_size}")
    return ImageConfig(
        width=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        mlp=config.intermediate_size,
        patch=config.patch_size,
        tokens=config.num_patches,
        norm_eps=config.layer_norm_eps,
    )


def _pad_token(tokenizer: Path) -> str:
    path = tokenizer / "tokenizer_config.json"
    pad = read_json(path).get("pad_token") if path.is_file() else None
    pad = pad.get("content") if isinstance(pad, dict) else pad
    return pad or "<|endoftext|>"


def _sampling(path: Path, transfer: bool) -> Sampling:
    """Of the scheduler's config.json; the rest are the pipeline's own defaults."""
    given = read_json(path)
    kind = given.get("_class_name", "UniPCMultistepScheduler")
    if kind != "UniPCMultistepScheduler":
        note(f"{path} is of a {kind}: sampled with UniPC all the same, as the published models are")
    karras = bool(given.get("use_karras_sigmas"))
    expected = {"sigma_max": 200.0, "sigma_min": 0.01}
    if karras and any(given.get(key) not in (None, value) for key, value in expected.items()):
        raise InputError(
            f"{path}: sigma_max and sigma_min are {given.get('sigma_max')} and {given.get('sigma_min')}; "
            "known are 200 and 0.01"
        )
    defaults = Sampling(guidance=3.0, steps=35 if karras else 36) if transfer else Sampling()
    return replace(
        defaults,
        schedule="karras" if karras else "shift",
        shift=float(given.get("flow_shift") or 5.0),
        exact_times=True,
        conditional_timestep=0.1,
        negative_prompt=NEGATIVE_PROMPT,
    )


def scheduler_json(sampling: Sampling) -> dict[str, Any]:
    """scheduler_config.json: UniPC as the published pipelines have it."""
    karras = sampling.schedule == "karras"
    if sampling.schedule == "distilled":
        note(
            "diffusers has no sampler for the distilled model: the directory gets UniPC's, which will not do it justice"
        )
    return {
        "_class_name": "UniPCMultistepScheduler",
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": sampling.shift,
        "use_karras_sigmas": karras,
        "sigma_max": 200.0 if karras else None,
        "sigma_min": 0.01 if karras else None,
        "solver_order": 2,
        "solver_type": "bh2",
        "predict_x0": True,
        "lower_order_final": True,
        "final_sigmas_type": "zero",
        "timestep_spacing": "linspace",
    }


def model_index(parts: list[str]) -> dict[str, Any]:
    """model_index.json of a directory that holds these parts ("transformer", "vae", "text", "controlnet")."""
    from importlib.metadata import version

    kinds = {
        "transformer": {"transformer": ["diffusers", "CosmosTransformer3DModel"]},
        "vae": {"vae": ["diffusers", "AutoencoderKLWan"]},
        "text": {
            "text_encoder": ["transformers", "Qwen2_5_VLTextModel"],
            "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        },
        CONTROLNET: {CONTROLNET: ["diffusers", "CosmosControlNetModel"]},
    }
    pipeline = TRANSFER if CONTROLNET in parts else PIPELINE
    index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": "0.36.0", "safety_checker": [None, None]}
    for part in parts:
        index |= kinds[part]
    return index | {"scheduler": ["diffusers", "UniPCMultistepScheduler"], "_orrery_version": version("orrery")}
