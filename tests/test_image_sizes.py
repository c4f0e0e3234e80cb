"""The networks by the size of the images: odd sizes, large ones, and the same weights at small."""

import zlib

import pytest
import torch
from torch import nn

from common import models
from common.data import augmentation
from common.data.philox import Random
from common.errors import UserError

SIZES = {"channels": 3, "width": 4, "latent_dim": 16}
# of autoencoders as they were before networks followed the size: names and shapes; weights
BEFORE = {
    ("cnn", 16): (2711911694, 509.26730955725145),
    ("airbench", 16): (1999275094, 605.8800819378473),
    ("resnet18", 16): (2539583666, 886.4594170482922),
    ("resnet34", 16): (371455038, 1527.9932519832441),
    ("resnet50", 16): (1612310025, 4704.247221561664),
    ("cnn", 28): (2086500661, 523.1267740272996),
    ("airbench", 28): (3778603953, 598.4853987219643),
    ("resnet18", 28): (2942591335, 871.8427044049974),
    ("resnet34", 28): (773418475, 1521.119388180469),
    ("resnet50", 28): (1478721500, 4697.858180013938),
    ("cnn", 32): (2089522371, 525.4375891348907),
    ("airbench", 32): (2747980224, 596.4085067912688),
    ("resnet18", 32): (2459789311, 861.9930984598342),
    ("resnet34", 32): (1980945912, 1517.4622576142872),
    ("resnet50", 32): (3470346981, 4678.771708867298),
    ("cnn", 48): (126587094, 530.0502826978361),
    ("airbench", 48): (3807158059, 587.8850999258336),
    ("resnet18", 48): (3088437742, 832.3030851315876),
    ("resnet34", 48): (1553621993, 1521.1514575691722),
    ("resnet50", 48): (3830578420, 4637.767726399721),
}


def blocks_of(encoder: str) -> int:
    return 0 if encoder.startswith("resnet") else 1


@pytest.mark.parametrize(("encoder", "image_size"), BEFORE, ids=str)
def test_small_images_have_the_weights_that_they_always_had(encoder, image_size):
    """Runs are repeated, and encoders loaded: the same layers, drawn in the same order."""
    torch.manual_seed(0)
    network = models.build_autoencoder(
        encoder, image_size=image_size, blocks=blocks_of(encoder), **SIZES
    )
    state = network.state_dict()
    shapes = [(name, tuple(value.shape)) for name, value in state.items()]
    values = torch.cat([value.flatten().double() for value in state.values()])
    weighted = (values * torch.linspace(1, 2, len(values), dtype=torch.float64)).sum()
    names, weights = BEFORE[encoder, image_size]
    assert zlib.crc32(repr(shapes).encode()) == names
    assert weighted.item() == pytest.approx(weights, rel=1e-9)


@pytest.mark.parametrize("image_size", [8, 9, 63, 65, 100, 225])
@pytest.mark.parametrize("encoder", ["cnn", "airbench", "resnet18", "resnet50"])
def test_an_autoencoder_returns_images_of_their_size(encoder, image_size):
    network = models.build_autoencoder(
        encoder, image_size=image_size, blocks=blocks_of(encoder), **SIZES
    )
    torch.manual_seed(0)
    images = torch.randn(4, 3, image_size, image_size)
    latents = network.encoder(images)
    assert latents.shape == (4, 16)
    reconstructions = network.decoder(latents)
    assert reconstructions.shape == images.shape
    reconstructions.square().sum().backward()
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().sum() > 0, name
    # the last rows and columns are painted, too
    edge = nn.functional.pad(torch.zeros(image_size - 2, image_size - 2), [1] * 4, value=1).bool()
    assert reconstructions[:, :, edge].std() > 0


@pytest.mark.parametrize("kind", ["none", "crop_flip", "cutout", "affine", "contrastive"])
@pytest.mark.parametrize("image_size", [9, 100, 225])
def test_augmented_images_keep_their_size(kind, image_size):
    images = torch.randint(0, 256, (4, 3, image_size, image_size), dtype=torch.uint8)
    changed = augmentation.augment(images, Random(torch.arange(4), 0), kind, True)
    assert changed.shape == images.shape


@pytest.mark.parametrize(
    ("image_size", "widths", "side"),
    [
        (8, [32, 64, 128], 1),
        (63, [32, 64, 128], 7),
        (64, [32, 32, 64, 128], 4),
        (128, [32, 32, 32, 64, 128], 4),
        (224, [32, 32, 32, 64, 128], 7),
        (1024, [32] * 6 + [64, 128], 4),
    ],
)
def test_each_doubling_adds_a_strided_convolution_of_the_cnn(image_size, widths, side):
    sizes = {"channels": 3, "image_size": image_size, "width": None, "blocks": 0, "latent_dim": 128}
    network = models.build_autoencoder("cnn", **sizes).eval()
    with torch.no_grad():
        features = network.encoder.stages(torch.randn(1, 3, image_size, image_size))
    assert features.shape == (1, 128, side, side)
    convolutions = [m for m in network.encoder.modules() if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in convolutions] == widths
    transposed = [m for m in network.decoder.modules() if isinstance(m, nn.ConvTranspose2d)]
    assert [m.in_channels for m in transposed] == widths[::-1]
    assert network.encoder.to_latent.in_features == 128 * side**2 <= 128 * 7**2


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_a_resnet_of_large_images_is_the_one_of_the_paper(name):
    torchvision = pytest.importorskip("torchvision.models")
    sizes = {"channels": 3, "width": None, "blocks": 0, "latent_dim": 1000}
    with torch.device("meta"):
        ours = models.build_encoder(name, image_size=96, **sizes)
        theirs = getattr(torchvision, name)()
        small = models.build_encoder(name, image_size=95, **sizes)
    narrow = models.build_encoder(name, image_size=224, **SIZES, blocks=0)
    assert narrow.stages(torch.randn(1, 3, 224, 224)).shape[2:] == (7, 7)
    shapes = [sorted(tuple(p.shape) for p in network.parameters()) for network in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert small.stages[0].kernel_size == (3, 3) and small.stages[0].stride == (1, 1)


@pytest.mark.parametrize(("image_size", "groups", "side"), [(63, 3, 7), (64, 4, 3), (224, 5, 3)])
def test_airbench_of_large_images_loses_no_pixel_to_its_stride(image_size, groups, side):
    network = models.build_encoder("airbench", image_size=image_size, blocks=0, **SIZES)
    images = torch.randn(20, 3, image_size, image_size)
    network.fit_whitening([images])
    whitened = network.whitening(images)
    assert network.stages(nn.functional.silu(whitened)).shape == (20, 16, side, side)
    assert sum(isinstance(m, nn.MaxPool2d) for m in network.modules()) == groups
    if image_size < 96:
        return
    # patches that do not overlap: an invertible map, whose first 12 outputs are uncorrelated
    rows = (whitened - network.whitening.bias[:, None, None])[:, :12].transpose(0, 1).flatten(1)
    products = rows @ rows.T / rows.shape[1]
    assert torch.allclose(products, torch.eye(12), atol=0.01)


@pytest.mark.parametrize(
    ("encoder", "image_size"), [("cnn", 64), ("airbench", 64), ("resnet18", 96)]
)
def test_an_encoder_of_other_layers_is_refused_in_one_line(tmp_path, encoder, image_size):
    """Older runs on images of this size have the layers that small images have."""
    network = models.build_encoder(encoder, image_size=32, blocks=0, **SIZES)
    about = {"encoder": encoder, "image_size": image_size, "blocks": 0}
    models.save_encoder(tmp_path, network, SIZES | about | {"mean": [0.5] * 3, "std": [0.5] * 3})
    expected = f"{encoder} at {image_size} pixels.* have changed since.*train it anew"
    with pytest.raises(UserError, match=expected) as error:
        models.load_encoder(tmp_path)
    assert "\n" not in error.value.message
