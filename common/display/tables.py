"""Tables: final metrics, comparison of runs, predictions and embeddings of single images.

Arrays in, rows out; nothing is logged here. A cell that is an image is uint8 (C,S,S).
"""

import csv
import io
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

PREDICTIONS = 200  # images in the table of predictions
EMBEDDINGS = 1000  # images in the table of embeddings, fewer if it would be too large
LONGEST_TABLE = 20  # classes whose number of images is told
LARGEST_EMBEDDINGS = 2**18  # numbers in that table
LARGEST_SIDE = 128  # pixels of an image in a table; larger ones are scaled down

FINAL = (
    ("accuracy", "accuracy, trained classifier", "{:.2%}"),
    ("linear_accuracy", "accuracy, linear", "{:.2%}"),
    ("knn_accuracy", "accuracy, 5 nearest neighbors", "{:.2%}"),
    ("class_mean_accuracy", "accuracy, nearest class mean", "{:.2%}"),
    ("recall_at_1", "retrieval, recall at 1", "{:.2%}"),
    ("mean_average_precision", "retrieval, mean average precision", "{:.2%}"),
    ("nmi", "k-means and the classes, NMI", "{:.3f}"),
    ("mse", "reconstruction MSE", "{:.5f}"),
    ("mae", "reconstruction MAE", "{:.5f}"),
    ("silhouette", "silhouette", "{:.3f}"),
    ("class_separation", "class separation, between/within", "{:.3f}"),
    ("alignment", "alignment (lower: tighter classes)", "{:.3f}"),
    ("uniformity", "uniformity (lower: more even)", "{:.3f}"),
    ("effective_rank", "effective rank", "{:.1f}"),
)
_FINAL = {key: (text, form) for key, text, form in FINAL}
UP, DOWN, NEITHER = 1, -1, 0  # higher is better, lower is better, neither
# Title of a section and its metrics: key (or prefix of several), text, format, direction.
# {} is the rest of the key: the number of labels, the severity of a corruption.
COMPARED = (
    ("classification", (
        ("accuracy", *_FINAL["accuracy"], UP),
        ("linear_accuracy", *_FINAL["linear_accuracy"], UP),
        ("knn_1", "accuracy, nearest neighbor", "{:.2%}", UP),
        ("knn_accuracy", *_FINAL["knn_accuracy"], UP),
        ("knn_20", "accuracy, 20 nearest neighbors", "{:.2%}", UP),
        ("knn_100", "accuracy, 100 nearest neighbors", "{:.2%}", UP),
    )),
    ("linear accuracy from few labels", (
        ("labels_", "{} labels per class", "{:.2%}", UP),
    )),
    ("accuracy on corrupted images (not trained on)", (
        ("noise_", "Gaussian noise of {}", "{:.2%}", UP),
        ("shift_", "shift by {} px", "{:.2%}", UP),
    )),
    ("reconstruction", (
        ("mse", *_FINAL["mse"], DOWN),
        ("mae", *_FINAL["mae"], DOWN),
    )),
    ("geometry of the space", (
        ("dimensions", "dimensions", "{:,.0f}", NEITHER),
        ("silhouette", *_FINAL["silhouette"], UP),
        ("class_separation", *_FINAL["class_separation"], UP),
        ("alignment", *_FINAL["alignment"], NEITHER),  # a space of one point would be best
        ("uniformity", *_FINAL["uniformity"], NEITHER),
        ("effective_rank", *_FINAL["effective_rank"], NEITHER),
        ("trustworthiness", "trustworthiness of the t-SNE map", "{:.3f}", NEITHER),
    )),
    ("cost", (
        ("parameters", "parameters trained", "{:,.0f}", NEITHER),
        ("train_images", "training images", "{:,.0f}", NEITHER),
        ("training_seconds", "seconds of training", "{:,.0f}", DOWN),
        ("images_per_second", "images per second, training", "{:,.0f}", UP),
        ("encoded_per_second", "images per second, encoding (here)", "{:,.0f}", UP),
        ("peak_gib", "peak memory, GiB", "{:.2f}", DOWN),
    )),
)  # fmt: skip
Table = tuple[str, list[str], list[list]]  # its name, the names of its columns, its rows


def final(metrics: Mapping[str, float]) -> str:
    """The final metrics as text: one row per metric, columns for latents and baselines.

    What was measured on a sample of the images stands with its standard error and their number.
    """
    columns = {"latents": ("test", "latent"), "PCA": ("pca",), "pixels": ("image",)}
    rows = []
    for key, text, form in FINAL:
        cells = []
        for groups in columns.values():
            name = next((f"{g}/{key}" for g in groups if f"{g}/{key}" in metrics), None)
            cells.append("–" if name is None else form.format(metrics[name]))
            if f"{name}_standard_error" in metrics:
                cells[-1] += f" ± {form.format(metrics[f'{name}_standard_error'])}"
                text = text.split("; ")[0] + f"; {metrics[f'{name}_images']:,} images"
        if set(cells) != {"–"}:
            rows.append((text, *cells))
    first = max([36, *(len(text) + 1 for text, *_ in rows)])
    width = max([10, *(len(cell) + 2 for _, *cells in rows for cell in cells)])
    lines = [
        f"{text:{first}}" + "".join(f"{cell:>{width}}" for cell in cells)
        for text, *cells in [("on the test images", *columns), *rows]
    ]
    if any("±" in line for line in lines):
        lines.append("\n± standard error of a stratified sample of so many of the test images")
    return "\n".join(lines) if rows else "no test images were evaluated"


@dataclass(frozen=True)
class Row:
    """A metric, its cells and the indices of the best ones; the title of a section has no cells."""

    text: str
    cells: tuple[str, ...] = ()
    best: frozenset[int] = frozenset()


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation, which is 0 for a single value or equal ones."""
    if len(set(values)) == 1:
        return values[0], 0.0
    if not all(map(math.isfinite, values)):
        return math.nan, 0.0
    return statistics.fmean(values), statistics.stdev(values)


def means_and_stds(
    runs: Sequence[Mapping[str, float]],
) -> tuple[dict[str, float], dict[str, float]]:
    """Mean and standard deviation of each metric over the runs that have it."""
    keys = dict.fromkeys(key for run in runs for key in run)
    pairs = {key: mean_and_std([run[key] for run in runs if key in run]) for key in keys}
    return {k: pair[0] for k, pair in pairs.items()}, {k: pair[1] for k, pair in pairs.items()}


def side_by_side(columns: Mapping[str, Sequence[Mapping[str, float]]]) -> list[Row]:
    """One row per metric, one cell per space: mean ± standard deviation over its runs.

    `columns` are the spaces by name, each with the metrics of one or several runs, under the keys
    of `COMPARED`. The first row is the header. Rows without values are left out.
    """
    names = (
        name + (f" (n={len(runs)})" if len(runs) > 1 else "") for name, runs in columns.items()
    )
    rows = [Row("on the test images", tuple(names))]
    for title, metrics in COMPARED:
        section = []
        for key, text, form, direction in metrics:
            for full in _keys_of(key, columns):
                by_space = [[run[full] for run in runs if full in run] for runs in columns.values()]
                pairs = [mean_and_std(values) if values else None for values in by_space]
                cells = tuple("–" if pair is None else _cell(form, *pair) for pair in pairs)
                values = [direction * p[0] for p in pairs if p is not None and not math.isnan(p[0])]
                best = {
                    n
                    for n, cell in enumerate(pairs)
                    if direction and len(values) > 1 and cell and direction * cell[0] == max(values)
                }
                label = text.format(full.removeprefix(key))
                section.append(Row(label, cells, frozenset(best)))
        rows += [Row(title), *section] if section else []
    return rows


def _keys_of(key: str, columns: Mapping[str, Sequence[Mapping[str, float]]]) -> list[str]:
    """The keys that occur: `key` itself, or if it ends in _ all with a number behind it."""
    names = {name for runs in columns.values() for run in runs for name in run}
    if not key.endswith("_"):
        return [key] if key in names else []
    numbered = [n for n in names if n.startswith(key) and n[len(key) :].replace(".", "").isdigit()]
    return sorted(numbered, key=lambda name: float(name[len(key) :]))


def _cell(form: str, mean: float, std: float) -> str:
    return form.format(mean) + (f" ± {form.format(std)}" if std else "")


def as_text(rows: Sequence[Row]) -> str:
    """The table as aligned text, the best of each row with a star."""
    marked = [
        [row.text, *(f"{c}{'*' if n in row.best else ' '}" for n, c in enumerate(row.cells))]
        for row in rows
    ]
    widths = [max(len(row[n]) for row in marked if len(row) > 1) for n in range(len(marked[0]))]
    lines = [
        row[0].ljust(widths[0])
        + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=False))
        if len(row) > 1
        else f"\n{row[0]}"
        for row in marked
    ]
    note = "\n\n* best of its row" if any(row.best for row in rows) else ""
    return "\n".join(line.rstrip() for line in lines) + note


def as_markdown(rows: Sequence[Row]) -> str:
    """The table as GitHub Markdown, the best of each row and the titles of sections in bold."""
    header, *others = rows
    lines = [[header.text, *header.cells], ["---"] + ["---:"] * len(header.cells)]
    for row in others:
        cells = [f"**{c}**" if n in row.best else c for n, c in enumerate(row.cells)]
        lines.append(
            [row.text, *cells] if cells else [f"**{row.text}**", *[""] * len(header.cells)]
        )
    return "".join(f"| {' | '.join(c.replace('|', '/') for c in line)} |\n" for line in lines)


def as_csv(columns: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """One line per space and metric with all digits: space, metric, mean, std, n."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["space", "metric", "mean", "std", "n"])
    for name, runs in columns.items():
        for key in dict.fromkeys(key for run in runs for key in run):
            values = [run[key] for run in runs if key in run]
            writer.writerow([name, key, *mean_and_std(values), len(values)])
    return file.getvalue()


def of_images(
    split, latents: Tensor, probabilities: Tensor, class_names: Sequence[str]
) -> Iterator[Table]:
    """The tables `predictions` and `embeddings` of the images of a split.

    `latents` (N,D) and `probabilities` (N,K) are those of the split's N images in its order.
    """
    confidence, predicted = probabilities.max(dim=1)
    yield predictions(split, predicted, confidence, class_names)
    yield embeddings(split, latents, predicted, class_names)


def predictions(split, predicted: Tensor, confidence: Tensor, class_names: Sequence[str]) -> Table:
    """The most confident mistakes first, then the least confident correct predictions.

    `predicted` int64 (N,), `confidence` (N,) in [0,1], of the split's N images in its order.
    """
    is_right = predicted == split.labels
    # one sort key: mistakes by falling confidence, then correct ones by rising confidence
    order = torch.where(is_right, 1 + confidence, -confidence).argsort(stable=True)[:PREDICTIONS]
    columns = ["image", "label", "prediction", "confidence", "is_right"]
    rows = _first_cells(split, order, predicted, class_names)
    for row, probability, right in zip(
        rows, confidence[order].tolist(), is_right[order].tolist(), strict=True
    ):
        row += [round(probability, 4), right]
    return "predictions", columns, rows


def embeddings(split, latents: Tensor, predicted: Tensor, class_names: Sequence[str]) -> Table:
    """Images with their latents, one column per dimension, for W&B's 2D projection.

    Images are taken at equal distances from the split. `latents` (N,D), `predicted` int64 (N,).
    """
    count = min(len(latents), EMBEDDINGS, max(2, LARGEST_EMBEDDINGS // latents.shape[1]))
    chosen = torch.linspace(0, len(latents) - 1, count).long().to(latents.device)
    columns = ["image", "label", "prediction", *(f"d{n:03}" for n in range(latents.shape[1]))]
    rows = _first_cells(split, chosen, predicted, class_names)
    for row, latent in zip(rows, latents[chosen].tolist(), strict=True):
        row += [float(f"{x:.5g}") for x in latent]
    return "embeddings", columns, rows


def _first_cells(split, chosen: Tensor, predicted: Tensor, class_names: Sequence[str]) -> list:
    """Image, label and prediction of the chosen images."""
    images, labels = split.thumbnails(chosen, LARGEST_SIDE), split.labels[chosen].tolist()
    triples = zip(images, labels, predicted[chosen].tolist(), strict=True)
    return [[image, class_names[label], class_names[guess]] for image, label, guess in triples]


def class_counts(predictions: np.ndarray, confidences: np.ndarray, class_names: np.ndarray) -> str:
    """Number of images per predicted class, most frequent first, as text."""
    counts = np.bincount(predictions, minlength=len(class_names))
    sums = np.bincount(predictions, confidences, minlength=len(class_names))
    order = [label for label in np.argsort(-counts, kind="stable") if counts[label]]
    width = max(20, *(len(class_names[label]) for label in order[:LONGEST_TABLE]))
    lines = [f"{'predicted class':{width}}{'images':>10}{'share':>10}{'confidence':>12}"]
    for label in order[:LONGEST_TABLE]:
        count = counts[label]
        shares = f"{count:>10,}{count / len(predictions):>10.1%}{sums[label] / count:>12.1%}"
        lines.append(f"{class_names[label]:{width}}{shares}")
    if rest := order[LONGEST_TABLE:]:
        lines.append(f"{f'{len(rest)} other classes':{width}}{counts[rest].sum():>10,}")
    return "\n".join(lines)
