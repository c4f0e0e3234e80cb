"""Are the numbers still numbers?   means over training steps, and the first step that went wrong

Loss and gradients are watched on the device. Only what says so waits for a GPU, and that is called
where values are read anyway, not at every step.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

SMALLEST_SCALE = 2.0**-14  # of fp16's loss, which starts at 2^16: by then 30 steps were skipped
SHOWN = 3  # names in a message


class Gradients:
    """Cuts gradients to a length, and remembers those of the first step that was no number."""

    def __init__(self, network: nn.Module):
        self.named = dict(network.named_parameters())  # each gets a gradient in every step
        device = next(iter(self.named.values())).device
        self._norms = torch.zeros(len(self.named), device=device)
        # step, learning rate, loss and P norms of the first wrong step; zeros while there is none
        self._first = torch.zeros(3 + len(self.named), dtype=torch.float64, device=device)

    def clip(self, max_norm: float = math.inf) -> Tensor:
        """Scale the gradients to `max_norm` at most; their length before that, float ()."""
        self._norms = torch.stack(torch._foreach_norm([p.grad for p in self.named.values()]))
        length = torch.linalg.vector_norm(self._norms)
        if max_norm < math.inf:
            torch.nn.utils.clip_grads_with_norm_(self.named.values(), max_norm, length)
        return length

    def add(self, step: int, learning_rate: float, loss: Tensor, is_wrong: Tensor) -> None:
        """Remember this step (counted from 1) if it `is_wrong`, bool (), and none was before it."""
        facts = [torch.full_like(self._first[0], value) for value in (step, learning_rate)]
        facts = torch.cat([torch.stack([*facts, loss.detach().double()]), self._norms.double()])
        is_first = is_wrong & (self._first[0] == 0)
        self._first = torch.where(is_first, facts, self._first)

    def problem(self, precision: str) -> str:
        """What was wrong in the step that is remembered, empty if none is; waits for the device."""
        step, learning_rate, loss, *norms = self._first.tolist()
        if not step:
            return ""  # in this process
        what = "the gradients are not finite" if math.isfinite(loss) else f"the loss is {loss}"
        largest = f"largest gradients: {most(dict(zip(self.named, norms, strict=True)))}"
        return line(what, round(step), learning_rate, precision, largest)


class Watch:
    """Means of what the steps of a training report, and whether all of it is finite.

    `names` are those of the values that `add` takes, the loss first. fp16's scaler leaves out steps
    whose gradients overflow; `skipped` counts them, and they are no problem while it finds a scale
    that fits.
    """

    def __init__(self, accelerator: Accelerator, network: nn.Module, names: Sequence[str]):
        self.skipped = 0
        self._last = dict.fromkeys(names, 0.0)  # what `means` found last
        self._accelerator, self._network = accelerator, network
        self._gradients = Gradients(network)
        self._length = torch.zeros((), device=accelerator.device)
        self._sums, self._steps = torch.zeros(len(names) + 1, device=accelerator.device), 0
        self._at = (0, 0.0)

    def clip(self, max_norm: float) -> None:
        """Cut the gradients of this step to the length `max_norm`, as fp16's scaler left them."""
        self._accelerator.unscale_gradients()
        self._length = self._gradients.clip(max_norm)

    def add(self, step: int, learning_rate: float, *values: Tensor) -> None:
        """Count a step that the optimiser has just taken, with its values () of `names`."""
        length = self._length
        if self._accelerator.optimizer_step_was_skipped:  # the scaler has seen that it is infinite
            self.skipped += 1
            length = torch.zeros_like(length)
        summed = torch.stack([*values, length]).detach()
        self._gradients.add(step, learning_rate, values[0], ~summed.isfinite().all())
        self._sums, self._steps = self._sums + summed, self._steps + 1
        self._at = (step, learning_rate)

    def problem(self) -> str:
        """What went wrong since `means`, empty while all is well; waits for device and processes.

        All processes agree, though only one that saw it itself can tell the step.
        """
        tensors = self._network.state_dict()
        tensors = {name: x for name, x in tensors.items() if x.is_floating_point()}
        sizes = torch.stack(torch._foreach_norm(list(tensors.values()), ord=math.inf))
        is_wrong = ~torch.cat([self._sums, sizes]).isfinite().all()
        accelerator = self._accelerator
        precision = accelerator.mixed_precision
        if accelerator.reduce(is_wrong.float(), "sum").item():
            largest = f"largest: {most(dict(zip(tensors, sizes.tolist(), strict=True)))}"
            return self._gradients.problem(precision) or line(
                "the weights are not finite", *self._at, precision, largest
            )
        if accelerator.scaler is not None and accelerator.scaler.get_scale() < SMALLEST_SCALE:
            what, skipped = "the gradients overflow at every scale", f"{self.skipped} steps skipped"
            return line(what, *self._at, precision, skipped)
        return ""

    def means(self) -> dict[str, float]:
        """A row of `train/…`: means over the steps and processes since the last call; waits."""
        sums = self._accelerator.reduce(self._sums, "mean").tolist()[:-1]
        means = [total / self._steps for total in sums]
        self._last = dict(zip(self._last, means, strict=True))
        self._sums, self._steps = torch.zeros_like(self._sums), 0
        row = {f"train/{name}": mean for name, mean in self._last.items()}
        row["train/gradient_norm"] = self._length.item()
        if self._accelerator.scaler is not None:
            row["train/skipped_steps"] = self.skipped
        return row

    @property
    def loss(self) -> float:
        """The last mean of the loss."""
        return next(iter(self._last.values()))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, the sums of all processes; called by each of them."""
        sums = self._accelerator.gather(self._sums[None])  # (P,n)
        state = {"sums": sums, "steps": self._steps, "skipped": self.skipped}
        return state | {"last": self._last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self._sums = state["sums"][self._accelerator.process_index].to(self._sums.device)
        self._steps, self.skipped, self._last = state["steps"], state["skipped"], state["last"]


def most(sizes: Mapping[str, float]) -> str:
    """The largest of some named sizes as text; the last of those that are no numbers goes first.

    The backward pass begins at the last layer, so what went wrong there is nearest to the cause.
    """
    wrong = [name for name, size in sizes.items() if not math.isfinite(size)][::-1]
    order = wrong or sorted(sizes, key=sizes.get, reverse=True)
    text = ", ".join(f"{name} {sizes[name]:.3g}" for name in order[:SHOWN])
    return text + (f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else "")


def line(what: str, step: int, learning_rate: float, precision: str, details: str) -> str:
    """What went wrong where, and what to try: the same command would lead here again."""
    other = "" if precision == "no" else " or with --precision no"
    return (
        f"{what} at step {step} (learning rate {learning_rate:.3g}, precision {precision}, "
        f"{details}); start anew with a lower learning rate{other}"
    )
