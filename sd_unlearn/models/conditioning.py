"""What tells a UNet what to draw, as one tensor a caption.

SD 1.x and 2.x: the text encoder's output [tokens, width]. XL also takes a pooled embedding of the caption: it rides
along as one more row, padded with zeros to the width, so that all that caches, batches and stacks captions serves both.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def pack(tokens: Tensor, pooled: Tensor) -> Tensor:
    """tokens [N, tokens, width], pooled [N, pooled width <= width] -> [N, tokens + 1, width]."""
    row = pad(pooled, (0, tokens.shape[-1] - pooled.shape[-1]))
    return torch.cat([tokens, row[:, None]], dim=1)


def unpack(text: Tensor, pooled_width: int) -> tuple[Tensor, Tensor]:
    """What pack() was given: tokens [N, tokens, width], pooled [N, pooled_width]."""
    return text[:, :-1], text[:, -1, :pooled_width]


def time_ids(noisy: Tensor, pixels: int) -> Tensor:
    """[B, 6] of latents [B, 4, h, w] of so many pixels a side: original size, crop and wanted size, as rendering says.

    Podell et al. 2023, section 2.2: (height, width, top, left, height, width) in pixels. Nothing is cropped away and
    no image was ever smaller: that is what is asked of the model when pictures are drawn.
    """
    ids = noisy.new_zeros(len(noisy), 6)
    ids[:, 0::4] = noisy.shape[2] * pixels  # slices, because an index tensor would make the device wait
    ids[:, 1::4] = noisy.shape[3] * pixels
    return ids
