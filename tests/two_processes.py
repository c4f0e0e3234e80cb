"""Trains every case without batch norm, in as many processes as this is started in.

    torchrun --nproc_per_node=2 tests/two_processes.py FOLDER

Batch norm sees the share of one process only; without it, as many processes as one likes compute
the same weights. One launch trains all cases, since a launch takes longer than they do.
"""

import sys
from pathlib import Path
from unittest import mock

import accelerate
import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import default_size  # noqa: E402
import tiny  # noqa: E402

from common.config import parse  # noqa: E402
from common.evaluation import probes  # noqa: E402

# name: method, flags; at the default width, but with one view of few images, narrow
CASES = {
    **{
        name: (script, (*default_size.FEW, *own))
        for name, (script, own) in default_size.SCRIPTS.items()
    },
    # one view: an image alone in its class has no positive, and the ranks hold unequally many
    "supcon-one-view": (
        tiny.SCRIPTS["supcon"][0],
        (*tiny.TINY, *tiny.SCRIPTS["supcon"][1], "--views=1", "--batch_size=8"),
    ),
}
SHORT = ("--precision=no", "--epochs=1", "--learning_rate=0.001")


def train(case: str, folder: Path) -> None:
    """Train one case into the run folder `folder`."""
    script, words = CASES[case]
    with (
        tiny.coarse_pictures(),
        mock.patch.object(torch.nn, "BatchNorm2d", lambda *words: torch.nn.Identity()),
        # on so few images, rounding decides which one validation chooses
        mock.patch.object(probes, "STRENGTHS", (1e-3,)),
    ):
        script.main(parse(script.Config, [*words, *SHORT, f"--run_dir={folder}"]))
    sys.modules["accelerate.state"].AcceleratorState._reset_state(True)


if __name__ == "__main__":
    *others, last = CASES
    # A second group of processes would read the addresses of the first in the launcher's store, and
    # wait for ever: so there is one, which ends as the last run does.
    with mock.patch.object(accelerate.Accelerator, "end_training"):
        for name in others:
            train(name, Path(sys.argv[1], name))
    train(last, Path(sys.argv[1], last))
