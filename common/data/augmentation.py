"""Random augmentation of whole batches: crops, flips, rotations, cutout, color jitter.

    images = augmentation.augment(images, Random(numbers, seed, epoch), "contrastive", flip)

takes uint8 or float images and returns floats in [0,1]. `draw` makes the parameters of a view from
random numbers, `apply` is a pure function of images and these; both work on the images' device. The
single operations take one parameter per image and equal torchvision's functional ones
(`torchvision.transforms.v2.functional`, tensors).
"""

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .color import color_jitter_, draw_jitter, rgb_to_grayscale
from .philox import Random

Kind = Literal["none", "crop_flip", "cutout", "affine", "contrastive"]
Range = tuple[float, float]


@dataclass(frozen=True)
class Draw:
    """The random parameters of one view of B images; None: no such operation."""

    offsets: Tensor | None = None  # (B,2) int64: top, left in the padded image
    padding: int = 0  # in pixels
    reflect: bool = False  # padding mode: reflect, or zeros
    centers: Tensor | None = None  # (B,2) int64: row, column of the cutout's center
    cutout_size: int = 0  # its side, in pixels
    fill: float = 0.0  # its value
    boxes: Tensor | None = None  # (B,4) float32: top, left, height, width in pixels
    angles: Tensor | None = None  # (B,) float32: degrees, clockwise
    shifts: Tensor | None = None  # (B,2) float32: pixels to the right, down
    flips: Tensor | None = None  # (B,) bool
    jitters: Tensor | None = None  # (B,) bool: which images are jittered
    factors: Tensor | None = None  # (B,4) float32: brightness, contrast, saturation, hue
    order: Tensor | None = None  # (B,4) int64: the operation at each position
    grayscale: Tensor | None = None  # (B,) bool


def augment(images: Tensor, random: Random, kind: Kind, flip: bool) -> Tensor:
    """One random view of square images (B,C,S,S), C 1 or 3, as `draw` says; float32 in [0,1]."""
    return apply(images, draw(kind, random, images.shape[-1], flip, images.shape[1] == 3))


def draw(kind: Kind, random: Random, image_size: int, flip: bool, color: bool) -> Draw:
    """Draw one view of square images from their random numbers.

    "none" changes nothing. "crop_flip" is a random crop after padding, RGB images by 1/8 of their
    side (4 px of 32, reflected), grayscale images by 1/16 (2 px, zeros). "cutout" also fills a
    square of 3/8 of the side (12 px of 32) with gray or, in grayscale images, black (DeVries &
    Taylor 2017; their 16 px are for ten times as many epochs). "affine" scales about the center, up
    as often as down (0.7 to 1/0.7 of the area, aspect ratio up to 5:4), rotates by up to 15 degrees
    and translates by up to 1/16, filled with 0. "contrastive" treats RGB images as SimCLR and
    SupCon do (Chen et al. 2020; Khosla et al. 2020); grayscale images get a milder crop (a digit
    that fills its image keeps nine tenths of its ink), rotation and translation as above.
    `flip` mirrors each image in every other epoch, a random half of them in the first (Jordan
    2024), further views at random, with any kind but "none"; False where it changes the label, as
    with digits and letters.
    `color` says that images have 3 channels.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"unknown kind of augmentation {kind!r}")
    if kind == "none":
        return Draw()
    drawn = Draw(flips=random.bits() if flip else None)
    shift = max(1, image_size // 16)
    if kind in ("crop_flip", "cutout"):
        padding = 2 * shift if color else shift
        offsets = random.uniform(2, 0, 2 * padding + 1).long()
        drawn = replace(drawn, offsets=offsets, padding=padding, reflect=color)
        if kind == "crop_flip":
            return drawn
        centers = random.uniform(2, 0, image_size).long()
        size, fill = max(1, 3 * image_size // 8), 0.5 if color else 0.0
        return replace(drawn, centers=centers, cutout_size=size, fill=fill)
    if kind == "contrastive" and color:
        boxes = draw_boxes(random, image_size, (0.2, 1.0), (3 / 4, 4 / 3))
        factors, order = draw_jitter(random, (0.4, 0.4, 0.4, 0.1))
        jitter, gray = random.uniform(2).unbind(1)
        chosen = {"jitters": jitter < 0.8, "grayscale": gray < 0.2}
        return replace(drawn, boxes=boxes, factors=factors, order=order, **chosen)
    if kind == "contrastive":
        boxes = draw_boxes(random, image_size, (0.7, 1.0), (0.8, 1.25))
    else:
        boxes = draw_scales(random, image_size, (0.7, 1 / 0.7), (0.8, 1.25))
    angle, *shifts = random.uniform(3, -1, 1).unbind(1)
    return replace(drawn, boxes=boxes, angles=15 * angle, shifts=shift * torch.stack(shifts, 1))


def draw_boxes(random: Random, image_size: int, scale: Range, ratio: Range) -> Tensor:
    """Draw boxes (B,4) float32: top, left, height, width in whole pixels, inside the image.

    As in torchvision's RandomResizedCrop: area uniform in `scale` times the image's, aspect ratio
    (width / height) log-uniform in `ratio`; the first of ten tries that fits, else the whole image.
    """
    areas = image_size**2 * random.uniform(10, *scale)
    sizes = _sides(areas, _log_uniform(random, 10, *ratio)).round()  # (B,10,2)
    fits = ((sizes >= 1) & (sizes <= image_size)).all(dim=2)
    first = fits.int().argmax(dim=1)[:, None, None].expand(-1, 1, 2)  # of those that fit
    sizes = sizes.gather(1, first)[:, 0]  # (B,2)
    sizes = torch.where(fits.any(dim=1, keepdim=True), sizes, float(image_size))
    places = image_size - sizes + 1
    corners = (random.uniform(2) * places).floor()
    return torch.cat([corners.minimum(places - 1), sizes], dim=1)


def draw_scales(random: Random, image_size: int, scale: Range, ratio: Range) -> Tensor:
    """Draw boxes (B,4) float32 about the image's center, larger than it where `scale` is above 1.

    Area and aspect ratio are log-uniform: with limits s and 1/s as many images grow as shrink.
    """
    area, aspect = (_log_uniform(random, 1, *limits)[:, 0] for limits in (scale, ratio))
    sizes = image_size * _sides(area, aspect)  # (B,2)
    return torch.cat([(image_size - sizes) / 2, sizes], dim=1)


def _sides(area: Tensor, aspect: Tensor) -> Tensor:
    """Height and width (...,2) of boxes of that area and aspect ratio (...)."""
    return torch.stack([(area / aspect).sqrt(), (area * aspect).sqrt()], dim=-1)


def _log_uniform(random: Random, count: int, low: float, high: float) -> Tensor:
    return random.uniform(count, math.log(low), math.log(high)).exp()


def apply(images: Tensor, drawn: Draw) -> Tensor:
    """Augment images (B,C,H,W), uint8 or float32 in [0,1], as drawn; returns float32 in [0,1]."""
    images = images.clone() if images.dtype == torch.float32 else to_float(images)
    if drawn.offsets is not None:
        images = pad_and_crop(images, drawn.offsets, drawn.padding, drawn.reflect)
    if drawn.boxes is not None and drawn.angles is None:
        images = resized_crop(images, drawn.boxes, drawn.flips)
    else:
        if drawn.angles is not None:
            images = affine(images, drawn.angles, drawn.shifts, drawn.boxes)
        if drawn.flips is not None:
            images = horizontal_flip(images, drawn.flips)
    if drawn.centers is not None:
        images = cutout(images, drawn.centers, drawn.cutout_size, drawn.fill)
    if drawn.jitters is not None:
        color_jitter_(images, drawn.jitters, drawn.factors, drawn.order)
    if drawn.grayscale is not None:
        is_gray = drawn.grayscale.view(-1, 1, 1, 1)
        images = torch.where(is_gray, rgb_to_grayscale(images), images)
    return images


def to_float(images: Tensor) -> Tensor:
    """Images as float32 in [0,1]: uint8 is divided by 255, float32 returned unchanged."""
    return images if images.dtype == torch.float32 else images.to(torch.float32).div_(255)


def horizontal_flip(images: Tensor, flips: Tensor) -> Tensor:
    """Flip the images (B,C,H,W) horizontally where flips (B,) bool is True."""
    return torch.where(flips.view(-1, 1, 1, 1), images.flip(-1), images)


def pad_and_crop(images: Tensor, offsets: Tensor, padding: int, reflect: bool) -> Tensor:
    """Pad by `padding` pixels (reflected or zeros), then crop (H,W) at offsets (B,2): top, left.

    Offsets are int64 in [0, 2 padding]; `padding` itself gives the image. Nothing is interpolated.
    """
    height, width = images.shape[-2:]
    padded = F.pad(images, (padding,) * 4, mode="reflect" if reflect else "constant")
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (B,C,2p+1,2p+1,H,W), a view
    top, left = offsets.unbind(1)
    return windows[torch.arange(len(images), device=images.device), :, top, left]


def cutout(images: Tensor, centers: Tensor, size: int, fill: float) -> Tensor:
    """Fill a square about centers (B,2) int64 (row, column) of each image, clipped at its border.

    It extends from center − size // 2 over `size` pixels (DeVries & Taylor 2017).
    """
    first = centers - size // 2  # (B,2)
    rows, columns = (torch.arange(n, device=images.device) for n in images.shape[-2:])
    in_rows, in_columns = (
        (places >= start[:, None]) & (places < start[:, None] + size)
        for places, start in zip((rows, columns), first.unbind(1), strict=True)
    )
    return images.masked_fill((in_rows[:, :, None] & in_columns[:, None, :])[:, None], fill)


def resized_crop(images: Tensor, boxes: Tensor, flips: Tensor | None = None) -> Tensor:
    """Crop a box (B,4) (top, left, height, width) of each image and resize it to (H,W), bilinear.

    Flipped where `flips`. Equals torchvision's with and without antialias, which differ only when a
    box is made smaller, the crop's border included: no pixel outside it is read.
    """
    height, width = images.shape[-2:]
    top, left, box_height, box_width = boxes.unsqueeze(2).unbind(1)  # (B,1) each
    x = left + box_width * (torch.arange(width, device=images.device) + 0.5) / width - 0.5
    y = top + box_height * (torch.arange(height, device=images.device) + 0.5) / height - 0.5
    x = x.maximum(left).minimum(left + box_width - 1)  # (B,W)
    y = y.maximum(top).minimum(top + box_height - 1)  # (B,H)
    if flips is not None:  # flipping the coordinates is cheaper than flipping the images
        x = torch.where(flips[:, None], x.flip(1), x)
    return _sample(images, x[:, None, :], y[:, :, None])


def affine(images: Tensor, angles: Tensor, shifts: Tensor, boxes: Tensor | None = None) -> Tensor:
    """Rotate about the center by angles (B,) degrees, then translate by shifts (B,2) x, y pixels.

    Bilinear, 0 outside; equals torchvision's `affine` without `fill`, which darkens the border
    twice. With `boxes` (B,4) the image is first cropped and resized, in the same interpolation.
    """
    height, width = images.shape[-2:]
    radians = torch.deg2rad(angles)[:, None, None]  # (B,1,1)
    shift_x, shift_y = shifts[:, :, None, None].unbind(1)
    across = torch.arange(width, device=images.device) + 0.5 - width / 2 - shift_x  # (B,1,W)
    down = (torch.arange(height, device=images.device) + 0.5 - height / 2)[:, None] - shift_y
    top, left, zoom_x, zoom_y = 0, 0, 1, 1
    if boxes is not None:
        top, left, box_height, box_width = boxes[:, :, None, None].unbind(1)
        zoom_x, zoom_y = box_width / width, box_height / height
    # terms of rows and of columns stay separate; only their sums are as large as the images
    x = left - 0.5 + zoom_x * (radians.cos() * across + width / 2) + zoom_x * radians.sin() * down
    y = top - 0.5 + zoom_y * (radians.cos() * down + height / 2) - zoom_y * radians.sin() * across
    return _sample(images, x, y)


def _sample(images: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Sample each image at (x, y), in pixels from the first one's center, 0 outside; bilinear."""
    grid = x.new_empty((*torch.broadcast_shapes(x.shape, y.shape), 2))  # (B,H,W,2)
    # grid_sample's coordinates go from -1 to 1, between the outer edges of the outer pixels
    grid[..., 0] = (2 * x + 1) / images.shape[3] - 1
    grid[..., 1] = (2 * y + 1) / images.shape[2] - 1
    return F.grid_sample(images, grid, align_corners=False)
