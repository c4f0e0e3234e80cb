"""Which rows does a person read?   the final table, and what W&B shows image by image

Arrays in, rows out: nothing is logged here. A cell that is an image is uint8 (C,S,S).
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

PREDICTIONS = 200  # images in the table of predictions
EMBEDDINGS = 1000  # images in the table of embeddings, if their numbers are not too many
LARGEST_EMBEDDINGS = 2**18  # numbers in it

FINAL = (
    ("accuracy", "accuracy, trained classifier", "{:.2%}"),
    ("linear_accuracy", "accuracy, linear", "{:.2%}"),
    ("knn_accuracy", "accuracy, 5 nearest neighbours", "{:.2%}"),
    ("mse", "reconstruction MSE", "{:.5f}"),
    ("mae", "reconstruction MAE", "{:.5f}"),
    ("silhouette", "silhouette", "{:.3f}"),
    ("class_separation", "class separation, between/within", "{:.3f}"),
    ("alignment", "alignment (lower: tighter classes)", "{:.3f}"),
    ("uniformity", "uniformity (lower: more even)", "{:.3f}"),
    ("effective_rank", "effective rank", "{:.1f}"),
)
Table = tuple[str, list[str], list[list]]  # its name, the names of its columns, its rows


def final(metrics: Mapping[str, float]) -> str:
    """The final metrics as text: one row per yardstick, the baselines beside the latents."""
    columns = {"latents": ("test", "latent"), "PCA": ("pca",), "pixels": ("image",)}
    lines = [f"{'on the test images':36}" + "".join(f"{name:>10}" for name in columns)]
    for key, text, form in FINAL:
        cells = []
        for groups in columns.values():
            found = [metrics[f"{g}/{key}"] for g in groups if f"{g}/{key}" in metrics]
            cells.append(form.format(found[0]) if found else "–")
        if set(cells) != {"–"}:
            lines.append(f"{text:36}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines) if len(lines) > 1 else "no test images were looked at"


def of_images(
    split, latents: Tensor, probabilities: Tensor, class_names: Sequence[str]
) -> Iterator[Table]:
    """What was made of each image of a split: the tables `predictions` and `embeddings`.

    `latents` (N,D) and `probabilities` (N,K) are those of the split's N images in its order.
    """
    confidence, predicted = probabilities.max(dim=1)
    yield predictions(split, predicted, confidence, class_names)
    yield embeddings(split, latents, predicted, class_names)


def predictions(split, predicted: Tensor, confidence: Tensor, class_names: Sequence[str]) -> Table:
    """The most confident mistakes first, then the least confident of the right answers.

    `predicted` int64 (N,), `confidence` (N,) in [0,1], of the split's N images in its order.
    """
    is_right = predicted == split.labels
    # mistakes from 1 down to 0 and then the right ones from 0 up to 1 in one rising number
    order = torch.where(is_right, 1 + confidence, -confidence).argsort(stable=True)[:PREDICTIONS]
    columns = ["image", "label", "prediction", "confidence", "is_right"]
    rows = [
        [image, class_names[label], class_names[guess], round(sure, 4), right]
        for image, label, guess, sure, right in zip(
            split.images(order).cpu().numpy(),
            split.labels[order].tolist(),
            predicted[order].tolist(),
            confidence[order].tolist(),
            is_right[order].tolist(),
            strict=True,
        )
    ]
    return "predictions", columns, rows


def embeddings(split, latents: Tensor, predicted: Tensor, class_names: Sequence[str]) -> Table:
    """Some images with all numbers of their latents, one column each, for W&B's 2D projection.

    Images are spread evenly over the split. `latents` (N,D), `predicted` int64 (N,).
    """
    count = min(len(latents), EMBEDDINGS, max(2, LARGEST_EMBEDDINGS // latents.shape[1]))
    chosen = torch.linspace(0, len(latents) - 1, count).long().to(latents.device)
    columns = ["image", "label", "prediction", *(f"d{n:03}" for n in range(latents.shape[1]))]
    rows = [
        [image, class_names[label], class_names[guess], *(float(f"{x:.5g}") for x in numbers)]
        for image, label, guess, numbers in zip(
            split.images(chosen).cpu().numpy(),
            split.labels[chosen].tolist(),
            predicted[chosen].tolist(),
            latents[chosen].tolist(),
            strict=True,
        )
    ]
    return "embeddings", columns, rows
