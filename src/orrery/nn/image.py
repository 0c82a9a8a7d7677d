"""Image encoder: a reference image as the tokens that the cross-attention of Cosmos-Transfer2.5 sees beside the text.

The published models use the vision tower of SigLIP 2 (so400m, patch 16, "naflex"): the image is resized, its aspect
nearly kept, to at most 256 patches; what is missing to 256 is filled with zeros, hidden from the tower's attention but
handed on all the same. The last hidden states after the final norm are the tokens; the pooling head is left out.
Specification of Transfer, section 1.6.

The tower comes from `transformers`, which is imported only when an encoder is built. Its image processor needs
torchvision, so resizing and cutting into patches are done here; tests compare both with it.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ImageConfig:
    """Shape of a SigLIP 2 vision tower; the defaults are so400m's. tokens: as many as the tower has positions, a square
    number. width: of a token."""

    width: int = 1152
    layers: int = 27
    heads: int = 16
    mlp: int = 4304
    patch: int = 16
    tokens: int = 256
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("width", "layers", "heads", "mlp", "patch", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"image {name} must be at least 1, got {getattr(self, name)}")
        if self.width % self.heads:
            raise ValueError(f"image width {self.width} must divide into {self.heads} heads")
        if round(self.tokens**0.5) ** 2 != self.tokens:
            raise ValueError(f"image tokens must be a square number, got {self.tokens}")


class ImageEncoder(nn.Module):
    """An image uint8 [H, W, 3] -> tokens [1, `tokens`, `width`], in the dtype and on the device of the weights.

    `.model` is the Siglip2VisionModel of transformers without its head, with fresh weights; the state dict holds its
    parameters and nothing else.

    >>> encoder = ImageEncoder(ImageConfig())
    >>> Conditions(text, image=encoder.encode(frames[0]))
    """

    def __init__(self, config: ImageConfig):
        super().__init__()
        from transformers import Siglip2VisionConfig, Siglip2VisionModel

        self.config = config
        options: dict[str, Any] = {
            "hidden_size": config.width,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            "intermediate_size": config.mlp,
            "patch_size": config.patch,
            "num_patches": config.tokens,
            "layer_norm_eps": config.norm_eps,
            "vision_use_head": False,
            "attn_implementation": "sdpa",
        }
        self.model: Any = Siglip2VisionModel(Siglip2VisionConfig(**options))

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens [1, `tokens`, `width`] of patches [`tokens`, 3 * patch^2], of which the first rows * columns of `grid`
        are the image's."""
        weight = self.model.embeddings.patch_embedding.weight
        real = torch.arange(self.config.tokens, device=weight.device) < grid[0] * grid[1]
        output = self.model(
            pixel_values=patches[None].to(weight),
            pixel_attention_mask=real[None].long(),
            spatial_shapes=torch.tensor([grid], device=weight.device),
        )
        return output.last_hidden_state

    @torch.no_grad()
    def encode(self, image: np.ndarray | Tensor) -> Tensor:
        """Tokens [1, `tokens`, `width`] of an image, uint8 [H, W, 3].

        The official code resizes the reference image to the size of the video before (Lanczos, its aspect not kept);
        that is the caller's. ValueError for another dtype or shape.
        """
        return self(*image_patches(image, self.config.patch, self.config.tokens))


def image_patches(image: np.ndarray | Tensor, patch: int, most: int) -> tuple[Tensor, tuple[int, int]]:
    """An image, uint8 [H, W, 3], as fp32 patches [most, 3 * patch^2] in [-1, 1], row by row, each flattened in the
    order (row, column, channel), zeros after the last; and how many rows and columns of them are the image's."""
    image = torch.from_numpy(np.array(image)) if isinstance(image, np.ndarray) else image  # any strides, read-only too
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != torch.uint8 or not image.numel():
        raise ValueError(f"an image must be uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
    rows, columns = patch_grid(image.shape[0], image.shape[1], most)
    pixels = image.permute(2, 0, 1)[None].cpu()  # resized in whole numbers, as the published processor does
    size = (rows * patch, columns * patch)
    pixels = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False, antialias=True)[0]
    scaled = pixels.float() / 127.5 - 1
    cut = scaled.unflatten(2, (columns, patch)).unflatten(1, (rows, patch))  # [3, rows, patch, columns, patch]
    patches = cut.permute(1, 3, 2, 4, 0).reshape(rows * columns, -1)
    return F.pad(patches, (0, 0, 0, most - rows * columns)), (rows, columns)


def patch_grid(height: int, width: int, most: int) -> tuple[int, int]:
    """Rows and columns of patches of the size that an image is resized to: the largest with at most `most` in all, both
    sides scaled by the same factor and rounded up to whole patches."""
    # The size changes where a side passes a whole number of patches, at the scales k / height and k / width.
    scaled = [(k, -(-width * k // height)) for k in range(1, most + 1)]
    scaled += [(-(-height * k // width), k) for k in range(1, most + 1)]
    return max((grid for grid in scaled if grid[0] * grid[1] <= most), key=lambda grid: grid[0] * grid[1])
