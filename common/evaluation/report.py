"""Evaluation shared by all training scripts: metrics of latents and reconstructions.

Metrics are returned under the same names for every method.
"""

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..console import say
from ..errors import UserError
from ..files import write
from . import geometry, neighbors, probes, samples, scores

ROUNDING_MSE = 1 / (12 * 255**2)  # variance of rounding to 8 bits, images in [0,1]
LARGEST_PIXEL_SPACE = 2**31  # bytes of flattened training images for kNN on pixels
LARGEST_LATENT = 1e12  # the sum of squared differences still fits into float32
LARGEST_PCA = 16_384  # pixels; the covariance of more fills gigabytes


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards the module is in its former mode again."""
    was_training = module.training
    module.eval()
    with torch.no_grad():
        yield
    module.train(was_training)


def encode(encoder: nn.Module, preprocess: nn.Module, split) -> Tensor:
    """Latents float32 (N,D) of a split's images, in its order; the encoder in eval mode.

    `UserError` for latents that no metric can take: NaN, infinite, or so large that distances
    between them are.
    """
    with evaluating(encoder):
        latents = torch.cat([encoder(preprocess(images)).float() for images in split.blocks()])
    if not (largest := latents.abs().max().item()) <= LARGEST_LATENT:  # NaN is not, either
        raise UserError(
            f"the training has diverged: the encoder's outputs reach {largest:g}; "
            "start a new run with a lower --learning_rate"
        )
    return latents


def pixels(split) -> Iterator[Tensor]:
    """The images of a split flattened, float32 (B,C·S·S) in [0,1] at a time."""
    for images in split.blocks():
        yield flattened(images)


def flattened(images: Tensor) -> Tensor:
    """Images (B,C,S,S), uint8 or floats in [0,1], as pixels float32 (B,C·S·S) in [0,1]."""
    return (images / 255 if images.dtype == torch.uint8 else images).flatten(1)


def encode_splits(
    encoder: nn.Module, preprocess: nn.Module, data, with_test: bool, views: Iterable = ()
) -> probes.Latents:
    """Latents of all splits of a data set, and of augmented `views` of its training split."""
    return probes.Latents(
        encode(encoder, preprocess, data.train),
        data.train.labels,
        encode(encoder, preprocess, data.validation),
        data.validation.labels,
        encode(encoder, preprocess, data.test) if with_test else None,
        data.test.labels if with_test else None,
        tuple(encode(encoder, preprocess, view) for view in views),
    )


def knn_accuracies(
    encoder: nn.Module, preprocess: nn.Module, references, queries, latents: Tensor | None = None
) -> dict[str, float]:
    """val/knn_accuracy and val/knn_cosine_accuracy on the query images, by the `references`.

    The distances are those of `probe_predictions`. The queries' `latents` (N,D) may be known.
    """
    if latents is None:
        latents = encode(encoder, preprocess, queries)
    known = encode(encoder, preprocess, references)
    both = neighbors.predict_both(known, references.labels, latents)
    names = ("val/knn_accuracy", "val/knn_cosine_accuracy")
    return {name: probes.accuracy(x, queries.labels) for name, x in zip(names, both, strict=True)}


def reconstruction_errors(blocks: Iterator[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """`mse` and `mae` over all pixels of blocks (reconstructions, images), both in [0,1]."""
    squared = absolute = count = 0.0
    for reconstructions, images in blocks:
        squared += F.mse_loss(reconstructions, images, reduction="sum").item()
        absolute += F.l1_loss(reconstructions, images, reduction="sum").item()
        count += images.numel()
    return {"mse": squared / count, "mae": absolute / count}


def reconstruct(autoencoder: nn.Module, preprocess: nn.Module, images: Tensor) -> Tensor:
    """Reconstructions (B,C,S,S) of uint8 images, in [0,1], in eval mode."""
    with evaluating(autoencoder):
        # not autoencoder(…), which Accelerate runs in mixed precision
        return preprocess.invert(autoencoder.decoder(autoencoder.encoder(preprocess(images))))


def autoencoder_errors(
    autoencoder: nn.Module, preprocess: nn.Module, split, prefix: str
) -> dict[str, float]:
    """PREFIX/mse and PREFIX/mae of an autoencoder's reconstructions, clipped to [0,1]."""
    errors = reconstruction_errors(
        (reconstruct(autoencoder, preprocess, images), images / 255) for images in split.blocks()
    )
    return {f"{prefix}/{name}": value for name, value in errors.items()}


def fit_pca(split, dimensions: int) -> tuple[geometry.PCA | None, str]:
    """PCA of the training images with as many dimensions as the latents, or why it is left out.

    Its reconstruction error is the lowest of all linear autoencoders of that size.
    """
    pixel_count = split.source[0].numel()
    if pixel_count > LARGEST_PCA:
        return None, f"{pixel_count} pixels are too many for it"
    if dimensions >= min(pixel_count, len(split)):
        return None, f"{dimensions} dimensions hold the images whole"
    pca = geometry.fit_pca(lambda: pixels(split), dimensions)
    if pca_errors(pca, split)["mse"] < ROUNDING_MSE:
        return None, f"the images have at most {dimensions} degrees of freedom, so it is exact"
    return pca, ""


def pca_errors(pca: geometry.PCA, split) -> dict[str, float]:
    """`mse` and `mae` of PCA's reconstructions, clipped to [0,1]."""
    return reconstruction_errors(
        (pca.decode(pca.encode(images)).clamp(0, 1), images) for images in pixels(split)
    )


def pca_latents(pca: geometry.PCA, data, views: Iterable = ()) -> probes.Latents:
    """The principal components of all splits, in the place of an encoder's latents."""

    def encode(split) -> Tensor:
        return torch.cat([pca.encode(block) for block in pixels(split)])

    splits = (data.train, data.validation, data.test)
    pairs = (tensor for split in splits for tensor in (encode(split), split.labels))
    return probes.Latents(*pairs, views=tuple(encode(view) for view in views))


def probe_predictions(
    latents: probes.Latents, classes: int, probe: nn.Module | None = None
) -> dict[str, Tensor]:
    """What simple classifiers of all training latents predict on test, int64 (N,) each.

    linear (the linear probe), knn and knn_cosine (5 nearest neighbors in Euclidean distance and by
    cosine similarity), class_mean (the nearest class mean by cosine similarity). Of very many test
    images only those of a sample are asked for their neighbors, the others have `NOT_ASKED`.
    `probe` is the linear probe as a layer, where it is fitted already.
    """
    probe = probe or probes.fit_linear(latents, classes).layer()
    known, labels, test = latents.train, latents.train_labels, latents.test
    rows = samples.stratified(latents.test_labels)
    euclidean, cosine = neighbors.predict_both(known, labels, test[rows])
    return {
        "linear": probes.predict(probe, test),
        "knn": at_rows(rows, euclidean, latents.test_labels),
        "knn_cosine": at_rows(rows, cosine, latents.test_labels),
        "class_mean": scores.nearest_class_mean(known, labels, test),
    }


def nearest(references: Tensor, labels: Tensor, queries: Tensor, query_labels: Tensor) -> Tensor:
    """`neighbors.predict` for the sample of the queries, int64 (N,); `NOT_ASKED` for the others."""
    rows = samples.stratified(query_labels)
    return at_rows(rows, neighbors.predict(references, labels, queries[rows]), query_labels)


def at_rows(rows: Tensor, predictions: Tensor, labels: Tensor) -> Tensor:
    """Predictions int64 (R,) at their rows of the labels int64 (N,), `NOT_ASKED` elsewhere."""
    found = torch.full_like(labels, samples.NOT_ASKED)
    found[rows] = predictions
    return found


def accuracy(predictions: Tensor, labels: Tensor) -> samples.Estimate:
    """The fraction of right predictions int64 (N,), without those that were `NOT_ASKED`."""
    asked = predictions != samples.NOT_ASKED
    hits = (predictions == labels)[asked].float()
    return samples.estimate(hits, labels[asked], len(labels))


def latent_metrics(
    latents: probes.Latents,
    predictions: Mapping[str, Tensor],
    accuracy_prefix: str,
    shape_prefix: str,
) -> dict[str, float]:
    """Accuracies of `probe_predictions` on the test latents, and what needs no classifier.

    …/linear_accuracy and so on under the first prefix; under the second …/recall_at_1,
    …/mean_average_precision, …/nmi, …/ari and the geometry: …/silhouette, …/class_separation,
    …/alignment, …/uniformity, …/effective_rank. Beside what was measured on a sample stand its
    standard error and the number of images (`samples.Estimate.named`).
    """
    test, labels = latents.test, latents.test_labels
    accuracies = {}
    for name, found in predictions.items():
        accuracies |= accuracy(found, labels).named(f"{accuracy_prefix}/{name}_accuracy")
    found = scores.retrieval(test, labels) | scores.clustering(test, labels)
    found = {f"{shape_prefix}/{name}": value for name, value in found.items()}
    return accuracies | found | geometry.shape(test, labels, shape_prefix)


def pca_metrics(
    pca: geometry.PCA, data, views: Iterable, classifier: nn.Module, kwargs: Mapping[str, float]
) -> dict[str, float]:
    """All metrics of an autoencoder, of PCA of the same size: `pca/…`.

    `classifier` is an untrained one; it is trained on the same `views` of the training images with
    the same `kwargs` of `probes.train_classifier`.
    """
    latents = pca_latents(pca, data, views)
    for _ in probes.train_classifier(classifier, latents, **kwargs):
        pass
    predictions = probes.predict(classifier, latents.test)
    metrics = {f"pca/{name}": value for name, value in pca_errors(pca, data.test).items()}
    metrics["pca/accuracy"] = probes.accuracy(predictions, latents.test_labels)
    probed = probe_predictions(latents, len(data.class_names))
    return metrics | latent_metrics(latents, probed, "pca", "pca")


def pca_latent_metrics(data, dimensions: int) -> dict[str, float]:
    """The metrics of `latent_metrics` of PCA with so many dimensions, as `pca/…`; none if exact."""
    pca, why_not = fit_pca(data.pretrain, dimensions)
    if pca is None:
        say(f"PCA-{dimensions} is left out: {why_not}")
        return {}
    latents = pca_latents(pca, data)
    return latent_metrics(latents, probe_predictions(latents, len(data.class_names)), "pca", "pca")


def pixels_too_large(data) -> str:
    """Why metrics on the raw pixels are left out, empty if they are not."""
    size = 4 * max(len(data.train), len(data.test)) * data.train.source[0].numel()
    return f"as floats the pixels fill {size / 2**30:.1f} GiB" if size > LARGEST_PIXEL_SPACE else ""


def image_metrics(data) -> dict[str, float]:
    """The metrics of the latent space on the raw pixels of the test images, as `image/…`."""
    if why_not := pixels_too_large(data):
        say(f"image/… is left out: {why_not}")
        return {}
    train, test = torch.cat(list(pixels(data.train))), torch.cat(list(pixels(data.test)))
    labels = data.test.labels
    found = nearest(train, data.train.labels, test, labels)
    knn = accuracy(found, labels).named("image/knn_accuracy")
    return knn | geometry.shape(test, labels, "image")


@dataclass(frozen=True)
class Measured:
    """What `measure` found.

    Attributes:
        metrics: the final ones, by name.
        probabilities: float32 (N,K), of the classifier, of the test images or, where those stay
            unseen, of the validation images.
        predictions: int64 (N,) of the test images by the classifier ("predictions"), and
            "linear_predictions" and so on of `probe_predictions`, some of them `NOT_ASKED`.
    """

    metrics: dict[str, float]
    probabilities: Tensor
    predictions: dict[str, Tensor]


def measure(
    latents: probes.Latents, classifier: nn.Module, images, probe: nn.Module | None = None
) -> Measured:
    """Final metrics of a classifier and the latents it reads, on all splits of a data set.

    val/accuracy; unless the test images stay unseen also those of `scores.classification` and
    `scores.calibration_error` as test/…, those of `latent_metrics` and those of `image_metrics`.
    `probe` as in `probe_predictions`.
    """
    probabilities = probes.probabilities(classifier, latents.validation)
    accuracy = probes.accuracy(probabilities.argmax(1), latents.validation_labels)
    metrics = {"val/accuracy": accuracy}
    if latents.test is None:
        return Measured(metrics, probabilities, {})
    probabilities = probes.probabilities(classifier, latents.test)
    predictions = {"predictions": probabilities.argmax(1)}
    found = scores.classification(latents.test_labels, predictions["predictions"])
    found["calibration_error"] = scores.calibration_error(latents.test_labels, probabilities)
    metrics |= {f"test/{name}": value for name, value in found.items()}
    probed = probe_predictions(latents, len(images.class_names), probe)
    metrics |= latent_metrics(latents, probed, "test", "latent") | image_metrics(images)
    predictions |= {f"{name}_predictions": found for name, found in probed.items()}
    return Measured(metrics, probabilities, predictions)


def save_latents(
    path: Path,
    latents: probes.Latents,
    predictions: Mapping[str, Tensor],
    class_names: Sequence[str],
    **further: Tensor,
) -> None:
    """Write the test images' latents float32 (N,D), labels and predictions int64 (N,) as one .npz.

    A label is an index into `class_names`, which are written, too. `further` are arrays that only
    some methods have, such as projections float32 (N,P).
    """
    arrays = {"latents": latents.test, "labels": latents.test_labels, **predictions, **further}
    file = io.BytesIO()
    numpy = {name: tensor.cpu().numpy() for name, tensor in arrays.items()}
    np.savez(file, **numpy, class_names=np.array(class_names))
    write(path, file.getvalue())
