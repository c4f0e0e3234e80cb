"""Means of what training steps report, and whether all of it is finite and of a sane size.

Values stay on the device. Only `problem` and `means` wait for it, at the rows of the log.
"""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

# Of a loss, a gradient norm or the norm of all weights: beyond it a training has diverged. Squares,
# and sums of them, still fit into float32.
LARGEST = 1e12
SMALLEST_SCALE = 2.0**-14  # of fp16's loss, which starts at 2^16: by then 30 steps were skipped


class Monitor:
    """Means of the values of the steps since the last row, over all processes.

    fp16's scaler skips steps whose gradients overflow. `skipped` counts them, and they are no
    problem as long as it finds a scale that fits.
    """

    def __init__(self, accelerator: Accelerator, network: nn.Module):
        self.last: dict[str, float] = {}  # the row that `means` returned last
        self._accelerator, self._network = accelerator, network
        self._sums: dict[str, Tensor] = {}  # by name, each float ()
        self._steps = 0
        self._skipped = torch.zeros((), dtype=torch.int64, device=accelerator.device)

    @property
    def skipped(self) -> int:
        """How many steps fp16's scaler has left out."""
        return int(self._skipped)

    def add(self, **values: Tensor) -> None:
        """Count a step that the optimizer has just taken, with its values, tensors ()."""
        if self._accelerator.scaler is not None:
            norm = values["gradient_norm"]  # not finite: the scaler left the step out
            values["gradient_norm"] = torch.where(norm.isfinite(), norm, 0)
            self._skipped = self._skipped + ~norm.isfinite()
        for name, value in values.items():
            value = value.detach().to(torch.float32, copy=True)  # a CUDA graph reuses its memory
            self._sums[name] = self._sums[name] + value if self._steps else value
        self._steps += 1

    def problem(self) -> str:
        """What is not finite, or too large, since the last row; the same in all processes.

        Empty if nothing is.
        """
        accelerator = self._accelerator
        tensors = [x for x in self._network.state_dict().values() if x.is_floating_point()]
        values = {**self._sums, "weights": torch.nn.utils.get_total_norm(tensors)}
        values = {name: value.float() for name, value in values.items()}
        sizes = torch.stack(list(values.values())).abs()
        is_wrong = torch.stack([~sizes.isfinite(), sizes > LARGEST]).float()  # (2,N)
        for wrong, what in zip(
            accelerator.reduce(is_wrong, "sum").tolist(),
            ("not finite any more", f"beyond {LARGEST:g}, so the training has diverged"),
            strict=True,
        ):
            named = zip(values, wrong, strict=True)
            if names := [name.replace("_", " ") for name, count in named if count]:
                return f"{what}: {', '.join(names)}"
        if accelerator.scaler is not None and accelerator.scaler.get_scale() < SMALLEST_SCALE:
            return f"the gradients overflow at every scale of fp16 ({self.skipped} steps skipped)"
        return ""

    def means(self) -> dict[str, float]:
        """A row of `train/…`: means over the steps and processes since the last call."""
        sums = torch.stack(list(self._sums.values()))
        means = (self._accelerator.reduce(sums, "mean") / self._steps).tolist()
        self.last = {f"train/{name}": mean for name, mean in zip(self._sums, means, strict=True)}
        if self._accelerator.scaler is not None:
            self.last["train/skipped_steps"] = self.skipped
        self._sums, self._steps = {}, 0
        return dict(self.last)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, the sums of all processes; called by each of them."""
        sums = {name: self._accelerator.gather(x[None]) for name, x in self._sums.items()}  # (P,)
        return {"sums": sums, "steps": self._steps, "skipped": self.skipped, "last": self.last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        accelerator, sums = self._accelerator, state["sums"]
        if any(len(x) != accelerator.num_processes for x in sums.values()):
            sums = {name: x.mean().expand(accelerator.num_processes) for name, x in sums.items()}
        process, device = accelerator.process_index, accelerator.device
        self._sums = {name: x[process].to(device) for name, x in sums.items()}
        self._steps, self.last = state["steps"], state["last"]
        self._skipped = torch.full_like(self._skipped, state["skipped"])
