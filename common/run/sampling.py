"""Which images a step takes: pure functions of seed, epoch, step and process."""

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError

EPOCHS = 20  # by default, and about as many evaluations where there are more
FEWEST_STEPS = 1000  # by default, however few the images are


def with_epochs(config: Any, steps_per_epoch: int) -> Any:
    """`config` with numbers in place of None: its `epochs` and its `evaluate_every`.

    Where they are not given, as `epochs_of`.
    """
    epochs, every = epochs_of(config.epochs, steps_per_epoch, FEWEST_STEPS)
    every = config.evaluate_every or every
    return dataclasses.replace(config, epochs=epochs, evaluate_every=every)


def epochs_of(given: int | None, steps_per_epoch: int, fewest_steps: int) -> tuple[int, int]:
    """The number of epochs, and after how many of them to evaluate.

    20 epochs, or as many as make `fewest_steps` steps, then evaluated 20 to 40 times; each epoch
    where their number is given.
    """
    epochs = given or max(EPOCHS, -(-fewest_steps // steps_per_epoch))
    return epochs, 1 if given else epochs // EPOCHS


def epoch_batches(count: int, batch_size: int, seed: int, epoch: int, steps: int) -> Tensor:
    """int64 (steps, batch_size): which of `count` images each global batch of this epoch holds.

    Each comes at most once; which are left over differs from epoch to epoch.
    """
    order = torch.randperm(count, generator=generator(seed, epoch))
    return order[: steps * batch_size].view(steps, batch_size)


def local_slice(count: int, batch_size: int, process: int, processes: int) -> slice:
    """The part of each global batch that belongs to one process; the parts are equal.

    Raises:
        UserError: a batch larger than the `count` training images, or not to be shared equally.
    """
    if batch_size > count:
        raise UserError(
            f"--batch_size {batch_size} is more than the {count} training images; make it smaller"
        )
    share = batch_size // processes
    if batch_size % processes or share < 2:
        raise UserError(
            f"--batch_size {batch_size} cannot be shared equally by {processes} processes; "
            f"take a multiple of {processes}, at least {2 * processes}"
        )
    return slice(process * share, (process + 1) * share)


def generator(*numbers: int) -> torch.Generator:
    """A CPU generator whose stream is a pure function of the numbers, such as seed and epoch."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))
