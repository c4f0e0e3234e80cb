"""The encoders: images to latents or features.

Each maps normalized images (B,C,S,S) to (B,D), D being its `output_dim`; `build_encoder` makes one
by its name.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import UserError

DEFAULT_WIDTH = {"cnn": 32, "airbench": 64, "resnet18": 64, "resnet34": 64, "resnet50": 64}
RESNET_BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3)}
LARGE = 96  # pixels a side, from which on the first layer of a ResNet and airbench has stride 2


def build_encoder(
    encoder: str,
    *,
    channels: int,
    image_size: int,
    width: int | None,
    blocks: int,
    latent_dim: int | None,
    linear_path: bool = False,
) -> nn.Module:
    """The encoder of that name; `width` None is the usual one: 32 for cnn, 64 for the others.

    With `linear_path` a linear map from the pixels to `latent_dim` latents stands beside it.
    """
    if linear_path:
        sizes = {"channels": channels, "image_size": image_size, "width": width, "blocks": blocks}
        network = build_encoder(encoder, **sizes, latent_dim=latent_dim)
        return BesideLinear(network, channels * image_size**2, latent_dim)
    width = width or DEFAULT_WIDTH[encoder]
    if encoder == "cnn":
        return EncoderCNN(channels, image_size, width, blocks, latent_dim)
    if encoder == "airbench":
        return Airbench(channels, image_size, width, blocks, latent_dim)
    if blocks:
        raise UserError(
            f"--blocks applies to --encoder cnn and airbench; leave it out with {encoder}"
        )
    return ResNet(encoder, channels, image_size, width, latent_dim)


class ResidualBlock(nn.Module):
    """ReLU(x + f(x)), f being convolutions with batch norm (He et al. 2016, figure 5).

    Two of 3×3 to `channels`; as a `bottleneck` 1×1, 3×3 and 1×1, the last to 4·`channels`.
    Where the size changes, x goes through a 1×1 convolution.
    """

    def __init__(self, channels_in: int, channels: int, stride: int = 1, bottleneck: bool = False):
        super().__init__()
        widths = (channels, channels, 4 * channels) if bottleneck else (channels, channels)
        kernels, strides = ((1, 3, 1), (1, stride, 1)) if bottleneck else ((3, 3), (stride, 1))
        layers: list[nn.Module] = []
        shapes = zip((channels_in, *widths[:-1]), widths, kernels, strides, strict=True)
        for width_in, width, kernel, step in shapes:
            layers += [
                nn.Conv2d(width_in, width, kernel, step, padding=kernel // 2, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
        self.residual = nn.Sequential(*layers[:-1])
        self.channels_out = widths[-1]
        self.shortcut = nn.Identity()
        if stride > 1 or channels_in != self.channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, self.channels_out, 1, stride, bias=False),
                nn.BatchNorm2d(self.channels_out),
            )

    def forward(self, features: Tensor) -> Tensor:
        return F.relu(self.shortcut(features) + self.residual(features), inplace=True)


def doublings(image_size: int) -> int:
    """How often an image of 32 pixels a side doubles up to this size: 0 up to 63, 1 up to 127."""
    return max(image_size // 32, 1).bit_length() - 1


def stage_widths(image_size: int, width: int) -> tuple[int, ...]:
    """Channels of the strided convolutions: width, 2·width, 4·width, after one of width for each
    doubling, so that the last feature map has 4 to 7 pixels a side from 32 pixels up.
    """
    return (*[width] * doublings(image_size), width, 2 * width, 4 * width)


class EncoderCNN(nn.Module):
    """Strided convolutions of width, 2·width and 4·width channels, then a linear map.

    (B,C,S,S) -> (B,latent_dim), through (B,4·width,S/8,S/8) up to 63 pixels; each doubling of S
    adds a convolution at the front (`stage_widths`). Each has batch norm and ReLU, and `blocks`
    residual blocks behind it. `latent_dim` None leaves the linear map out: the features are the
    last feature map, flattened.
    """

    def __init__(
        self, channels: int, image_size: int, width: int, blocks: int, latent_dim: int | None
    ):
        super().__init__()
        layers: list[nn.Module] = []
        stages = stage_widths(image_size, width)
        for channels_in, channels_out in zip((channels, *stages), stages, strict=False):
            layers += [
                nn.Conv2d(channels_in, channels_out, 4, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(channels_out),
                nn.ReLU(inplace=True),
                *(ResidualBlock(channels_out, channels_out) for _ in range(blocks)),
            ]
        self.stages = nn.Sequential(*layers).to(memory_format=fastest_format(width))
        feature_dim = 4 * width * (image_size >> len(stages)) ** 2
        self.to_latent = nn.Linear(feature_dim, latent_dim) if latent_dim else nn.Identity()
        self.output_dim = latent_dim or feature_dim

    def forward(self, images: Tensor) -> Tensor:
        return self.to_latent(self.stages(images).flatten(1))  # of (B, 4·width·side²)


class ResNet(nn.Module):
    """ResNet (He et al. 2016); small images have a 3×3 stem of stride 1 and no max-pooling.

    (B,C,S,S) -> (B,latent_dim); with `latent_dim` None the pooled features, (B,8·width) for
    resnet18 and 34, (B,32·width) for resnet50. `width` 64 is the network of the paper, also in its
    stem from 96 pixels up: 7×7 of stride 2, then 3×3 max-pooling of stride 2.
    """

    def __init__(
        self, name: str, channels: int, image_size: int, width: int, latent_dim: int | None
    ):
        super().__init__()
        bottleneck, large = name == "resnet50", image_size >= LARGE
        kernel, step = (7, 2) if large else (3, 1)
        layers: list[nn.Module] = [
            nn.Conv2d(channels, width, kernel, step, padding=kernel // 2, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            *([nn.MaxPool2d(3, stride=2, padding=1)] if large else []),
        ]
        channels_in = width
        for stage, count in enumerate(RESNET_BLOCKS[name]):
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                layers.append(ResidualBlock(channels_in, width * 2**stage, stride, bottleneck))
                channels_in = layers[-1].channels_out
        self.stages = nn.Sequential(*layers).to(memory_format=fastest_format(width))
        self.to_latent = nn.Linear(channels_in, latent_dim) if latent_dim else nn.Identity()
        self.output_dim = latent_dim or channels_in

    def forward(self, images: Tensor) -> Tensor:
        return self.to_latent(self.stages(images).mean(dim=(2, 3)))  # of (B, 8·width)


class Airbench(nn.Module):
    """The network of Jordan 2024 (arXiv 2404.00498, section 3), quick to train on small images.

    (B,C,S,S) -> (B,latent_dim); with `latent_dim` None the features (B,4·width), the maxima of the
    last feature map. A fixed 2×2 convolution whitens the pixels (`fit_whitening`); then three
    groups of width, 4·width and 4·width channels: a 3×3 convolution, 2×2 max-pooling, and another
    3×3 convolution or, with `blocks`, that many residual blocks of two (as in the paper's larger
    network). Each has batch norm that shifts but does not scale, and SiLU, which is faster than the
    paper's GELU; filters begin as the identity. `width` 64 is the network of the paper. From 64
    pixels up each doubling of S adds a group of width channels at the front; from 96 up the patches
    do not overlap.
    """

    def __init__(
        self, channels: int, image_size: int, width: int, blocks: int, latent_dim: int | None
    ):
        super().__init__()
        self.whitening = nn.Conv2d(channels, 8 * channels, 2, stride=1 + (image_size >= LARGE))
        self.whitening.weight.requires_grad = False
        layers: list[nn.Module] = []
        channels_in = 8 * channels
        for channels_out in (*[width] * doublings(image_size), width, 4 * width, 4 * width):
            pool = nn.MaxPool2d(2, ceil_mode=image_size < 16)  # 7 -> 4 -> 2 -> 1, and not to 0
            layers += [_identity_filters(channels_in, channels_out), pool]
            layers += [_shifting_norm(channels_out), nn.SiLU()]
            layers += [ShiftingBlock(channels_out, is_residual=True) for _ in range(blocks)] or [
                ShiftingBlock(channels_out, is_residual=False)
            ]
            channels_in = channels_out
        self.stages = nn.Sequential(*layers).to(memory_format=torch.channels_last)
        self.to_latent = nn.Linear(channels_in, latent_dim) if latent_dim else nn.Identity()
        self.output_dim = latent_dim or channels_in

    def forward(self, images: Tensor) -> Tensor:
        features = self.stages(F.silu(self.whitening(images)))  # (B,4·width,side,side)
        return self.to_latent(features.amax(dim=(2, 3)))

    @torch.no_grad()
    def fit_whitening(self, images: Iterable[Tensor]) -> None:
        """Set the filters of the first layer from batches (N,C,S,S) of normalized training images.

        They are the eigenvectors of the covariance of 2×2 patches, each divided by
        √(eigenvalue + 5e-4), and their negatives, so that no sign is lost in the activation.
        """
        products, count = 0, 0
        for batch in images:
            patches = F.unfold(batch, 2, stride=self.whitening.stride)  # (N,4·C,patches)
            patches = patches.transpose(0, 1).flatten(1)
            products, count = products + patches @ patches.T, count + patches.shape[1]
        values, vectors = torch.linalg.eigh(products / count)
        filters = (vectors / (values + 5e-4).sqrt()).mT.view(-1, *self.whitening.weight.shape[1:])
        self.whitening.weight.copy_(torch.cat([filters, -filters]))


class ShiftingBlock(nn.Module):
    """SiLU(f(x)), f being a 3×3 convolution and batch norm; SiLU(x + f(SiLU(f(x)))) if residual."""

    def __init__(self, channels: int, is_residual: bool):
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(1 + is_residual):
            layers += [_identity_filters(channels, channels), _shifting_norm(channels), nn.SiLU()]
        self.layers = nn.Sequential(*layers[:-1])
        self.is_residual = is_residual

    def forward(self, features: Tensor) -> Tensor:
        out = self.layers(features)
        return F.silu(features + out if self.is_residual else out)


def _identity_filters(channels_in: int, channels_out: int) -> nn.Conv2d:
    """A 3×3 convolution whose first filters pass on their channel as it is."""
    layer = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
    nn.init.dirac_(layer.weight.data[:channels_in])
    return layer


def _shifting_norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels)
    norm.weight.requires_grad = False  # stays 1
    return norm


class BesideLinear(nn.Module):
    """A network beside a linear map: x to network(x) + W x + b, so the network learns the rest."""

    def __init__(self, network: nn.Module, inputs: int, outputs: int):
        super().__init__()
        self.network = network
        self.linear = nn.Linear(inputs, outputs)
        self.output_dim = outputs

    def forward(self, inputs: Tensor) -> Tensor:
        rest = self.network(inputs)
        return rest + self.linear(inputs.flatten(1)).view_as(rest)


def fastest_format(width: int) -> torch.memory_format:
    """The layout in which convolutions of so many base channels train fastest and correctly."""
    # below 16 channels oneDNN 3.12 writes out of bounds in the backward pass of a strided 1×1
    return torch.contiguous_format if width % 16 else torch.channels_last
