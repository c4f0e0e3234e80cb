"""The scripts at their default encoder and width, with few images and steps.

A promise that is tested with the narrow networks of tiny.py is tested here once more: widths that
are a multiple of 16, as all defaults are, have their weights in another order in memory
(channels-last), which kernels and checkpoints treat differently.
"""

from pathlib import Path

import train_ae
import train_joint
import train_supcon
from common.config import parse

FEW = (
    "--epochs=2",
    "--knn_images=100",
    "--tsne_images=20",
    "--log_every=1",
    "--tracking=disabled",
)
SCRIPTS = {
    "ae": (train_ae, ("--limit_train=256", "--classifier_epochs=2", "--classifier_views=2")),
    "joint": (train_joint, ("--limit_train=256",)),
    # a step at width 64 and batch 256 takes ten seconds on two cores; width 16 has the same layout
    "supcon": (train_supcon, ("--limit_train=128", "--batch_size=64", "--width=16")),
}


def run(method: str, folder: Path, *words: str) -> dict[str, float]:
    script, own = SCRIPTS[method]
    return script.main(parse(script.Config, [*FEW, *own, *words, f"--run_dir={folder}"]))


def resume(method: str, folder: Path) -> dict[str, float]:
    script, _ = SCRIPTS[method]
    return script.main(parse(script.Config, [f"--resume={folder}"]))
