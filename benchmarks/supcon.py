"""SupCon training, the whole loop: train_supcon.py against the usual one, ResNet-18, batch 128.

The loop beside ours follows public training code for this loss: torchvision's transforms on PIL
images in two workers, both views of a batch concatenated, the loss with N×N masks, SGD, float32.
Its network has the same layers. Images are random ones of CIFAR-10's size: their content has no
part in the time.

    python benchmarks/supcon.py --out runs/bench/supcon.json
"""

import functools

import measure
import torch
from augmentation import transform_pil, worker_batches
from loss import masked_loss

BATCH = 128


def main() -> None:
    arguments = measure.parser(__doc__).parse_args()
    place = measure.surroundings()
    contenders = {
        "ours, precision auto": functools.partial(ours, "auto"),
        "ours, float32": functools.partial(ours, "no"),
        "reference": reference,
    }
    times = measure.alternate(contenders, arguments.rounds, units=2 if measure.IS_CPU else 20)
    rows = [
        measure.row(
            f"SupCon, ResNet-18, batch {BATCH}, whole loop, {name.split(', ')[1]}",
            *(times[name], times["reference"], goal),
            images=BATCH,
            names=("ours", "reference loop"),
        )
        for name, goal in (("ours, precision auto", "≥ 2.5"), ("ours, float32", "≥ 1.15"))
    ]
    measure.report("supcon", place, rows, times, arguments.out)


def ours(precision: str, turn: measure.Turn) -> None:
    import train_supcon

    train_supcon.datasets.read = lambda *_: measure.arrays(BATCH * 200, 3)
    settings = {"dataset": "cifar10", "batch_size": BATCH, "precision": precision}
    measure.script(turn, train_supcon, **settings)


def reference(turn: measure.Turn) -> None:
    from common.models import SupConNet, build_encoder

    torch.manual_seed(0)
    sizes = {"channels": 3, "image_size": 32, "width": 64, "blocks": 0, "latent_dim": None}
    network = SupConNet(build_encoder("resnet18", **sizes), "mlp", 128)
    network = network.to(measure.DEVICE, memory_format=torch.contiguous_format).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    while True:
        for views, labels in worker_batches(transform_pil(), BATCH, workers=2):
            turn()
            images = torch.cat(views).to(measure.DEVICE, non_blocking=True)
            labels = labels.to(measure.DEVICE, non_blocking=True)
            embeddings, _ = network(images)
            loss = masked_loss(torch.stack(embeddings.chunk(2), dim=1), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


if __name__ == "__main__":
    main()
