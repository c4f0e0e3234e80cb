"""Each script on a part of digits, small enough to train in a second or two."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
from matplotlib.figure import Figure

import train_ae
import train_joint
import train_supcon
from common.config import parse
from common.files import read_rows

TINY = (
    "--limit_train=256",
    "--epochs=2",
    "--batch_size=32",
    "--warmup_epochs=0.5",
    "--width=8",
    "--tsne_images=40",
    "--log_every=3",
    "--tracking=disabled",
)
SCRIPTS = {
    "ae": (train_ae, ("--hidden_dim=32", "--classifier_epochs=2", "--classifier_views=2")),
    "joint": (train_joint, ("--learning_rate=0.05",)),
    "supcon": (train_supcon, ("--encoder=cnn", "--learning_rate=0.05")),
}
TIMED = ("time/", "memory/")  # what differs between two equal runs


@contextlib.contextmanager
def coarse_pictures() -> Iterator[None]:
    """Draw every figure with few pixels and without a search for its layout.

    As they are for users, the figures of so small a run take longer than all the rest of it. Those
    are drawn in test_plots.py, test_resume.py and test_compare.py, and by the README's commands.
    """
    begin = Figure.__init__

    def begin_coarsely(self, *words, **options):
        begin(self, *words, **(options | {"dpi": 30, "layout": None}))

    with mock.patch.object(Figure, "__init__", begin_coarsely):
        yield


@coarse_pictures()
def run(method: str, folder: Path, *words: str) -> dict[str, float]:
    script, own = SCRIPTS[method]
    return script.main(parse(script.Config, [*TINY, *own, *words, f"--run_dir={folder}"]))


@coarse_pictures()
def resume(method: str, folder: Path, *words: str) -> dict[str, float]:
    script, _ = SCRIPTS[method]
    return script.main(parse(script.Config, [*words, f"--resume={folder}"]))


def timeless(row: dict) -> dict:
    return {name: value for name, value in row.items() if not name.startswith(TIMED)}


def rows_of(folder: Path) -> list[dict]:
    return [timeless(row) for row in read_rows(folder / "metrics.jsonl")]


def latents_of(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of latents.npz; none where the test images stayed unseen."""
    path = folder / "latents.npz"
    return dict(np.load(path)) if path.exists() else {}


def assert_same_bits(a: Path, b: Path) -> None:
    figures = [str(path.relative_to(a)) for path in a.glob("figures/*")]
    for name in ("encoder.safetensors", "classifier.safetensors", *figures):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    first, second = (latents_of(folder) for folder in (a, b))
    assert first.keys() == second.keys()
    for name in first:
        assert np.array_equal(first[name], second[name]), name
    assert rows_of(a) == rows_of(b)
