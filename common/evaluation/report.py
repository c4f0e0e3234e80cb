"""Evaluation shared by all training scripts: metrics and figures of latents and reconstructions.

Metrics are returned under the same names for every method.
"""

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from common.display import plots, tables
from common.evaluation import geometry, neighbors, probes
from common.files import write

ROUNDING_MSE = 1 / (12 * 255**2)  # variance of rounding to 8 bits, images in [0,1]
LARGEST_PIXEL_SPACE = 2**31  # bytes of flattened training images for kNN on pixels
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
    """Latents float32 (N,D) of a split's images, in its order; the encoder in eval mode."""
    with evaluating(encoder):
        return torch.cat([encoder(preprocess(images)).float() for images in split.blocks()])


def pixels(split) -> Iterator[Tensor]:
    """The images of a split flattened, float32 (B,C·S·S) in [0,1] at a time."""
    for images in split.blocks():
        yield images.flatten(1) / 255


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


def knn_accuracy(encoder: nn.Module, preprocess: nn.Module, references, queries) -> float:
    """k-nearest-neighbor accuracy on the query images."""
    latents = encode(encoder, preprocess, references)
    predictions = neighbors.predict(
        latents, references.labels, encode(encoder, preprocess, queries)
    )
    return probes.accuracy(predictions, queries.labels)


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


def latent_metrics(
    latents: probes.Latents, classes: int, accuracy_prefix: str, shape_prefix: str
) -> dict[str, float]:
    """kNN and linear accuracy on the test latents, and their geometry, each under its prefix.

    …/knn_accuracy and …/linear_accuracy, fitted to all training latents; …/silhouette,
    …/class_separation, …/alignment, …/uniformity and …/effective_rank.
    """
    linear = probes.fit_linear(latents, classes).predict(latents.test)
    nearest = neighbors.predict(latents.train, latents.train_labels, latents.test)
    return {
        f"{accuracy_prefix}/knn_accuracy": probes.accuracy(nearest, latents.test_labels),
        f"{accuracy_prefix}/linear_accuracy": probes.accuracy(linear, latents.test_labels),
    } | geometry.shape(latents.test, latents.test_labels, shape_prefix)


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
    return metrics | latent_metrics(latents, int(latents.train_labels.max()) + 1, "pca", "pca")


def pca_latent_metrics(data, dimensions: int) -> dict[str, float]:
    """The metrics of `latent_metrics` of PCA with so many dimensions, as `pca/…`; none if exact."""
    pca, why_not = fit_pca(data.train, dimensions)
    if pca is None:
        print(f"PCA-{dimensions} is left out: {why_not}")
        return {}
    return latent_metrics(pca_latents(pca, data), len(data.class_names), "pca", "pca")


def pixels_too_large(data) -> str:
    """Why metrics on the raw pixels are left out, empty if they are not."""
    size = 4 * max(len(data.train), len(data.test)) * data.train.source[0].numel()
    return f"as floats the pixels fill {size / 2**30:.1f} GiB" if size > LARGEST_PIXEL_SPACE else ""


def image_metrics(data) -> dict[str, float]:
    """The metrics of the latent space on the raw pixels of the test images, as `image/…`."""
    if why_not := pixels_too_large(data):
        print(f"image/… is left out: {why_not}")
        return {}
    train, test = torch.cat(list(pixels(data.train))), torch.cat(list(pixels(data.test)))
    nearest = neighbors.predict(train, data.train.labels, test)
    knn = {"image/knn_accuracy": probes.accuracy(nearest, data.test.labels)}
    return knn | geometry.shape(test, data.test.labels, "image")


Picture = tuple[str, Figure, str]  # name of its file, figure, caption


def autoencoder_pictures(
    autoencoder: nn.Module, preprocess: nn.Module, split, class_names: Sequence[str]
) -> Iterator[Picture]:
    """Five images with their reconstructions, and an interpolation between two classes."""
    five = split.sample(5)
    originals = five.images(slice(None))
    decoded = reconstruct(autoencoder, preprocess, originals)
    names = [class_names[label] for label in five.labels.tolist()]
    figure = plots.reconstructions(originals.cpu().numpy(), decoded.cpu().numpy(), names)
    yield "reconstructions", figure, "Held-out images and their reconstructions"

    other = next((n for n, name in enumerate(names) if name != names[0]), -1)
    ends = originals[[0, other]]
    with evaluating(autoencoder):
        first, last = autoencoder.encoder(preprocess(ends))
        weights = torch.linspace(0, 1, 10, device=first.device)[:, None]
        frames = preprocess.invert(autoencoder.decoder(torch.lerp(first, last, weights)))
    figure = plots.interpolation(frames.cpu().numpy(), names[0], names[other], ends.cpu().numpy())
    yield "interpolation", figure, "Decoded latents on the straight line between two images"


def latent_pictures(
    networks: tuple[nn.Module, nn.Module, nn.Module],
    split,
    predictions: Tensor,
    class_names: Sequence[str],
    tsne_images: int,
    metrics: Mapping[str, float],
) -> Iterator[Picture]:
    """Confusion matrix of all images, t-SNE of `tsne_images` of them in latent and image space.

    `networks` are encoder, classifier and preprocessing, `predictions` int64 (N,) those of the
    split's images. Each t-SNE is captioned with kNN accuracy and silhouette of its space, where the
    final `metrics` have them. Images and seed are the same in every run, so that runs can be
    compared.
    """
    encoder, classifier, preprocess = networks
    figure = plots.confusion(split.labels.cpu().numpy(), predictions.cpu().numpy(), class_names)
    yield "confusion_matrix", figure, "The classifier on the frozen encoder, held-out images"

    part = split.sample(min(tsne_images, LARGEST_PIXEL_SPACE // (4 * split.source[0].numel())))
    latents = encode(encoder, preprocess, part)
    labels, predicted = part.labels.cpu().numpy(), probes.predict(classifier, latents).cpu().numpy()
    panels = []
    for title, space, groups in (
        ("latent space", latents, ("test", "latent")),
        ("image space", torch.cat(list(pixels(part))), ("image", "image")),
    ):
        knn, silhouette = f"{groups[0]}/knn_accuracy", f"{groups[1]}/silhouette"
        note = ""
        if knn in metrics and silhouette in metrics:
            note = f"kNN {metrics[knn]:.1%}   silhouette {metrics[silhouette]:.2f}"
        panels.append(plots.Embedding(geometry.tsne(space, seed=0), title, note))
    caption = "t-SNE of held-out images; rings: classifier errors; gaps mean nothing"
    figures = {"tsne_latent": panels[:1], "tsne_image": panels[1:], "tsne": panels}
    for name, shown in figures.items():
        yield name, plots.embeddings(shown, labels, class_names, predicted), caption


def curves_picture(rows: Sequence[Mapping[str, float]], metrics: Mapping[str, float]) -> Picture:
    """Training curves from the rows of metrics.jsonl; panels without values are left out."""
    last = {name: value for row in rows for name, value in row.items()} | dict(metrics)

    def lines(**names: str) -> dict[str, float]:
        return {label: last[name] for label, name in names.items() if name in last}

    loss_lines = lines(floor="train/loss_floor", collapse="train/loss_collapse")
    pca_mse, pca_accuracy = lines(PCA="val/pca_mse"), lines(PCA="pca/accuracy")
    panels = (
        plots.Curve("loss", ("train/loss",), loss_lines),
        plots.Curve("reconstruction MSE", ("val/mse",), pca_mse, logarithmic=True),
        plots.Curve("terms of the loss", ("train/cross_entropy", "train/probability_mae")),
        plots.Curve("kNN accuracy", ("val/knn_accuracy",), percent=True),
        plots.Curve("learning rate", ("train/learning_rate",)),
        plots.Curve("classifier loss", ("train/classifier_loss", "val/classifier_loss")),
        plots.Curve("accuracy", ("train/accuracy", "val/accuracy"), pca_accuracy, percent=True),
    )
    epochs = {key: {row["epoch"] for row in rows if key in row} for key in last}
    shown = [p for p in panels if any(len(epochs.get(key, ())) > 1 for key in p.keys)]
    return "curves", plots.curves(rows, shown or panels), "Training curves"


def save_latents(
    path: Path, latents: probes.Latents, classifier: nn.Module, projections: Tensor | None = None
) -> None:
    """Write the test images' latents float32 (N,D), labels and predictions int64 (N,) as one .npz.

    `projections` float32 (N,P) go with them, where a method has them.
    """
    predictions = probes.predict(classifier, latents.test)
    arrays = {"latents": latents.test, "labels": latents.test_labels, "predictions": predictions}
    arrays |= {} if projections is None else {"projections": projections}
    file = io.BytesIO()
    np.savez(file, **{name: tensor.cpu().numpy() for name, tensor in arrays.items()})
    write(path, file.getvalue())


def measure(latents: probes.Latents, classifier: nn.Module, images) -> dict[str, float]:
    """Final metrics of a classifier and the latents it reads, on all splits of a data set.

    val/accuracy; unless the test images stay unseen also test/accuracy, those of `latent_metrics`
    and those of `image_metrics`.
    """
    found = probes.predict(classifier, latents.validation)
    metrics = {"val/accuracy": probes.accuracy(found, latents.validation_labels)}
    if latents.test is not None:
        found = probes.predict(classifier, latents.test)
        metrics["test/accuracy"] = probes.accuracy(found, latents.test_labels)
        metrics |= latent_metrics(latents, len(images.class_names), "test", "latent")
        metrics |= image_metrics(images)
    return metrics


def publish(
    session,
    networks: tuple[nn.Module, nn.Module, nn.Module],
    images,
    latents: probes.Latents,
    metrics: Mapping[str, float],
    further: Iterable[Picture] = (),
) -> None:
    """Tables and pictures of the test images, or of the validation images where those stay unseen.

    `networks` are encoder, classifier and preprocessing, `metrics` the final ones, `further`
    pictures of the method's own. The session's tracker writes figures/*.png and sends all to W&B.
    """
    part = "validation" if latents.test is None else "test"
    split, shown = getattr(images, part), getattr(latents, part)
    probabilities = probes.probabilities(networks[1], shown)  # (N,K)
    predictions, names = probabilities.argmax(dim=1), images.class_names
    tracker, step = session.tracker, session.step
    tracker.confusion(split.labels.tolist(), predictions.tolist(), names, step)
    for name, columns, cells in tables.of_images(split, shown, probabilities, names):
        tracker.table(f"tables/{name}", columns, cells, step)
    count = session.config.tsne_images
    pictures = latent_pictures(networks, split, predictions, names, count, metrics)
    for name, figure, caption in (*further, *pictures, curves_picture(session.rows(), metrics)):
        tracker.figure(name, figure, caption, step)
