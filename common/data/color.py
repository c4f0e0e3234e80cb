"""Color jitter of whole batches: brightness, contrast, saturation and hue, per image.

Parameters are on the images' device. The operations equal torchvision's
(`torchvision.transforms.v2.functional`, tensors).
"""

import torch
from torch import Tensor

from .philox import Random

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


def draw_jitter(
    random: Random, strength: tuple[float, float, float, float]
) -> tuple[Tensor, Tensor]:
    """Draw factors (B,4) float32 and the order (B,4) int64 of the four color operations.

    As in torchvision's ColorJitter: brightness, contrast and saturation uniform in
    [max(0, 1 - s), 1 + s], hue shift in [-s, s]; each image has its own permutation.
    """
    *around_one, around_zero = random.uniform(4, -1, 1).unbind(1)
    *strengths, hue = strength
    factors = [  # the middle of the range, and its half width
        (max(0, 1 - s) + 1 + s) / 2 + (1 + s - max(0, 1 - s)) / 2 * number
        for s, number in zip(strengths, around_one, strict=True)
    ]
    order = random.uniform(4).argsort(dim=1)
    return torch.stack([*factors, hue * around_zero], dim=1), order


def blend_(images: Tensor, factors: Tensor, operations: Tensor) -> Tensor:
    """Adjust brightness, contrast or saturation in place: clamp(f x + (1 - f) y).

    y is black, the mean luminance or the luminance. images (B,C,H,W) in [0,1]; factors f (B,) >= 0;
    operations (B,) BRIGHTNESS, CONTRAST or SATURATION for each image, so that one pass does all
    three. Saturation leaves images with 1 channel unchanged.
    """
    factors, operations = factors[:, None, None], operations[:, None, None]
    luminance = rgb_to_grayscale(images)[:, 0]  # (B,H,W)
    mean = luminance.mean(dim=(1, 2), keepdim=True)
    luminance = luminance * ((1 - factors) * (operations == SATURATION))
    luminance.add_((1 - factors) * (operations == CONTRAST) * mean)
    return images.mul_(factors.unsqueeze(1)).add_(luminance.unsqueeze(1)).clamp_(0, 1)


def rgb_to_grayscale(images: Tensor) -> Tensor:
    """Luminance (ITU-R 601) of images (B,3,H,W), in 3 channels (a view); 1 channel is returned."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(1)
    luminance = red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)
    return luminance.unsqueeze(1).expand_as(images)


def adjust_hue_(images: Tensor, hue_shift: Tensor) -> Tensor:
    """Shift the hue of images (B,3,H,W) in [0,1] by hue_shift (B,) in [-0.5,0.5], in place.

    Equals the shift in HSV, without the conversion. With chroma d = max - min, the hue h in
    (-1/2,1/2], 0 at red, has |h| = (max - 2 min - r + g + b) / 6d and the sign of g - b, and back
    r = min + d clamp(2 - |6h|), g = min + d clamp(|6h + 1| - 1), b = min + d clamp(|6h - 1| - 1),
    clamped to [0,1]. Gray pixels (d = 0) and images with 1 channel stay unchanged.
    """
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(1)  # (B,H,W)
    largest = torch.maximum(red, green).maximum(blue)
    smallest = torch.minimum(red, green).minimum(blue)
    chroma = largest - smallest
    chroma6 = 6 * chroma
    hue = torch.sub(largest, smallest, alpha=2).sub_(red).add_(green).add_(blue)
    hue.div_(chroma6.clamp(min=1e-12)).copysign_(green - blue)
    hue.add_(hue_shift[:, None, None])
    hue.sub_(hue.round())  # in [-1/2,1/2]
    # chroma6 * clamp(.., 1/6, 1/3) is d * clamp(.., 1, 2); its 1 goes into the first term
    low, high = smallest - chroma, largest + chroma
    red.copy_(high).addcmul_(chroma6, hue.abs().clamp_(1 / 6, 1 / 3), value=-1)
    green.copy_(low).addcmul_(chroma6, (hue + 1 / 6).abs_().clamp_(1 / 6, 1 / 3))
    blue.copy_(low).addcmul_(chroma6, hue.sub_(1 / 6).abs_().clamp_(1 / 6, 1 / 3))
    return images.clamp_(0, 1)  # rounding exceeds [0,1] by 1e-7


def color_jitter_(images: Tensor, jitters: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Jitter the images where `jitters` is True, in each image's own order, in place.

    images (B,C,H,W) in [0,1]; jitters (B,) bool, factors (B,4) float32, order (B,4) int64.
    """
    if images.device.type != "cpu" or torch.compiler.is_compiling():
        return _jitter_all_(images, jitters, factors, order)
    # Hue, the most expensive operation, runs once for all images. They are sorted by the position
    # of hue in their order: the first `end` images have their k-th other operation before hue, the
    # rest have it after.
    hue_step = (order == HUE).int().argmax(dim=1)
    rows = hue_step.argsort(descending=True)
    rows = rows[jitters[rows]]
    ends = [int((hue_step[rows] > step).sum()) for step in range(3)]
    others = order[rows][order[rows] != HUE].view(-1, 3)  # (n,3)
    hue_shift, factors = factors[rows, HUE], factors[rows].gather(1, others)
    chosen = images.index_select(0, rows)
    for step, end in enumerate(ends):  # blend before hue, then after it
        blend_(chosen[:end], factors[:end, step], others[:end, step])
    adjust_hue_(chosen, hue_shift)
    for step, end in enumerate(ends):
        blend_(chosen[end:], factors[end:, step], others[end:, step])
    return images.index_copy_(0, rows, chosen)


def _jitter_all_(images: Tensor, jitters: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """The same without a shape that depends on values, for which a GPU would have to wait.

    Each image gets its three blends both before and after the hue; a factor of 1 changes nothing.
    """
    is_hue = order == HUE
    positions = is_hue.int().argsort(dim=1, stable=True)[:, :3]  # of the other operations
    is_before = positions < is_hue.int().argmax(dim=1, keepdim=True)  # (B,3)
    others = order.gather(1, positions)
    other_factors = torch.where(jitters[:, None], factors.gather(1, others), 1)
    for step in range(3):
        blend_(images, torch.where(is_before, other_factors, 1)[:, step], others[:, step])
    adjust_hue_(images, factors[:, HUE] * jitters)
    for step in range(3):
        blend_(images, torch.where(is_before, 1, other_factors)[:, step], others[:, step])
    return images
