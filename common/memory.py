"""Does it fit?   the memory that a network needs, known before any of it is taken

Networks are built on torch's meta device, where tensors have a shape but no content. What comes out
is a lower bound: what a convolution borrows while it runs is not in it.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn

from common import runtime
from common.errors import UserError

ADAM, MOMENTUM = 2, 1  # numbers that the optimiser keeps for each weight
AT_ONCE = 512  # images of 32×32 that are encoded at a time where no gradient is needed


@dataclass(frozen=True)
class Needs:
    """Bytes: of weights and buffers, of what a forward pass of one batch keeps for the backward
    pass, and the largest tensor in it.
    """

    weights: float
    activations: float
    largest: float

    def training(self, optimizer: int) -> float:
        """Weights and gradients, optimiser state, a copy of the last good state, and a batch."""
        return self.weights * (3 + 2 * optimizer) + self.activations

    def saving(self, optimizer: int) -> float:
        """What a checkpoint takes while it is written: a copy, and the bytes of the file."""
        return self.weights * 2 * (1 + optimizer)


def measure(network: Callable[[], nn.Module], shape: tuple[int, ...], precision: str) -> Needs:
    """What the network that `network()` makes needs for a batch of floats of `shape`.

    In half precision the activations are counted at half their size.
    """
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            made, inputs = network(), torch.empty(shape)
        owned = {tensor.untyped_storage()._cdata for tensor in made.state_dict().values()}
        kept = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in owned:
                kept[storage._cdata] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = made(inputs)  # noqa: F841 - keeps the graph, and so all storages, alive
        sizes = [storage.nbytes() for storage in kept.values()]
        weights = sum(t.numel() * t.element_size() for t in made.state_dict().values())
    except RuntimeError:  # more bytes than 64 bits can count
        return Needs(math.inf, math.inf, math.inf)
    share = 1 if precision == "no" else 0.5
    return Needs(weights, share * sum(sizes), share * max(sizes, default=0))


def images_at_once(image_size: int, most: int = AT_ONCE) -> int:
    """How many images are handled at a time without gradients: `most` up to 32×32 pixels."""
    return max(1, most * 32**2 // max(image_size, 32) ** 2)


def build(
    network: Callable[[], nn.Module],
    shape: tuple[int, int, int, int],
    optimizer: int,
    accelerator: Accelerator,
    advice: str,
) -> nn.Module:
    """Build a network if its training fits, batches of images being of `shape` (B,C,S,S).

    `optimizer` is ADAM or MOMENTUM, `advice` names the flags that make the network smaller.
    `UserError`: it does not fit.
    """
    needs, device = measure(network, shape, accelerator.mixed_precision), accelerator.device
    # three tensors of the largest layer at a time, when validation images are encoded
    encoding = 3 * needs.largest / shape[0] * images_at_once(shape[-1])
    saving, at_rest = needs.saving(optimizer), needs.training(optimizer) - needs.activations
    what = f"training on {shape[0]:,} images at a time"
    if device.type == "cpu":
        check(at_rest + max(needs.activations, encoding, saving), device, what, advice)
    else:
        check(at_rest + max(needs.activations, encoding), device, what, advice)
        check(needs.weights + saving, torch.device("cpu"), "a checkpoint", advice)
    return network()


def check_encoding(network: nn.Module, shape: tuple[int, ...], device: torch.device) -> None:
    """`UserError` unless `network` can encode batches of images of `shape` (B,C,S,S)."""
    needs = measure(lambda: copy.deepcopy(network).to("meta").requires_grad_(True), shape, "no")
    check(3 * needs.largest, device, f"encoding {shape[0]:,} images at a time", "--batch_size")


def check_latents(size: int, data, copies: int, device: torch.device, advice: str) -> None:
    """`UserError` unless the latents of all images fit, `size` numbers each, as probes use them.

    Those of the training images are held `copies` times and once more, standardised. L-BFGS keeps
    its last 100 steps and gradients, a weight for each number and class.
    """
    count = len(data.train) * (copies + 1) + len(data.validation) + len(data.test)
    needed = 4 * size * (count + 200 * len(data.class_names))
    check(needed, device, f"reading classes from latents of {size:,} numbers", advice)


def check(needed: float, device: torch.device, what: str, advice: str) -> None:
    """`UserError` if `what` needs more bytes than are free."""
    free = runtime.available_memory(device)
    if needed > free:
        gib = f"{needed / 2**30:,.1f}" if needed < 2**50 else "more than a million"
        raise UserError(
            f"{what} needs {gib} GiB of memory, but {free / 2**30:,.1f} GiB are free: "
            f"make {advice} smaller"
        )
