"""What do we report of finished latents?   probes + geometry + plots, the same for every method

The scripts hand over arrays; every figure comes back under the name that all scripts share.
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

from common import geometry, neighbours, plots, probes
from common.files import write
from common.memory import images_at_once

# The variance of rounding to 8 bits, images in [0,1]: an error below it is none.
ROUNDING_MSE = 1 / (12 * 255**2)
LARGEST_PIXEL_SPACE = 2**31  # bytes of flattened training images that are still searched
LARGEST_PCA = 16_384  # pixels; the covariance of more fills gigabytes


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """In eval mode and without gradients: batch norm uses its statistics and leaves them alone."""
    was_training = module.training
    module.eval()
    with torch.no_grad():
        yield
    module.train(was_training)


def encode(encoder: nn.Module, preprocess: nn.Module, split) -> Tensor:
    """Latents float32 (N,D) of a split's images, in its order; the encoder in eval mode."""
    with evaluating(encoder):
        return torch.cat([encoder(preprocess(images)).float() for images in image_blocks(split)])


def image_blocks(split) -> Iterator[Tensor]:
    """The images of a split, uint8 (B,C,S,S) at a time."""
    count = images_at_once(split.source.shape[-1])
    for start in range(0, len(split), count):
        yield split.images(slice(start, start + count))


def pixels(split) -> Iterator[Tensor]:
    """The images of a split flattened, float32 (B,C·S·S) in [0,1] at a time."""
    for images in image_blocks(split):
        yield images.flatten(1) / 255


def encode_splits(
    encoder: nn.Module, preprocess: nn.Module, data, with_test: bool, views: Iterable = ()
) -> probes.Latents:
    """Latents of all splits of a data set, and of further `views` of its training split."""
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
    """Share of the query images whose nearest references have their label."""
    known, asked = (encode(encoder, preprocess, split) for split in (references, queries))
    nearest = neighbours.predict(known, references.labels, asked)
    return probes.accuracy(nearest, queries.labels)


def reconstruction_errors(sums: Iterator[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """`mse` and `mae` over pairs of blocks (reconstructions, images), both in [0,1], all pixels."""
    squared = absolute = count = 0.0
    for reconstructions, images in sums:
        squared += F.mse_loss(reconstructions, images, reduction="sum").item()
        absolute += F.l1_loss(reconstructions, images, reduction="sum").item()
        count += images.numel()
    return {"mse": squared / count, "mae": absolute / count}


def reconstruct(autoencoder: nn.Module, preprocess: nn.Module, images: Tensor) -> Tensor:
    """Reconstructions (B,C,S,S) of uint8 images, in [0,1], in eval mode."""
    with evaluating(autoencoder):
        # not autoencoder(…): Accelerate makes that one run in mixed precision
        return preprocess.invert(autoencoder.decoder(autoencoder.encoder(preprocess(images))))


def autoencoder_errors(
    autoencoder: nn.Module, preprocess: nn.Module, split, prefix: str
) -> dict[str, float]:
    """PREFIX/mse and PREFIX/mae of an autoencoder's reconstructions, clipped to [0,1]."""
    errors = reconstruction_errors(
        (reconstruct(autoencoder, preprocess, images), images / 255)
        for images in image_blocks(split)
    )
    return {f"{prefix}/{name}": value for name, value in errors.items()}


def fit_pca(split, dimensions: int) -> tuple[geometry.PCA | None, str]:
    """PCA of the training images to as many dimensions as the latents have, or why there is none.

    Its reconstruction is the best that any linear code of that size reaches.
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
    """The linear code of all splits, in the place of an encoder's latents."""
    splits = (data.train, data.validation, data.test)
    codes, further = (
        [torch.cat([pca.encode(block) for block in pixels(split)]) for split in group]
        for group in (splits, views)
    )
    pairs = zip(codes, (split.labels for split in splits), strict=True)
    return probes.Latents(*(tensor for pair in pairs for tensor in pair), tuple(further))


def latent_metrics(
    latents: probes.Latents, classes: int, accuracy_prefix: str, shape_prefix: str
) -> dict[str, float]:
    """What the test latents are good for, and their shape, each under its prefix.

    …/knn_accuracy and …/linear_accuracy, learned from all training latents; …/silhouette,
    …/class_separation, …/alignment, …/uniformity and …/effective_rank.
    """
    linear = probes.fit_linear(latents, classes).predict(latents.test)
    nearest = neighbours.predict(latents.train, latents.train_labels, latents.test)
    return {
        f"{accuracy_prefix}/knn_accuracy": probes.accuracy(nearest, latents.test_labels),
        f"{accuracy_prefix}/linear_accuracy": probes.accuracy(linear, latents.test_labels),
    } | geometry.shape(latents.test, latents.test_labels, shape_prefix)


def pca_metrics(
    pca: geometry.PCA, data, views: Iterable, classifier: nn.Module, recipe: Mapping[str, float]
) -> dict[str, float]:
    """All that is measured of an autoencoder, measured of the linear code of its size: `pca/…`.

    `classifier` is a fresh one, which is trained on the same `views` of the training images by the
    same `recipe`, the keyword arguments of `probes.train_classifier`.
    """
    codes = pca_latents(pca, data, views)
    for _ in probes.train_classifier(classifier, codes, **recipe):
        pass
    predictions = probes.predict(classifier, codes.test)
    metrics = {f"pca/{name}": value for name, value in pca_errors(pca, data.test).items()}
    metrics["pca/accuracy"] = probes.accuracy(predictions, codes.test_labels)
    return metrics | latent_metrics(codes, int(codes.train_labels.max()) + 1, "pca", "pca")


def pixels_too_large(data) -> str:
    """Why the pixels of all images are no space to search, empty if they are one."""
    size = 4 * max(len(data.train), len(data.test)) * data.train.source[0].numel()
    return f"as floats the pixels fill {size / 2**30:.1f} GiB" if size > LARGEST_PIXEL_SPACE else ""


def image_metrics(data) -> dict[str, float]:
    """The yardsticks of the latent space on the raw pixels of the test images, as `image/…`."""
    if why_not := pixels_too_large(data):
        print(f"image/… is left out: {why_not}")
        return {}
    train, test = torch.cat(list(pixels(data.train))), torch.cat(list(pixels(data.test)))
    nearest = neighbours.predict(train, data.train.labels, test)
    knn = {"image/knn_accuracy": probes.accuracy(nearest, data.test.labels)}
    return knn | geometry.shape(test, data.test.labels, "image")


Picture = tuple[str, Figure, str]  # name of its file, figure, caption


def autoencoder_pictures(
    autoencoder: nn.Module, preprocess: nn.Module, split, class_names: Sequence[str]
) -> Iterator[Picture]:
    """Five images above their reconstructions, and ten steps between two of different classes."""
    five = split.sample(5)
    originals = five.images(slice(None))
    decoded = reconstruct(autoencoder, preprocess, originals)
    names = [class_names[label] for label in five.labels.tolist()]
    figure = plots.reconstructions(originals.cpu().numpy(), decoded.cpu().numpy(), names)
    yield "reconstructions", figure, "Images that were not trained on, and what came back"

    other = next((n for n, name in enumerate(names) if name != names[0]), -1)
    ends = originals[[0, other]]
    with evaluating(autoencoder):
        first, last = autoencoder.encoder(preprocess(ends))
        weights = torch.linspace(0, 1, 10, device=first.device)[:, None]
        frames = preprocess.invert(autoencoder.decoder(torch.lerp(first, last, weights)))
    figure = plots.interpolation(frames.cpu().numpy(), names[0], names[other], ends.cpu().numpy())
    yield "interpolation", figure, "Decoded on the straight line between two latents"


def latent_pictures(
    networks: tuple[nn.Module, nn.Module, nn.Module],
    split,
    predictions: Tensor,
    class_names: Sequence[str],
    tsne_images: int,
    metrics: Mapping[str, float],
) -> Iterator[Picture]:
    """Confusion matrix of all images, t-SNE of `tsne_images` of them in latent and image space.

    `networks` are encoder, classifier and preprocessing, `predictions` int64 (N,) what they make of
    the split's images. Under each t-SNE stands what its space
    reached, where `metrics` (the final ones) have it. Which images and which random start are the
    same in every run, so that pictures of two runs can be laid side by side.
    """
    encoder, classifier, preprocess = networks
    figure = plots.confusion(split.labels.cpu().numpy(), predictions.cpu().numpy(), class_names)
    yield "confusion_matrix", figure, "The classifier on the frozen encoder, images not trained on"

    part = split.sample(min(tsne_images, LARGEST_PIXEL_SPACE // (4 * split.source[0].numel())))
    latents = encode(encoder, preprocess, part)
    labels, predicted = part.labels.cpu().numpy(), probes.predict(classifier, latents).cpu().numpy()
    panels = []
    for title, space, groups in (
        ("latent space", latents, ("test", "latent")),
        ("image space", torch.cat(list(pixels(part))), ("image", "image")),
    ):
        knn, silhouette = f"{groups[0]}/knn_accuracy", f"{groups[1]}/silhouette"
        known = knn in metrics and silhouette in metrics
        note = f"kNN {metrics[knn]:.1%}   silhouette {metrics[silhouette]:.2f}" if known else ""
        panels.append(plots.Embedding(geometry.tsne(space, seed=0), title, note))
    caption = "t-SNE of images not trained on; rings: mistakes of the classifier; gaps mean nothing"
    chosen = {"tsne_latent": panels[:1], "tsne_image": panels[1:], "tsne": panels}
    for name, shown in chosen.items():
        yield name, plots.embeddings(shown, labels, class_names, predicted), caption


def curves_picture(rows: Sequence[Mapping[str, float]], metrics: Mapping[str, float]) -> Picture:
    """The course of training from the rows of metrics.jsonl; what a method lacks is left out."""
    last = {name: value for row in rows for name, value in row.items()} | dict(metrics)

    def lines(**names: str) -> dict[str, float]:
        return {label: last[name] for label, name in names.items() if name in last}

    loss_lines = lines(floor="train/loss_floor", collapse="train/loss_collapse")
    pca_mse, pca_accuracy = lines(PCA="val/pca_mse"), lines(PCA="pca/accuracy")
    panels = (
        plots.Curve("loss", ("train/loss",), loss_lines),
        plots.Curve("reconstruction MSE", ("val/mse",), pca_mse, logarithmic=True),
        plots.Curve("parts of the loss", ("train/cross_entropy", "train/probability_mae")),
        plots.Curve("kNN accuracy", ("val/knn_accuracy",), percent=True),
        plots.Curve("learning rate", ("train/learning_rate",)),
        plots.Curve("classifier loss", ("train/classifier_loss", "val/classifier_loss")),
        plots.Curve("accuracy", ("train/accuracy", "val/accuracy"), pca_accuracy, percent=True),
    )
    courses = [p for p in panels if any(sum(key in row for row in rows) > 1 for key in p.keys)]
    return "curves", plots.curves(rows, courses or panels), "The course of training"


def save_latents(
    path: Path,
    latents: Tensor,
    labels: Tensor,
    predictions: Tensor,
    projections: Tensor | None = None,
) -> None:
    """Write latents float32 (N,D), labels int64 (N,) and predictions int64 (N,) as one .npz."""
    arrays = {"latents": latents, "labels": labels, "predictions": predictions}
    arrays |= {} if projections is None else {"projections": projections}
    file = io.BytesIO()
    np.savez(file, **{name: tensor.cpu().numpy() for name, tensor in arrays.items()})
    write(path, file.getvalue())


def summary(
    rows: Sequence[Mapping[str, float]], metrics: Mapping[str, float], best: Mapping[str, float]
) -> dict[str, float]:
    """The last value of each metric in `rows`, over it the final ones, and `best` as best/NAME."""
    last = {name: value for row in rows for name, value in row.items() if "/" in name}
    return last | dict(metrics) | {f"best/{name}": value for name, value in best.items()}
