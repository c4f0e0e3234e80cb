"""No step makes the host wait for a GPU, as far as that shows on a CPU.

What would wait there is an operation that hands a value to Python, whose result has a size that
depends on values, or that copies between host and device. Inside the steps each is an error.
"""

import contextlib

import numpy as np
import pytest
import torch
from tiny import run
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from common.data import augmentation, color, datasets
from common.run import runtime

WAITING = {
    *("_local_scalar_dense", "item", "is_nonzero", "equal"),  # a value for Python
    *("nonzero", "nonzero_numpy", "masked_select", "unique_dim", "_unique2", "bincount"),
    "repeat_interleave.Tensor",
    *("lift_fresh", "lift_fresh_copy"),  # torch.tensor and new_tensor: from the host's memory
}


class Enough(Exception):
    """As many steps as are needed."""


class NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, words=(), options=None):
        name = function.name().removeprefix("aten::")
        tensors = [x for x in torch.utils._pytree.tree_leaves(words) if torch.is_tensor(x)]
        # an index by bool is a search for its rows
        is_search = name.startswith("index") and any(x.dtype == torch.bool for x in tensors[1:])
        moves = name.startswith("_to_copy") and (options or {}).get("device") not in (
            None,
            tensors[0].device,
        )
        if name in WAITING or name.split(".")[0] in WAITING or is_search or moves:
            raise AssertionError(f"a GPU would have to be waited for: {name}")
        return function(*words, **(options or {}))


class NoReading(TorchFunctionMode):
    """What reads a CPU's memory without an operation."""

    def __torch_function__(self, function, types, words=(), options=None):
        if getattr(function, "__name__", "") in ("tolist", "numpy", "__array__", "cpu"):
            raise AssertionError(f"a GPU would have to be waited for: {function.__name__}")
        return function(*words, **(options or {}))


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool(x[0] > 0),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.new_tensor(0.5),
        lambda x: x.to("meta"),
    ],
)
def test_the_guard_notices(wait):
    with pytest.raises(AssertionError, match="waited for"), NoWaiting(), NoReading():
        wait(torch.ones(3))


@pytest.fixture
def guarded(monkeypatch):
    """How many steps were guarded, in a list that grows."""
    steps = []

    @contextlib.contextmanager
    def watch(device, step):
        if step == 3:
            raise Enough
        steps.append(step)
        if step == 0:  # the first one logs two norms
            yield
        else:
            with NoWaiting(), NoReading():
                yield

    monkeypatch.setattr(runtime, "forbid_waiting", watch)
    # a CPU's own, faster there
    monkeypatch.setattr(augmentation, "color_jitter_", color._jitter_all_)
    return steps


@pytest.mark.parametrize(
    ("method", "channels", "words"),
    [
        ("ae", 1, ()),
        ("joint", 3, ("--augment=cutout",)),
        ("joint", 1, ("--augment=affine", "--optimizer=adamw", "--precision=bf16")),
        ("joint", 3, ("--encoder=airbench", "--optimizer=muon")),
        ("supcon", 3, ("--cross_entropy_weight=0.5",)),
        ("supcon", 1, ("--supervised=False",)),
    ],
)
def test_a_step_waits_for_nothing(tmp_path, monkeypatch, guarded, method, channels, words):
    random = np.random.RandomState(0)
    images = random.randint(0, 256, (120, channels, 32, 32)).astype(np.uint8)
    arrays = (images, np.arange(120) % 10, images[:20], np.arange(20) % 10)
    arrays = datasets.Arrays(*arrays, tuple("0123456789"), "made here")
    monkeypatch.setattr(datasets, "read", lambda *words: arrays)
    words = ("--dataset=cifar10", "--epochs=1", "--batch_size=20", *words)
    with pytest.raises(Enough):
        run(method, tmp_path / "run", *words)
    assert guarded == [0, 1, 2]
