"""Text conditioning of a UNet as one tensor per caption.

SD 1.x and 2.x take the text encoder's output [tokens, width]. XL also takes a pooled embedding of the caption. It is
stored as one more row, padded with zeros to the width, so that caching and batching work for both.
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
    """The inverse of pack(): tokens [N, tokens, width], pooled [N, pooled_width]."""
    return text[:, :-1], text[:, -1, :pooled_width]


def time_ids(noisy: Tensor, pixels: int) -> Tensor:
    """SDXL's time ids [B, 6] for latents [B, 4, h, w]: original size, crop and target size in pixels.

    Podell et al. 2023, section 2.2: (height, width, top, left, height, width), without cropping or resizing, as the
    pipeline sets them. pixels: pixels per latent.
    """
    ids = noisy.new_zeros(len(noisy), 6)
    ids[:, 0::4] = noisy.shape[2] * pixels  # slices: an index tensor would synchronize the device
    ids[:, 1::4] = noisy.shape[3] * pixels
    return ids
