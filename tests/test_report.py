import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from common import models
from common.data import datasets
from common.evaluation import pictures, probes, report


@pytest.fixture(scope="module")
def images() -> datasets.ImageData:
    """Two classes of 8×8 images of three channels: dark and bright ones."""
    random = np.random.RandomState(0)

    def part(count):
        labels = (np.arange(count) % 2).astype(np.int64)
        pixels = random.randint(0, 128, (count, 3, 8, 8)) + 127 * labels[:, None, None, None]
        return pixels.astype(np.uint8), labels

    arrays = datasets.Arrays(*part(600), *part(100), ("dark", "bright"), "")
    return datasets.split_data(arrays, None)


class Mean(nn.Module):
    """An encoder with one latent: the mean of the image."""

    def forward(self, inputs):
        return inputs.mean(dim=(1, 2, 3))[:, None]


def test_encode_keeps_the_order_and_changes_nothing(images):
    encoder = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(192, 4)).train()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    preprocess = models.Preprocess((0.5,) * 3, (0.5,) * 3)
    latents = report.encode(encoder, preprocess, images.train)
    assert latents.shape == (540, 4)
    assert not latents.requires_grad
    assert encoder.training
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    last = encoder.eval()(preprocess(images.train.images(torch.tensor([539]))))
    assert torch.allclose(latents[-1], last[0], atol=1e-6)


def test_errors_of_reconstruction_are_means_over_all_pixels(monkeypatch, images):
    monkeypatch.setattr(datasets, "images_at_once", lambda size: 7)  # blocks of unequal size
    gray = 0.25

    class Gray(nn.Module):
        encoder = nn.Identity()

        def decoder(self, latents):
            return torch.full_like(latents, 2 * gray - 1)

    preprocess = models.Preprocess((0.5,) * 3, (0.5,) * 3)
    errors = report.autoencoder_errors(Gray(), preprocess, images.test, "test")
    true = images.test.images(slice(None)) / 255 - gray
    assert errors["test/mse"] == pytest.approx(true.square().mean().item(), rel=1e-5)
    assert errors["test/mae"] == pytest.approx(true.abs().mean().item(), rel=1e-5)


def test_pictures_change_nothing_in_a_network_in_train_mode_and_show_what_it_is_in_eval(images):
    sizes = {"channels": 3, "image_size": 8, "width": 2, "blocks": 0, "latent_dim": 4}
    network = models.build_autoencoder("cnn", **sizes).train()
    preprocess = models.Preprocess((0.5,) * 3, (0.5,) * 3)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    names = {
        name
        for name, _, _ in pictures.autoencoder_pictures(
            network, preprocess, images.test, images.class_names
        )
    }
    assert names == {"reconstructions", "interpolation"}
    assert network.training
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    some = images.test.images(torch.arange(3))
    together = report.reconstruct(network, preprocess, some)
    alone = report.reconstruct(network, preprocess, some[:1])
    assert torch.allclose(together[:1], alone, atol=1e-6)  # batch statistics would differ


def test_the_pca_line_is_the_best_linear_one(images):
    pca, reason = report.fit_pca(images.train, 5)
    assert reason == ""
    train = torch.cat(list(report.pixels(images.train)))
    _, _, directions = torch.linalg.svd(train - train.mean(0), full_matrices=False)
    directions = directions[:5]
    best = (train - train.mean(0)) @ directions.T @ directions + train.mean(0)
    expected = (best.clamp(0, 1) - train).square().mean().item()
    assert report.pca_errors(pca, images.train)["mse"] == pytest.approx(expected, rel=1e-3)


def test_the_pca_line_is_left_out_with_its_reason(images, monkeypatch):
    assert report.fit_pca(images.train, 192) == (None, "192 dimensions hold the images whole")
    digits = datasets.split_data(datasets.read("digits", "data", 32))
    pca, reason = report.fit_pca(digits.train, 128)  # 8×8 enlarged: rank 64
    assert pca is None
    assert "degrees of freedom" in reason
    monkeypatch.setattr(report, "LARGEST_PCA", 100)
    assert "too many" in report.fit_pca(images.train, 5)[1]


def test_latents_are_measured_under_the_names_of_the_contract(images):
    latents = report.encode_splits(Mean(), models.Preprocess((0,), (1,)), images, True)
    probed = report.probe_predictions(latents, 2)
    metrics = report.latent_metrics(latents, probed, "test", "latent")
    assert metrics["test/knn_accuracy"] == metrics["test/linear_accuracy"] == 1
    assert metrics["test/knn_cosine_accuracy"] == probes.accuracy(
        probed["knn_cosine"], latents.test_labels
    )
    assert metrics["latent/silhouette"] > 0.9
    assert {"latent/recall_at_1", "latent/nmi", "test/class_mean_accuracy"} <= set(metrics)
    unseen = report.encode_splits(Mean(), models.Preprocess((0,), (1,)), images, False)
    assert unseen.test is None
    raw = report.image_metrics(images)
    assert raw["image/knn_accuracy"] == 1
    assert raw["image/silhouette"] < metrics["latent/silhouette"]


def test_images_that_are_too_many_to_search_are_left_out(images, monkeypatch, capsys):
    monkeypatch.setattr(report, "LARGEST_PIXEL_SPACE", 10)
    assert report.image_metrics(images) == {}
    assert "is left out" in capsys.readouterr().out
    most = 4 * len(images.test) * images.test.source[0].numel()  # the test images count as well
    few = dataclasses.replace(images, train=images.train.sample(len(images.test) - 1))
    monkeypatch.setattr(report, "LARGEST_PIXEL_SPACE", most)
    assert report.pixels_too_large(few) == ""
    monkeypatch.setattr(report, "LARGEST_PIXEL_SPACE", most - 1)
    assert "as floats the pixels fill" in report.pixels_too_large(few)


def test_pca_gets_the_same_classifier(images):
    pca, _ = report.fit_pca(images.train, 2)
    classifier = models.MLPClassifier(2, 8, 2, dropout=0.0)
    recipe = {"epochs": 3, "batch_size": 32, "learning_rate": 1e-2, "weight_decay": 0.0, "seed": 0}
    metrics = report.pca_metrics(pca, images, [images.train], classifier, recipe)
    assert metrics["pca/accuracy"] == 1
    codes = report.pca_latents(pca, images)
    predictions = probes.predict(classifier, codes.test)
    assert probes.accuracy(predictions, images.test.labels) == 1
    assert {"pca/mse", "pca/mae", "pca/knn_accuracy", "pca/silhouette"} <= set(metrics)


def test_saved_latents_have_the_types_of_the_contract(tmp_path):
    split = torch.randn(3, 2), torch.arange(3)
    latents = probes.Latents(*split, *split, *split)
    report.save_latents(
        tmp_path / "latents.npz", latents, {"predictions": torch.arange(3)}, ["a", "b", "c"]
    )
    stored = np.load(tmp_path / "latents.npz")
    types = {name: str(stored[name].dtype) for name in stored.files}
    numbers = {"latents": "float32", "labels": "int64", "predictions": "int64"}
    assert types == numbers | {"class_names": "<U1"}


def test_the_images_of_a_sample_are_found_in_their_split(images):
    part = images.test.sample(5)
    found = pictures.positions(part, images.test)
    assert torch.equal(images.test.images(found), part.images(slice(None)))


def test_the_classifier_reads_each_split_once(images):
    latents = report.encode_splits(Mean(), models.Preprocess((0,), (1,)), images, True)
    classifier = nn.Linear(latents.train.shape[1], 2)
    measured = report.measure(latents, classifier, images)
    assert torch.allclose(measured.probabilities, classifier(latents.test).softmax(1))
    right = probes.accuracy(measured.predictions["predictions"], latents.test_labels)
    assert measured.metrics["test/accuracy"] == right
    assert {"test/balanced_accuracy", "test/calibration_error"} <= set(measured.metrics)
    assert "linear_predictions" in measured.predictions
    unseen = report.encode_splits(Mean(), models.Preprocess((0,), (1,)), images, False)
    measured = report.measure(unseen, classifier, images)
    assert set(measured.metrics) == {"val/accuracy"} and measured.predictions == {}
    assert torch.allclose(measured.probabilities, classifier(latents.validation).softmax(1))


def test_a_value_of_one_epoch_alone_is_no_curve():
    """The contrastive classifier is fitted once: its accuracy stands in two rows of one epoch."""
    rows = [{"step": n, "epoch": n, "train/loss": 1.0 / n} for n in (1, 2)]
    rows += [{"step": 3, "epoch": 3, "val/accuracy": 0.9} for _ in range(2)]
    name, figure, _ = pictures.curves_picture(rows, {})
    assert name == "curves"
    assert [axes.get_title() for axes in figure.axes] == ["loss"]
