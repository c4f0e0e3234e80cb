"""Optimizers, and the learning-rate schedule as a pure function of the step.

The scripts set the learning rate before each step: a scheduler object would be one more state to
save, and Accelerate steps a prepared one once per process.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

Schedule = Literal["cosine", "linear"]


def schedule(name: Schedule, step: int, total_steps: int, warmup_steps: int) -> float:
    """The share of the peak learning rate at `step`: decay to zero, scaled by a linear warm-up.

    share(t) = decay(t) · min(1, (t + 1) / W),
    decay(t) = (1 + cos(π t / T)) / 2  for "cosine",  1 − t / T  for "linear"

    The warm-up's factor reaches 1 at t = W − 1, on the curve itself, so nothing jumps (Loshchilov &
    Hutter 2017, equation 5, without restarts). Without warm-up the first step has the peak rate.

    Args:
        name: of the decay.
        step: t, the number of optimizer steps done so far, from 0 to `total_steps` − 1.
        total_steps: T, the steps of the whole training.
        warmup_steps: W; 0 switches the warm-up off.
    """
    progress = step / total_steps
    decay = 0.5 * (1 + math.cos(math.pi * progress)) if name == "cosine" else 1 - progress
    return decay * min(1.0, (step + 1) / warmup_steps) if warmup_steps > 0 else decay


def set_learning_rate(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Give every parameter group that share of its peak learning rate for the next step."""
    for group in optimizer.param_groups:
        group["lr"] = share * group["initial_lr"]


def build(config: Any, network: nn.Module, scaler: Any = None) -> torch.optim.Optimizer:
    """The optimizer for all parameters of a network that learn.

    `config` has `optimizer` (sgd with Nesterov momentum 0.9, adamw or muon), `learning_rate`,
    `weight_decay` and `adamw_learning_rate`. Muon trains the weights in front of a batch norm,
    which are those of layers without a bias, and AdamW the others; the last two are then AdamW's.
    All are fused: few kernels, which leave out a step where fp16's `scaler`, if there is one, has
    found an overflow.
    """
    parameters = [p for p in network.parameters() if p.requires_grad]
    rate = config.learning_rate
    kwargs: dict[str, Any] = {"weight_decay": config.weight_decay, "fused": True}
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(parameters, rate, momentum=0.9, nesterov=True, **kwargs)
        if scaler is not None:
            optimizer.register_step_pre_hook(_start_momentum)
    elif config.optimizer == "adamw":
        optimizer = torch.optim.AdamW(parameters, rate, **kwargs)
    else:
        matrices = [
            module.weight
            for module in network.modules()
            if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)
            and module.bias is None
        ]
        taken = {id(matrix) for matrix in matrices}
        others = [p for p in parameters if id(p) not in taken]
        optimizer = Muon(matrices, rate, others, config.adamw_learning_rate, **kwargs)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]  # the name that PyTorch's schedulers use
    return optimizer


def _start_momentum(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Begin SGD's momentum with 0; left out by fp16's scaler, a first fused step makes it noise."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None and parameter not in optimizer.state:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


class Muon(torch.optim.AdamW):
    """Muon for matrices whose scale does not matter, AdamW for the other parameters.

    Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) makes the Nesterov momentum M of a
    matrix W, or of filters (C_out, C_in·k·k), orthogonal, and takes a step of that length whatever
    the gradient's was. As in Jordan's airbench, W is first rescaled to the length of its step:

        M ← μ M + G,   W ← W · √r / ‖W‖,   W ← W − rate · orthogonal(G + μ M),

    r being the smaller side, the squared length of an orthogonal matrix (airbench takes C_out,
    which is the same where a matrix is wider than high). So the rate is the relative change of a
    step, which is sound where batch norm follows, and needs no weight decay.
    torch.optim.Muon takes no filters, does not rescale, and computes in bfloat16, which is slow on
    most CPUs.
    """

    def __init__(
        self,
        matrices: list[Tensor],
        learning_rate: float,
        others: list[Tensor],
        adamw_learning_rate: float,
        momentum: float = 0.6,
        **kwargs: Any,
    ):
        groups = [
            {"params": matrices, "lr": learning_rate, "momentum": momentum},
            {"params": others, "lr": adamw_learning_rate, "momentum": None},
        ]
        super().__init__([group for group in groups if group["params"]], **kwargs)
        # fp16's scaler leaves out the whole step where gradients overflow, for which it waits
        self._step_supports_amp_scaling = False

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step of both; Muon's gradients are gone afterwards."""
        for group in self.param_groups:
            if group["momentum"] is None:
                continue
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:  # AdamW expects a step in every state that it loads
                    state["step"], state["momentum"] = torch.tensor(0.0), torch.zeros_like(weight)
                state["step"] += 1
                momentum = state["momentum"].mul_(group["momentum"]).add_(weight.grad)
                ahead = weight.grad.add(momentum, alpha=group["momentum"])
                matrix = ahead.flatten(1)
                weight.mul_(min(matrix.shape) ** 0.5 / weight.norm())
                weight.add_(orthogonalize(matrix).view_as(weight), alpha=-group["lr"])
                weight.grad = None  # for AdamW, which leaves such parameters alone
        super().step()


def orthogonalize(matrix: Tensor, iterations: int = 3) -> Tensor:
    """A matrix (R,C) with the singular vectors of `matrix` and singular values near 1.

    Newton-Schulz iterations X ← aX + (bA + cA²)X with A = XXᵀ from X = matrix/‖matrix‖ and Jordan's
    coefficients, which rise quickly from 0 rather than end exactly at 1.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if is_tall else matrix  # (r,c), r <= c
    x = x / (x.norm() + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + torch.addmm(gram, gram, gram, beta=b, alpha=c) @ x
    return x.mT if is_tall else x
