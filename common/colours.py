"""What of its colours may change without changing the label?   brightness to hue, in batches

The parameters of each image are drawn on the CPU, the operations run on the images' device and
equal torchvision's (`torchvision.transforms.v2.functional`, tensors).
"""

import torch
from torch import Generator, Tensor

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


def draw_jitter(
    batch_size: int, strength: tuple[float, float, float, float], generator: Generator
) -> tuple[Tensor, Tensor]:
    """Draw factors (B,4) float32 and the order (B,4) int64 of the four colour operations.

    As in torchvision's ColorJitter: brightness, contrast and saturation uniform in
    [max(0, 1 - s), 1 + s], hue in [-s, s] turns; every image has a permutation of its own.
    """
    strengths, neutral = torch.tensor(strength), torch.tensor([1.0, 1.0, 1.0, 0.0])
    low, high = neutral - strengths, neutral + strengths
    low[:HUE].clamp_(min=0)
    factors = low + (high - low) * torch.rand((batch_size, 4), generator=generator)
    return factors, torch.rand((batch_size, 4), generator=generator).argsort(dim=1)


def blend_(images: Tensor, factors: Tensor, operations: Tensor) -> Tensor:
    """In place: clamp(f x + (1 - f) y), y by operation: black, the mean luminance, the luminance.

    images (B,C,H,W) in [0,1]; factors (B,) >= 0; operations (B,) BRIGHTNESS, CONTRAST or SATURATION
    for each image, so that one pass does all three. Saturation leaves 1 channel as it is.
    """
    factors, operations = (on_device_of(images, t)[:, None, None] for t in (factors, operations))
    luminance = rgb_to_grayscale(images)[:, 0]  # (B,H,W)
    mean = luminance.mean(dim=(1, 2), keepdim=True)
    luminance = luminance * ((1 - factors) * (operations == SATURATION))
    luminance.add_((1 - factors) * (operations == CONTRAST) * mean)
    return images.mul_(factors.unsqueeze(1)).add_(luminance.unsqueeze(1)).clamp_(0, 1)


def rgb_to_grayscale(images: Tensor) -> Tensor:
    """Luminance (ITU-R 601) in all 3 channels of images (B,3,H,W), a read-only view; 1 stays 1."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(1)
    luminance = red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)
    return luminance.unsqueeze(1).expand_as(images)


def adjust_hue_(images: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue of images (B,3,H,W) in [0,1] by turns (B,) in [-0.5,0.5] of the colour circle.

    In place. HSV's turn without HSV. With d = max - min, the hue t in (-1/2,1/2] turns from red is
    |t| = (max - 2 min - r + g + b) / 6d, its sign that of g - b, and back again
    r = min + d clamp(2 - |6t|), g = min + d clamp(|6t + 1| - 1), b = min + d clamp(|6t - 1| - 1),
    clamped to [0,1]. Grey pixels (d = 0) and images with 1 channel stay what they are.
    """
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(1)  # (B,H,W)
    largest = torch.maximum(red, green).maximum(blue)
    smallest = torch.minimum(red, green).minimum(blue)
    spread = largest - smallest
    circle = 6 * spread
    hue = torch.sub(largest, smallest, alpha=2).sub_(red).add_(green).add_(blue)
    hue.div_(circle.clamp(min=1e-12)).copysign_(green - blue)
    hue.add_(on_device_of(images, turns)[:, None, None])
    hue.sub_(hue.round())  # in [-1/2,1/2]
    # circle * clamp(.., 1/6, 1/3) is d * clamp(.., 1, 2), so that the 1 goes into the first term
    low, high = smallest - spread, largest + spread
    torch.addcmul(high, circle, hue.abs().clamp_(1 / 6, 1 / 3), value=-1, out=red)
    torch.addcmul(low, circle, (hue + 1 / 6).abs_().clamp_(1 / 6, 1 / 3), out=green)
    torch.addcmul(low, circle, hue.sub_(1 / 6).abs_().clamp_(1 / 6, 1 / 3), out=blue)
    return images.clamp_(0, 1)  # rounding leaves [0,1] by 1e-7


def color_jitter_(images: Tensor, jitters: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """In place: brightness, contrast, saturation, hue in each image's order, where jitters is True.

    images (B,C,H,W) in [0,1]; jitters (B,) bool, factors (B,4) float32, order (B,4) int64, on the
    CPU: their values decide which rows go where, and the device is not made to wait for it.
    """
    # Hue, the costly one, is done once for all. Sorted by the step at which it comes, the images
    # that have a k-th operation before it are the first ones, those that have it after it the rest.
    hue_step = (order == HUE).int().argmax(dim=1)
    rows = hue_step.argsort(descending=True)
    rows = rows[jitters[rows]]
    ends = [int((hue_step[rows] > step).sum()) for step in range(3)]
    others = order[rows][order[rows] != HUE].view(-1, 3)  # (n,3), in their order
    turns, factors = factors[rows, HUE], factors[rows].gather(1, others)
    rows, turns, factors, others = (on_device_of(images, t) for t in (rows, turns, factors, others))
    chosen = images.index_select(0, rows)
    for step, end in enumerate(ends):  # blend before hue, then after it
        blend_(chosen[:end], factors[:end, step], others[:end, step])
    adjust_hue_(chosen, turns)
    for step, end in enumerate(ends):
        blend_(chosen[end:], factors[end:, step], others[end:, step])
    return images.index_copy_(0, rows, chosen)


def on_device_of(images: Tensor, tensor: Tensor) -> Tensor:
    """A small tensor, put where the images are."""
    # not blocking: otherwise each of these copies would wait for all the device's work
    return tensor.to(images.device, non_blocking=True)
