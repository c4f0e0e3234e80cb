"""Figures and tables of a finished training: what each method shows of its latent space."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from ..display import plots, tables
from . import geometry, probes, report

Picture = tuple[str, Figure, str]  # name of its file, figure, caption


def autoencoder_pictures(
    autoencoder: nn.Module, preprocess: nn.Module, split, class_names: Sequence[str]
) -> Iterator[Picture]:
    """Five images with their reconstructions, and an interpolation between two classes."""
    five = split.sample(5)
    originals = five.images(slice(None))
    decoded = report.reconstruct(autoencoder, preprocess, originals)
    names = [class_names[label] for label in five.labels.tolist()]
    figure = plots.reconstructions(originals.cpu().numpy(), decoded.cpu().numpy(), names)
    yield "reconstructions", figure, "Held-out images and their reconstructions"

    other = next((n for n, name in enumerate(names) if name != names[0]), -1)
    ends = originals[[0, other]]
    with report.evaluating(autoencoder):
        first, last = autoencoder.encoder(preprocess(ends))
        weights = torch.linspace(0, 1, 10, device=first.device)[:, None]
        frames = preprocess.invert(autoencoder.decoder(torch.lerp(first, last, weights)))
    figure = plots.interpolation(frames.cpu().numpy(), names[0], names[other], ends.cpu().numpy())
    yield "interpolation", figure, "Decoded latents on the straight line between two images"


def latent_pictures(
    split,
    latents: Tensor,
    predictions: Tensor,
    class_names: Sequence[str],
    tsne_images: int,
    metrics: Mapping[str, float],
) -> Iterator[Picture]:
    """Confusion matrix of all images, t-SNE of `tsne_images` of them in latent and image space.

    `latents` (N,D) and `predictions` int64 (N,) are those of the split's images. Each t-SNE is
    captioned with kNN accuracy and silhouette of its space, where the final `metrics` have them.
    Images and seed are the same in every run, so that runs can be compared.
    """
    figure = plots.confusion(split.labels.cpu().numpy(), predictions.cpu().numpy(), class_names)
    yield "confusion_matrix", figure, "The classifier's predictions, held-out images"

    most = report.LARGEST_PIXEL_SPACE // (4 * split.source[0].numel())
    part = split.sample(min(tsne_images, most))
    chosen = positions(part, split)
    labels, predicted = part.labels.cpu().numpy(), predictions[chosen].cpu().numpy()
    panels = []
    for title, space, groups in (
        ("latent space", latents[chosen], ("test", "latent")),
        ("image space", torch.cat(list(report.pixels(part))), ("image", "image")),
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


def positions(part, split) -> Tensor:
    """Where the images of a part of a split stand in it, int64 (M,), on the labels' device."""
    places = torch.empty(len(split.source), dtype=torch.long, device=split.rows.device)
    places[split.rows] = torch.arange(len(split), device=split.rows.device)
    return places[part.rows].to(split.labels.device)


def curves_picture(rows: Sequence[Mapping[str, float]], metrics: Mapping[str, float]) -> Picture:
    """Training curves from the rows of metrics.jsonl; panels without values are left out."""
    last = {name: value for row in rows for name, value in row.items()} | dict(metrics)

    def lines(**names: str) -> dict[str, float]:
        return {label: last[name] for label, name in names.items() if name in last}

    loss_lines = lines(floor="train/loss_floor", collapse="train/loss_collapse")
    pca_mse, pca_accuracy = lines(PCA="val/pca_mse"), lines(**{"PCA, test": "pca/accuracy"})
    panels = (
        plots.Curve("loss", ("train/loss",), loss_lines),
        plots.Curve("reconstruction MSE", ("val/mse",), pca_mse, logarithmic=True),
        plots.Curve("terms of the loss", ("train/cross_entropy", "train/probability_mae")),
        plots.Curve("kNN accuracy", ("val/knn_accuracy", "val/knn_cosine_accuracy"), percent=True),
        plots.Curve("learning rate", ("train/learning_rate",)),
        plots.Curve("classifier loss", ("train/classifier_loss", "val/classifier_loss")),
        plots.Curve("accuracy", ("train/accuracy", "val/accuracy"), pca_accuracy, percent=True),
    )
    epochs = {key: {row["epoch"] for row in rows if key in row} for key in last}
    shown = [p for p in panels if any(len(epochs.get(key, ())) > 1 for key in p.keys)]
    return "curves", plots.curves(rows, shown or panels), "Training curves"


def publish(
    session,
    images,
    latents: probes.Latents,
    probabilities: Tensor,
    metrics: Mapping[str, float],
    further: Iterable[Picture] = (),
) -> None:
    """Tables and pictures of the test images, or of the validation images where those stay unseen.

    `probabilities` (N,K) and the final `metrics` are those of `report.measure`, `further` pictures
    of the method's own. The session's tracker writes figures/*.png and sends all to W&B.
    """
    part = "validation" if latents.test is None else "test"
    split, shown = getattr(images, part), getattr(latents, part)
    predictions, names = probabilities.argmax(dim=1), images.class_names
    tracker, step = session.tracker, session.step
    tracker.confusion(split.labels.tolist(), predictions.tolist(), names, step)
    for name, columns, cells in tables.of_images(split, shown, probabilities, names):
        tracker.table(f"tables/{name}", columns, cells, step)
    count = session.config.tsne_images
    pictures = latent_pictures(split, shown, predictions, names, count, metrics)
    for name, figure, caption in (*further, *pictures, curves_picture(session.rows(), metrics)):
        tracker.figure(name, plots.saved(figure), caption, step)
