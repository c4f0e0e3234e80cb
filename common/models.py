"""The networks that are trained: encoders with a decoder or a head; saving and loading them."""

import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops.layers.torch import Rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from .encoders import (
    DEFAULT_WIDTH,
    Airbench,
    BesideLinear,
    ResidualBlock,
    build_encoder,
    fastest_format,
    stage_widths,
)
from .errors import UserError
from .files import read_json, write, write_json

# of a missing or damaged file
LOAD_ERRORS = (OSError, KeyError, RuntimeError, SafetensorError, TypeError, ValueError)
HeadName = Literal["mlp", "linear", "none"]


def build(network: Callable[[], nn.Module], advice: str) -> nn.Module:
    """Return `network()`; `UserError` if training it takes more memory than this machine has.

    Counts float32 weights, gradients and AdamW's two moments, on torch's meta device, so that
    nothing is allocated for a network that is refused. `advice` names the flags to lower.
    """
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            needed = 16 * sum(parameter.numel() for parameter in network().parameters())
    except RuntimeError:  # the size overflows int64
        needed = math.inf
    if needed > (total := total_memory()):
        raise UserError(
            f"training this network takes at least {needed / 2**30:,.0f} GiB of memory, and this "
            f"machine has {total / 2**30:,.0f} GiB: make {advice} smaller"
        )
    return network()


def total_memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class Preprocess(nn.Module):
    """Images (B,C,S,S), uint8 or floats in [0,1], to float32: (x − mean) / std by channel.

    `UserError` for other integers, whose white nobody knows. With `shape` (C,S,S) also for images
    of another one, which some encoders would take.
    """

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], shape: tuple[int, ...] | None = None
    ):
        super().__init__()
        self.shape = shape
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        if self.shape and tuple(images.shape[1:]) != self.shape:
            raise UserError(
                f"this encoder takes images (B,{','.join(map(str, self.shape))}), not "
                f"{tuple(images.shape)}; resize or convert them, or let embed.py do it"
            )
        if images.dtype == torch.uint8:
            images = images.float() / 255
        elif not images.is_floating_point():
            raise UserError(
                f"this encoder takes images of uint8, or floats in [0,1], not {images.dtype}"
            )
        return (images.float() - self.mean) / self.std

    def invert(self, normalized: Tensor) -> Tensor:
        """Normalized images back to [0,1], clipped to it."""
        return (normalized * self.std + self.mean).clamp(0, 1)


def fit_whitening(network: nn.Module, preprocess: Preprocess, images: Iterable[Tensor]) -> None:
    """Set the fixed filters of the network's encoder, if it has some, from uint8 (N,C,S,S) each."""
    encoder = network.encoder
    encoder = encoder.network if isinstance(encoder, BesideLinear) else encoder
    if isinstance(encoder, Airbench):
        encoder.fit_whitening(preprocess(batch).cpu() for batch in images)


class Decoder(nn.Module):
    """Mirrors `EncoderCNN`: linear map, transposed convolutions, tanh; to [−1,1]."""

    def __init__(self, channels: int, image_size: int, width: int, blocks: int, latent_dim: int):
        super().__init__()
        widths = stage_widths(image_size, width)[::-1]
        sides = [image_size >> halvings for halvings in range(len(widths), -1, -1)]
        layers: list[nn.Module] = [
            nn.Linear(latent_dim, widths[0] * sides[0] ** 2, bias=False),
            Rearrange("b (c h w) -> b c h w", h=sides[0], w=sides[0]),
        ]
        shapes = zip(widths, (*widths[1:], channels), sides, sides[1:], strict=False)
        for channels_in, channels_out, side, larger in shapes:
            layers += [
                nn.BatchNorm2d(channels_in),
                nn.ReLU(inplace=True),
                *(ResidualBlock(channels_in, channels_in) for _ in range(blocks)),
                nn.ConvTranspose2d(
                    *(channels_in, channels_out, 4, 2),
                    padding=1,
                    output_padding=larger - 2 * side,  # 1 where the size was odd
                    bias=larger == image_size,  # where no batch norm follows
                ),
            ]
        self.layers = nn.Sequential(*layers).to(memory_format=fastest_format(width))

    def forward(self, latents: Tensor) -> Tensor:
        return torch.tanh(self.layers(latents))


class Autoencoder(nn.Module):
    """Encoder to `latent_dim` numbers and decoder back: (B,C,S,S) in [−1,1] to the same."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def forward(self, images: Tensor) -> Tensor:
        return self.decoder(self.encoder(images))

    @torch.no_grad()
    def begin_as_pca(self, components: Tensor, mean: Tensor) -> None:
        """Make the linear paths those of PCA and the networks beside them 0, as a first step.

        `components` (D,P) and `mean` (P,) are those of images in [0,1]; here they are in [−1,1].
        """
        mean = 2 * mean - 1
        self.encoder.linear.weight.copy_(components)
        self.encoder.linear.bias.copy_(-(components @ mean))
        self.decoder.linear.weight.copy_(components.T)
        self.decoder.linear.bias.copy_(mean)
        for last in (self.encoder.network.to_latent, self.decoder.network.layers[-1]):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)


def build_autoencoder(
    encoder: str,
    *,
    channels: int,
    image_size: int,
    width: int | None,
    blocks: int,
    latent_dim: int,
    linear_path: bool = False,
) -> Autoencoder:
    """An encoder of that name with the decoder that mirrors the cnn.

    The decoder has the width of the cnn, or half that of another encoder: usually 32 in both cases.
    With `linear_path` both have a linear map beside them: a linear autoencoder, to begin as PCA.
    """
    sizes = {"channels": channels, "image_size": image_size, "width": width, "blocks": blocks}
    network = build_encoder(encoder, **sizes, latent_dim=latent_dim, linear_path=linear_path)
    width = width or DEFAULT_WIDTH[encoder]
    decoder_width = width if encoder == "cnn" else max(1, width // 2)
    decoder: nn.Module = Decoder(channels, image_size, decoder_width, blocks, latent_dim)
    if linear_path:
        decoder = BesideLinear(decoder, latent_dim, channels * image_size**2)
    return Autoencoder(network, decoder)


class JointClassifier(nn.Module):
    """An encoder and a linear classifier on its latents: images (B,C,S,S) to logits (B,K)."""

    def __init__(self, encoder: nn.Module, classes: int):
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(encoder.output_dim, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.encoder(images))


def projection_head(head: HeadName, features: int, projection_dim: int) -> nn.Module:
    """Features (B,D) to projections (B,P): an MLP with one hidden layer of D units, or linear.

    Khosla et al. 2020, section 3.1, name both. "none" leaves the features as they are: P is D.
    """
    if head == "none":
        return nn.Identity()
    if head == "linear":
        return nn.Linear(features, projection_dim)
    return nn.Sequential(
        nn.Linear(features, features), nn.ReLU(), nn.Linear(features, projection_dim)
    )


class SupConNet(nn.Module):
    """Encoder, projection head and perhaps a linear classifier of `classes` beside the head.

    Images (B,C,S,S) to embeddings (B,P), float32, of unit length, and logits (B,K) or None.
    """

    def __init__(
        self, encoder: nn.Module, head: HeadName, projection_dim: int, classes: int | None = None
    ):
        super().__init__()
        dim = encoder.output_dim
        self.encoder = encoder
        self.head = projection_head(head, dim, projection_dim)
        self.classifier = nn.Linear(dim, classes) if classes else None

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        features = self.encoder(images)
        logits = self.classifier(features) if self.classifier else None
        return F.normalize(self.head(features).float(), dim=1), logits


class MLPClassifier(nn.Sequential):
    """Three fully connected layers, batch norm, ReLU and dropout: (B,D) -> logits (B,K)."""

    def __init__(self, latent_dim: int, hidden_dim: int, classes: int, dropout: float):
        super().__init__(
            nn.Linear(latent_dim, hidden_dim, bias=False),
            nn.BatchNorm1d(hidden_dim),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden_dim, hidden_dim, bias=False),
            nn.BatchNorm1d(hidden_dim),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden_dim, classes),
        )


def save_encoder(run_dir: Path, encoder: nn.Module, description: dict[str, Any]) -> None:
    """Write RUN/encoder.safetensors and RUN/encoder.json for `load_encoder`.

    `description` holds the arguments of `build_encoder`, "mean", "std" and further facts.
    """
    save_weights(run_dir / "encoder.safetensors", encoder)
    write_json(run_dir / "encoder.json", description)


def load_encoder(run_dir: str | Path) -> nn.Sequential:
    """The trained encoder of a run: uint8 or [0,1] images (B,C,S,S) to latents (B,D), in eval mode.

    C and S are "channels" and "image_size" of RUN/encoder.json. `UserError` for images of another
    shape, and where there is no encoder, or a damaged one.
    """
    description = read_json(Path(run_dir) / "encoder.json")
    try:
        names = ("encoder", "channels", "image_size", "width", "blocks", "latent_dim")
        sizes = {name: description[name] for name in names}
        encoder = build_encoder(**sizes, linear_path=description.get("linear_path", False))
        weights = load_file(Path(run_dir) / "encoder.safetensors")
        kept = {name: value.shape for name, value in weights.items()}
        if kept != {name: value.shape for name, value in encoder.state_dict().items()}:
            raise UserError(
                f"the weights in {run_dir} are not those of {description['encoder']} at "
                f"{description['image_size']} pixels, whose layers have changed since (from 64 "
                "pixels up), or encoder.json was changed; train it anew"
            )
        encoder.load_state_dict(weights)
        shape = description["channels"], description["image_size"], description["image_size"]
        preprocess = Preprocess(description["mean"], description["std"], shape)
    except LOAD_ERRORS as error:
        raise UserError(f"the encoder in {run_dir} cannot be loaded ({error})") from None
    return nn.Sequential(preprocess, encoder).eval()


def load_classifier(run_dir: str | Path) -> nn.Module:
    """The trained classifier of a run, latents (B,D) to logits (B,K); errors as above."""
    try:
        state = load_file(Path(run_dir) / "classifier.safetensors")
        if "weight" in state:
            classifier = nn.Linear(*state["weight"].T.shape)
        else:  # the value of dropout does not matter in eval mode
            classifier = MLPClassifier(*state["0.weight"].T.shape, len(state["8.bias"]), dropout=0)
        classifier.load_state_dict(state)
    except LOAD_ERRORS as error:
        raise UserError(f"the classifier in {run_dir} cannot be loaded ({error})") from None
    return classifier.eval()


def save_weights(path: Path, module: nn.Module) -> None:
    """Write a module's state as safetensors, atomically."""
    state = {name: tensor.cpu().contiguous() for name, tensor in module.state_dict().items()}
    # a single entry: safetensors writes several in random order, so equal files would differ
    write(path, save(state, metadata={"format": "pt"}))
