"""Optimizers, and the learning-rate schedule as a pure function of the step.

The scripts set the learning rate before each step: a scheduler object would be one more state to
save, and Accelerate steps a prepared one once per process.
"""

import math

import torch
from torch import nn


def warmup_cosine(step: int, total_steps: int, warmup_steps: int, peak: float) -> float:
    """Learning rate at `step`: cosine decay to zero, scaled by a linear warm-up.

    cosine(t) = peak/2 · (1 + cos(π t / T)),  rate(t) = cosine(t) · min(1, (t + 1) / W)

    The factor reaches 1 at t = W − 1, on the curve itself, so nothing jumps (Loshchilov & Hutter
    2017, equation 5, without restarts). Without warm-up the first step has the peak rate.

    Args:
        step: t, the number of optimizer steps done so far, from 0 to `total_steps` − 1.
        total_steps: T, the steps of the whole training.
        warmup_steps: W; 0 switches the warm-up off.
        peak: the highest learning rate.
    """
    cosine = 0.5 * peak * (1.0 + math.cos(math.pi * step / total_steps))
    return cosine * min(1.0, (step + 1) / warmup_steps) if warmup_steps > 0 else cosine


def build(
    name: str, network: nn.Module, learning_rate: float, weight_decay: float, fused: bool | None
) -> torch.optim.Optimizer:
    """The optimizer `name` for all parameters of a network: sgd (Nesterov, momentum 0.9) or adamw.

    `fused` None is PyTorch's own choice: with fp16's scaler a fused one would skip steps unseen.
    """
    kwargs = {"lr": learning_rate, "weight_decay": weight_decay, "fused": fused}
    if name == "sgd":
        return torch.optim.SGD(network.parameters(), momentum=0.9, nesterov=True, **kwargs)
    return torch.optim.AdamW(network.parameters(), **kwargs)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give every parameter group the learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
