"""How do images look that were disturbed?   noise and shifts of a split, always the same ones"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

# what is done: what its strength is, and which are tried
DISTURBANCES = {
    "noise": ("its deviation, images in [0,1]", (0.05, 0.1, 0.2, 0.4)),
    "shift": ("pixels, in one of four directions", (1, 2, 4, 8)),
}


def disturbed(split, kind: str, strength: float):
    """The split with images that are noisy or shifted, float32 (B,C,S,S) in [0,1].

    The draws depend on the position of a block only, so every encoder sees the same images as long
    as all read in equal blocks.
    """

    def change(images: Tensor, positions: slice) -> Tensor:
        generator = torch.Generator().manual_seed(positions.start or 0)
        if kind == "noise":
            return noisy(images / 255, strength, generator)
        return shifted(images / 255, int(strength), generator)

    return replace(split, change=change)


def noisy(images: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    """Images (B,C,S,S) in [0,1] plus Gaussian noise, each value its own, clipped to [0,1]."""
    noise = torch.randn(images.shape, generator=generator).to(images.device)
    return (images + deviation * noise).clamp(0, 1)


def shifted(images: Tensor, pixels: int, generator: torch.Generator) -> Tensor:
    """Images (B,C,S,S) moved by whole pixels, each in one of four directions drawn for it; what
    comes in at the border repeats the pixel there.
    """
    padded = F.pad(images, (pixels,) * 4, mode="replicate")
    side, end = images.shape[-1], 2 * pixels
    corners = ((0, pixels), (end, pixels), (pixels, 0), (pixels, end))
    crops = torch.stack([padded[..., y : y + side, x : x + side] for y, x in corners])
    chosen = torch.randint(0, 4, (len(images),), generator=generator).to(images.device)
    return crops[chosen, torch.arange(len(images), device=images.device)]  # (B,C,S,S)
