import json

import pytest
import torch
from torch import nn

import compare
from common import models
from common.errors import UserError
from common.evaluation import geometry

SIZES = {"width": 4, "blocks": 0, "latent_dim": 16}


@pytest.mark.parametrize("encoder", ["cnn", "airbench", "resnet18", "resnet34", "resnet50"])
@pytest.mark.parametrize(("channels", "image_size"), [(1, 32), (3, 24)])
def test_every_encoder_gives_latents_and_every_parameter_a_gradient(encoder, channels, image_size):
    network = models.build_encoder(encoder, channels=channels, image_size=image_size, **SIZES)
    latents = network(torch.randn(3, channels, image_size, image_size))
    assert latents.shape == (3, 16)
    assert network.output_dim == 16
    latents.square().sum().backward()
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    ("encoder", "dim"), [("cnn", 256), ("airbench", 16), ("resnet18", 32), ("resnet50", 128)]
)
def test_without_a_latent_size_the_features_come_out(encoder, dim):
    sizes = SIZES | {"latent_dim": None}
    network = models.build_encoder(encoder, channels=1, image_size=32, **sizes)
    assert network(torch.randn(2, 1, 32, 32)).shape == (2, dim)
    assert network.output_dim == dim


def test_the_usual_widths_are_those_of_the_mission_and_the_paper():
    cnn = models.build_encoder(
        "cnn", channels=3, image_size=32, width=None, blocks=0, latent_dim=128
    )
    convolutions = [m.out_channels for m in cnn.modules() if isinstance(m, nn.Conv2d)]
    assert convolutions == [32, 64, 128]
    assert cnn.stages(torch.randn(2, 3, 32, 32)).shape == (2, 128, 4, 4)
    resnet = models.build_encoder(
        "resnet18", channels=3, image_size=32, width=None, blocks=0, latent_dim=None
    )
    count = sum(p.numel() for p in resnet.parameters())
    # torchvision's resnet18 without its 7×7 stem and its classifier, with a 3×3 stem
    assert count == 11_689_512 - 64 * 3 * 49 - 513_000 + 64 * 3 * 9


def test_resnets_have_the_depth_of_their_names():
    for name, depth in (("resnet18", 18), ("resnet34", 34), ("resnet50", 50)):
        network = models.build_encoder(name, channels=3, image_size=32, **SIZES)
        convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
        shortcuts = sum(m.kernel_size == (1, 1) for m in convolutions)
        inner = 2 * 16 if name == "resnet50" else 0  # 1×1 that are no shortcuts
        assert len(convolutions) - (shortcuts - inner) + 1 == depth


@pytest.mark.parametrize("blocks", [0, 1])
@pytest.mark.parametrize(("channels", "image_size"), [(1, 32), (3, 40)])
def test_the_autoencoder_returns_images_in_the_range_of_tanh(channels, image_size, blocks):
    network = models.build_autoencoder(
        "cnn", channels=channels, image_size=image_size, width=4, blocks=blocks, latent_dim=16
    )
    images = torch.randn(3, channels, image_size, image_size)
    reconstructions = network(images)
    assert reconstructions.shape == images.shape
    assert reconstructions.abs().max() <= 1
    reconstructions.square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


def test_the_decoder_mirrors_the_encoder():
    network = models.build_autoencoder(
        "cnn", channels=3, image_size=32, width=None, blocks=0, latent_dim=128
    )
    transposed = [
        (m.in_channels, m.out_channels)
        for m in network.decoder.modules()
        if isinstance(m, nn.ConvTranspose2d)
    ]
    assert transposed == [(128, 64), (64, 32), (32, 3)]
    resnet = models.build_autoencoder(
        "resnet18", channels=3, image_size=32, width=None, blocks=0, latent_dim=128
    )
    widths = [m.in_channels for m in resnet.decoder.modules() if isinstance(m, nn.ConvTranspose2d)]
    assert widths == [128, 64, 32]


def test_beside_a_linear_path_an_autoencoder_begins_as_pca():
    images = torch.rand(300, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    images = torch.cumsum(images, dim=-1) / 16  # neighboring pixels resemble each other
    pca = geometry.fit_pca(lambda: [images.flatten(1)], 8)
    sizes = {"channels": 3, "image_size": 16, "width": 4, "blocks": 0, "latent_dim": 8}
    for encoder in ("cnn", "airbench"):
        network = models.build_autoencoder(encoder, **sizes, linear_path=True).eval()
        network.begin_as_pca(pca.components, pca.mean)
        codes = pca.encode(images.flatten(1))
        assert torch.allclose(network.encoder(2 * images - 1) / 2, codes, atol=1e-5)
        decoded = (network(2 * images - 1) + 1) / 2
        assert torch.allclose(decoded.flatten(1), pca.decode(codes), atol=1e-5)
        network.train()(2 * images - 1).square().sum().backward()
        learns = {name for name, p in network.named_parameters() if p.grad is not None}
        assert {"encoder.linear.weight", "encoder.network.to_latent.weight"} < learns


def test_preprocessing_normalizes_and_inverts():
    preprocess = models.Preprocess((0.5, 0.25), (0.5, 0.1))
    images = torch.randint(0, 256, (4, 2, 8, 8), dtype=torch.uint8)
    normalized = preprocess(images)
    assert torch.allclose(normalized[:, 0], images[:, 0] / 127.5 - 1, atol=1e-6)
    assert torch.allclose(normalized[:, 1], (images[:, 1] / 255 - 0.25) / 0.1, atol=1e-5)
    assert torch.allclose(preprocess.invert(normalized), images / 255, atol=1e-6)
    assert torch.equal(preprocess(images), preprocess(images / 255))


def test_the_classifier_has_three_fully_connected_layers():
    classifier = models.MLPClassifier(16, 32, 5, dropout=0.5)
    assert classifier(torch.randn(4, 16)).shape == (4, 5)
    kinds = [type(module).__name__ for module in classifier]
    assert kinds.count("Linear") == 3
    assert kinds.count("BatchNorm1d") == kinds.count("ReLU") == kinds.count("Dropout") == 2


def test_a_residual_block_keeps_its_input_where_the_residual_is_zero():
    block = models.ResidualBlock(4, 4)
    nn.init.zeros_(block.residual[-1].weight)
    features = torch.rand(2, 4, 8, 8)
    assert torch.equal(block(features), features)


def save(folder, encoder="cnn"):
    torch.manual_seed(0)
    network = models.build_encoder(encoder, channels=1, image_size=16, **SIZES)
    network(torch.randn(8, 1, 16, 16))  # batch statistics that are not the initial ones
    description = {"encoder": encoder, "channels": 1, "image_size": 16, **SIZES}
    models.save_encoder(folder, network, description | {"mean": (0.5,), "std": (0.25,)})
    return network


@pytest.mark.parametrize("encoder", ["cnn", "airbench", "resnet18"])
def test_a_saved_encoder_comes_back_with_its_preprocessing(tmp_path, encoder):
    network = save(tmp_path, encoder).eval()
    images = torch.randint(0, 256, (5, 1, 16, 16), dtype=torch.uint8)
    loaded = models.load_encoder(tmp_path)
    assert not any(module.training for module in loaded.modules())
    with torch.no_grad():
        expected = network((images / 255 - 0.5) / 0.25)
        assert torch.allclose(loaded(images), expected, atol=1e-6)


@pytest.mark.parametrize("encoder", ["cnn", "airbench", "resnet18"])
def test_a_saved_encoder_refuses_images_of_another_shape(tmp_path, encoder):
    save(tmp_path, encoder)
    loaded = models.load_encoder(tmp_path)
    for shape in ((2, 1, 28, 28), (2, 3, 16, 16), (1, 16, 16)):
        with pytest.raises(UserError, match=r"takes images \(B,1,16,16\), not \("):
            loaded(torch.zeros(shape))


def test_images_of_any_float_type_are_encoded_and_other_integers_refused(tmp_path):
    save(tmp_path)
    loaded = models.load_encoder(tmp_path)
    images = torch.randint(0, 256, (3, 1, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        expected = loaded(images)
        for dtype in (torch.float32, torch.float64):
            found = loaded(images.to(dtype) / 255)
            assert found.dtype == torch.float32 and torch.allclose(found, expected, atol=1e-5)
    for dtype in (torch.int64, torch.int32, torch.bool):
        with pytest.raises(UserError, match=rf"uint8, or floats in \[0,1\], not {dtype}"):
            loaded(images.to(dtype))


@pytest.mark.parametrize("text", ["[]", "null", "{}", '{"mean": null}', '{"width": "8"}'])
def test_a_description_of_another_form_is_one_line(tmp_path, text):
    save(tmp_path)
    description = json.loads((tmp_path / "encoder.json").read_text())
    odd = json.loads(text)
    odd = description | odd if isinstance(odd, dict) and odd else odd
    (tmp_path / "encoder.json").write_text(json.dumps(odd))
    with pytest.raises(UserError) as error:
        models.load_encoder(tmp_path)
    assert "\n" not in error.value.message


def test_a_missing_or_damaged_encoder_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*encoder\.json"):
        models.load_encoder(tmp_path)
    save(tmp_path)
    (tmp_path / "encoder.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot be loaded"):
        models.load_encoder(tmp_path)
    save(tmp_path)
    description = json.loads((tmp_path / "encoder.json").read_text())
    (tmp_path / "encoder.json").write_text(json.dumps(description | {"latent_dim": 7}))
    with pytest.raises(UserError, match="not those of cnn at 16 pixels"):
        models.load_encoder(tmp_path)


@pytest.mark.parametrize(
    "classifier", [nn.Linear(16, 5), models.MLPClassifier(16, 8, 5, dropout=0.5)]
)
def test_a_saved_classifier_comes_back(tmp_path, classifier):
    classifier(torch.randn(9, 16))  # batch statistics that are not the initial ones
    models.save_weights(tmp_path / "classifier.safetensors", classifier)
    loaded = models.load_classifier(tmp_path)
    latents = torch.randn(3, 16)
    assert torch.equal(loaded(latents), classifier.eval()(latents))
    (tmp_path / "classifier.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"classifier in .* cannot be loaded"):
        models.load_classifier(tmp_path)


@pytest.mark.parametrize("head", ["mlp", "linear", "none"])
def test_the_projection_is_of_unit_length_and_every_parameter_gets_a_gradient(head, tmp_path):
    encoder = models.build_encoder(
        "resnet18", channels=1, image_size=16, width=4, blocks=0, latent_dim=None
    )
    network = models.SupConNet(encoder, head, 6)
    embeddings, logits = network(torch.randn(4, 1, 16, 16))
    assert logits is None
    assert embeddings.shape == (4, 32 if head == "none" else 6)
    assert torch.allclose(embeddings.norm(dim=1), torch.ones(4), atol=1e-6)
    embeddings[:, 0].sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in network.parameters())

    save(tmp_path)  # and compare.py loads it
    models.save_weights(tmp_path / "classifier.safetensors", nn.Linear(16, 2))
    models.save_weights(tmp_path / "head.safetensors", network.head)
    _, _, loaded = compare.load_networks(tmp_path, torch.device("cpu"))
    features = torch.randn(3, encoder.output_dim)
    if head == "none":
        assert loaded is None  # no space of its own
    else:
        assert torch.equal(loaded(features), network.head(features))


def test_the_joint_network_reads_its_logits_off_the_latents():
    encoder = models.build_encoder("cnn", channels=1, image_size=16, **SIZES)
    network = models.JointClassifier(encoder, 7).eval()
    images = torch.randn(2, 1, 16, 16)
    assert torch.equal(network(images), network.classifier(encoder(images)))
    assert network(images).shape == (2, 7)


@pytest.mark.parametrize("blocks", [0, 1, 2])
@pytest.mark.parametrize("image_size", [8, 16, 32, 65, 96, 130])
def test_airbench_takes_images_of_any_size(blocks, image_size):
    sizes = SIZES | {"blocks": blocks, "latent_dim": None}
    network = models.build_encoder("airbench", channels=1, image_size=image_size, **sizes)
    assert network(torch.randn(2, 1, image_size, image_size)).shape == (2, 16)


def test_airbench_is_the_network_of_the_paper():
    sizes = {"channels": 3, "image_size": 32, "width": None, "latent_dim": None}
    network = models.build_encoder("airbench", blocks=0, **sizes)
    shapes = [tuple(m.weight.shape[:2]) for m in network.modules() if isinstance(m, nn.Conv2d)]
    groups = [(64, 24), (64, 64), (256, 64), (256, 256), (256, 256), (256, 256)]
    assert shapes == [(24, 3), *groups]
    # 1.97 million with the 256 x 10 weights of its linear classifier
    assert 1.96e6 < sum(p.numel() for p in network.parameters()) + 2560 < 1.98e6
    larger = models.build_encoder("airbench", blocks=1, **sizes)
    assert sum(isinstance(m, nn.Conv2d) for m in larger.modules()) == 1 + 9


def test_whitened_patches_are_uncorrelated_and_the_filters_come_in_pairs(tmp_path):
    network = models.build_encoder("airbench", channels=3, image_size=16, **SIZES)
    noise = torch.randn(200, 3, 16, 16)
    images = noise + 0.5 * noise.roll(1, -1) + 0.5 * noise.roll(1, 1)  # pixels, channels correlate
    network.fit_whitening(images.split(64))
    with torch.no_grad():
        whitened = nn.functional.conv2d(images, network.whitening.weight)
        again = whitened.transpose(0, 1).flatten(1)  # (24,N)
    products = again @ again.T / again.shape[1]
    assert torch.allclose(products[:12, :12], torch.eye(12), atol=0.02)  # eigenvalues + 5e-4
    assert torch.equal(again[12:], -again[:12])


def test_airbench_filters_begin_as_the_identity():
    network = models.build_encoder("airbench", channels=1, image_size=16, **SIZES)
    for layer in (m for m in network.stages.modules() if isinstance(m, nn.Conv2d)):
        images = torch.randn(1, layer.in_channels, 4, 4)
        same = min(layer.in_channels, layer.out_channels)
        assert torch.allclose(layer(images)[:, :same], images[:, :same], atol=1e-6)


def test_only_airbench_is_whitened():
    preprocess = models.Preprocess((0.5,), (0.25,))
    images = torch.randint(0, 256, (20, 1, 16, 16), dtype=torch.uint8)
    for encoder in ("cnn", "airbench"):
        network = models.build_autoencoder(encoder, channels=1, image_size=16, **SIZES)
        before = {name: value.clone() for name, value in network.state_dict().items()}
        models.fit_whitening(network, preprocess, [images])
        after = network.state_dict()
        changed = [name for name in after if not torch.equal(after[name], before[name])]
        assert changed == ([] if encoder == "cnn" else ["encoder.whitening.weight"])


def test_blocks_belong_to_cnn_and_airbench():
    with pytest.raises(UserError, match="--blocks"):
        models.build_encoder(
            "resnet18", channels=1, image_size=32, width=4, blocks=1, latent_dim=16
        )
