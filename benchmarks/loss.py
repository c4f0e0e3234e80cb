"""The supervised contrastive loss, forward and backward: time and memory against two others.

The usual form holds all similarities at once: N×N of products, a mask of positives, one without
the diagonal, the exponentials and the logarithms, as public training code for this loss does.
pytorch-metric-learning is given the two views as one batch with repeated labels. Embeddings are
128 numbers of unit length in two views, ten classes, temperature 0.1; N counts views.

    python benchmarks/loss.py --out runs/bench/loss.json
"""

import functools

import measure
import torch
import torch.nn.functional as F
from torch import Tensor

DIMENSIONS, CLASSES, TEMPERATURE = 128, 10, 0.1
MIB = 2**20


def main() -> None:
    arguments = measure.parser(__doc__).parse_args()
    place = measure.surroundings()
    peers = {"usual form": usual, "pytorch-metric-learning": metric_learning}
    rows, times = [], {}
    for count, goal, rounds in ((1024, "≤ 0.6", arguments.rounds), (8192, "≤ 0.4", 3)):
        contenders = {
            name: functools.partial(contend, count)
            for name, contend in {"ours": ours, **peers}.items()
        }
        found = measure.alternate(contenders, rounds)
        times |= {f"{name}, N {count}": taken for name, taken in found.items()}
        for name in peers:
            rows.append(
                measure.row(
                    f"loss and gradient, N {count:,}, time of {name}",
                    *(found["ours"], found[name], goal),
                    names=("ours", name),
                )
            )
    memory = {}
    for name, contend in {"ours": ours, **peers}.items():
        taken = measure.peak_memory(functools.partial(contend, 8192))
        times[f"{name}, memory, N 8192"], memory[name] = taken, taken.memory
    for name in peers:
        rows.append(
            measure.claim(
                f"loss and gradient, N 8,192, memory of {name}",
                memory["ours"] / memory[name],
                "≤ 0.2",
                f"{memory['ours'] / MIB:,.0f} MiB",
                f"{memory[name] / MIB:,.0f} MiB",
                names=("ours", name),
            )
        )
    # ours alone: how it grows
    large, larger = 32_768, 65_536
    for count in (large, larger):
        times[f"ours, memory, N {count}"] = measure.peak_memory(functools.partial(ours, count))
    taken = times[f"ours, memory, N {larger}"]
    rows.append(
        measure.claim(
            f"loss and gradient, N {larger:,}, gigabytes",
            taken.memory / 1e9,
            "≤ 2",
            f"{taken.memory / MIB:,.0f} MiB in {taken.median:.3g} s",
        )
    )
    ratio = taken.memory / times[f"ours, memory, N {large}"].memory
    rows.append(growth("memory", ratio, f"from N {large:,} to {larger:,}", "≤ 1.1"))
    ratio = taken.median / times[f"ours, memory, N {large}"].median
    rows.append(growth("time", ratio, f"from N {large:,} to {larger:,}", ""))
    measure.report("loss", place, rows, times, arguments.out)


def growth(what: str, ratio: float, where: str, goal: str) -> dict:
    """The exponent p of N^p, where N doubles."""
    exponent = float(torch.tensor(ratio).log2())
    return measure.claim(f"exponent of {what} in N", exponent, goal, where)


def inputs(count: int) -> tuple[Tensor, Tensor]:
    """Embeddings (N/2,2,D) with gradient and labels (N/2,)."""
    torch.manual_seed(0)
    embeddings = F.normalize(torch.randn(count // 2, 2, DIMENSIONS), dim=2).to(measure.DEVICE)
    labels = torch.randint(0, CLASSES, (count // 2,)).to(measure.DEVICE)
    return embeddings.requires_grad_(), labels


def ours(count: int, turn: measure.Turn) -> None:
    from common.losses import supcon_loss
    from common.run import runtime

    runtime.start("no", seed=0)
    small, few = inputs(16)
    supcon_loss(small, few, TEMPERATURE).backward()  # what libraries hold is not the loss's memory
    embeddings, labels = inputs(count)
    while True:
        turn()
        embeddings.grad = None
        supcon_loss(embeddings, labels, TEMPERATURE).backward()


def usual(count: int, turn: measure.Turn) -> None:
    small, few = inputs(16)
    masked_loss(small, few).backward()
    embeddings, labels = inputs(count)
    while True:
        turn()
        embeddings.grad = None
        masked_loss(embeddings, labels).backward()


def masked_loss(embeddings: Tensor, labels: Tensor) -> Tensor:
    """The loss as it is usually written, with a mask for what counts."""
    everything = torch.cat(embeddings.unbind(1))  # (N,D), all first views, then all second ones
    positives = torch.eq(labels[:, None], labels[None]).float().repeat(2, 2)
    others = 1 - torch.eye(len(everything), device=everything.device)
    positives = positives * others
    similarities = everything @ everything.T / TEMPERATURE
    similarities = similarities - similarities.max(dim=1, keepdim=True).values.detach()
    total = (similarities.exp() * others).sum(dim=1, keepdim=True)
    log_probabilities = similarities - total.log()
    return -((positives * log_probabilities).sum(1) / positives.sum(1)).mean()


def metric_learning(count: int, turn: measure.Turn) -> None:
    from pytorch_metric_learning.losses import SupConLoss

    loss = SupConLoss(temperature=TEMPERATURE)
    small, few = inputs(16)
    loss(small.flatten(0, 1), few.repeat_interleave(2)).backward()
    embeddings, labels = inputs(count)
    while True:
        turn()
        embeddings.grad = None
        loss(embeddings.flatten(0, 1), labels.repeat_interleave(2)).backward()


if __name__ == "__main__":
    main()
