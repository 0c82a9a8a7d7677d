"""Tiny networks of the real classes, random, saved as the published ones are: folders for `from_pretrained`."""

import json
from pathlib import Path

import torch
from transformers import (
    BertConfig,
    BertTokenizer,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    Sam2VideoConfig,
    Sam2VideoModel,
    SwinConfig,
)

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?", "red", "square", "blue", "ball", "table", "a"]
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def save_depth(folder: Path, kind: str = "relative") -> Path:
    """A Depth Anything with two layers; pictures are resized as for the published one, to a smaller size."""
    torch.manual_seed(0)
    backbone = Dinov2Config(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, image_size=56, patch_size=14,
        reshape_hidden_states=False, out_features=["stage1", "stage2", "stage3", "stage4"], apply_layernorm=True,
    )  # fmt: skip
    config = DepthAnythingConfig(
        backbone_config=backbone, patch_size=14, reassemble_hidden_size=16, neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8, head_hidden_size=4, depth_estimation_type=kind, max_depth=20 if kind == "metric" else 1,
    )  # fmt: skip
    network = DepthAnythingForDepthEstimation(config)
    for parameter in network.parameters():  # as it starts, the head is flat
        torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.constant_(network.head.conv3.bias, 4.0)  # above the last ReLU's zero nearly everywhere
    network.save_pretrained(folder)
    _write(
        folder, image_processor_type="DPTImageProcessor", size={"height": 56, "width": 56}, keep_aspect_ratio=True,
        ensure_multiple_of=14, resample=3, do_resize=True, do_rescale=True, do_normalize=True, rescale_factor=1 / 255,
        **IMAGENET,
    )  # fmt: skip
    return folder


def save_detector(folder: Path) -> Path:
    """A Grounding DINO of one layer and eight queries."""
    torch.manual_seed(1)
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(
            image_size=32, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
            out_features=["stage2", "stage3", "stage4"],
        ),
        text_config=BertConfig(
            vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
        ),
        d_model=32, num_queries=8, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_text_len=16, disable_custom_kernels=True,
    )  # fmt: skip
    GroundingDinoForObjectDetection(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)}).save_pretrained(folder)
    _write(
        folder, image_processor_type="GroundingDinoImageProcessor", size={"shortest_edge": 96, "longest_edge": 160},
        do_resize=True, do_rescale=True, do_normalize=True, do_pad=True, resample=2, rescale_factor=1 / 255, **IMAGENET,
    )  # fmt: skip
    return folder


def save_tracker(folder: Path) -> Path:
    """A SAM 2 of 64-pixel pictures."""
    torch.manual_seed(2)
    size, width = 64, 128
    config = Sam2VideoConfig(
        vision_config={
            "model_type": "sam2_vision_model",
            "backbone_config": {
                "model_type": "sam2_hiera_det_model", "hidden_size": 8, "image_size": [size, size],
                "blocks_per_stage": [1, 1, 2, 1], "embed_dim_per_stage": [8, 16, 32, 64],
                "global_attention_blocks": [3], "num_attention_heads_per_stage": [1, 1, 2, 2],
                "window_size_per_stage": [4, 4, 4, 4],
            },
            "backbone_channel_list": [64, 32, 16, 8], "fpn_hidden_size": width,
            "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        },
        prompt_encoder_config={"hidden_size": width, "image_size": size, "patch_size": 16},
        mask_decoder_config={
            "hidden_size": width, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16,
            "num_hidden_layers": 1,
        },
        image_size=size, memory_attention_hidden_size=width, memory_attention_num_layers=1,
        memory_attention_feed_forward_hidden_size=32, memory_attention_rope_feat_sizes=[4, 4],
        memory_encoder_hidden_size=width, memory_encoder_output_channels=64, mask_downsampler_embed_dim=width,
        memory_fuser_embed_dim=width, memory_fuser_intermediate_dim=32, memory_fuser_num_layers=1, num_maskmem=3,
        max_object_pointers_in_encoder=4,
    )  # fmt: skip
    network = Sam2VideoModel(config)
    for name, parameter in network.named_parameters():
        if "memory" in name or "pointer" in name:  # so that what was remembered shows in the masks
            torch.nn.init.normal_(parameter, std=0.5)
    torch.nn.init.constant_(network.mask_decoder.pred_obj_score_head.proj_out.bias, 10.0)  # nothing is ever hidden
    network.save_pretrained(folder)
    return folder


def _write(folder: Path, **settings: object) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
