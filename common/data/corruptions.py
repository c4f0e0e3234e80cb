"""Image corruptions for robustness tests: noise and shifts, the same for every encoder."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# kind of corruption: the unit of its severity, and its severities
CORRUPTIONS = {
    "noise": ("standard deviation, images in [0,1]", (0.05, 0.1, 0.2, 0.4)),
    "shift": ("pixels, in one of four directions", (1, 2, 4, 8)),
}


def all_corrupted(split) -> dict[str, Any]:
    """The split under each corruption, by names such as noise_0.1; uncorrupted as robust_clean."""
    return {"robust_clean": split} | {
        f"{kind}_{severity:g}": corrupted(split, kind, severity)
        for kind, (_, severities) in CORRUPTIONS.items()
        for severity in severities
    }


def corrupted(split, kind: str, severity: float):
    """The split with noisy or shifted images, float32 (B,C,S,S) in [0,1].

    The random draws depend on the position of a block only, so every encoder gets the same images
    if all use the same block size.
    """

    def change(images: Tensor, positions: slice) -> Tensor:
        generator = torch.Generator().manual_seed(positions.start or 0)
        if kind == "noise":
            return noisy(images / 255, severity, generator)
        return shifted(images / 255, int(severity), generator)

    return replace(split, change=change)


def noisy(images: Tensor, std: float, generator: torch.Generator) -> Tensor:
    """Images (B,C,S,S) in [0,1] plus i.i.d. Gaussian noise, clipped to [0,1]."""
    noise = torch.randn(images.shape, generator=generator).to(images.device)
    return (images + std * noise).clamp(0, 1)


def shifted(images: Tensor, pixels: int, generator: torch.Generator) -> Tensor:
    """Images (B,C,S,S) shifted by whole pixels in a random one of four directions, with the border
    pixels replicated.
    """
    padded = F.pad(images, (pixels,) * 4, mode="replicate")
    side, end = images.shape[-1], 2 * pixels
    corners = ((0, pixels), (end, pixels), (pixels, 0), (pixels, end))
    crops = torch.stack([padded[..., y : y + side, x : x + side] for y, x in corners])
    chosen = torch.randint(0, 4, (len(images),), generator=generator).to(images.device)
    return crops[chosen, torch.arange(len(images), device=images.device)]  # (B,C,S,S)
