"""An epoch of the autoencoder on MNIST: train_ae.py against a loop around a plain DataLoader.

Both train the same network with the same loss and batch size. The loop beside ours reads MNIST
through torchvision's data set and transforms, with two workers and with none, in float32. Without
MNIST in --data_dir, random images of its size take its place.

    python benchmarks/autoencoder.py --out runs/bench/autoencoder.json
"""

import functools
import tempfile
from pathlib import Path

import measure
import torch

BATCH = 128


def main() -> None:
    arguments = measure.parser(__doc__).parse_args()
    place = measure.surroundings()
    with tempfile.TemporaryDirectory() as folder:
        data_dir = measure.mnist_folder(arguments.data_dir, Path(folder))
        contenders = {
            "ours": functools.partial(ours, data_dir),
            "DataLoader, 2 workers": functools.partial(reference, data_dir, 2),
            "DataLoader, no worker": functools.partial(reference, data_dir, 0),
        }
        # 8 turns stay within the first epoch, before its evaluation
        rounds = min(arguments.rounds, 8)
        times = measure.alternate(contenders, rounds, units=40)
    peers = [name for name in contenders if name != "ours"]
    rows = [
        measure.row(
            f"autoencoder, MNIST, epoch against a {name}",
            *(times["ours"], times[name], "≥ 1.4"),
            images=BATCH,
            names=("ours", name),
        )
        for name in peers
    ]
    measure.report("autoencoder", place, rows, times, arguments.out)


def ours(data_dir: Path, turn: measure.Turn) -> None:
    import train_ae

    settings = {"dataset": "mnist", "data_dir": str(data_dir), "batch_size": BATCH}
    measure.script(turn, train_ae, **settings)


def reference(data_dir: Path, workers: int, turn: measure.Turn) -> None:
    from torchvision import datasets, transforms

    from common.losses import reconstruction_loss
    from common.models import build_autoencoder

    torch.manual_seed(0)
    steps = [transforms.Pad(2), transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))]
    images = datasets.MNIST(data_dir, train=True, transform=transforms.Compose(steps))
    batches = torch.utils.data.DataLoader(
        images,
        batch_size=BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
    )
    sizes = {"channels": 1, "image_size": 32, "width": None, "blocks": 0, "latent_dim": 128}
    network = build_autoencoder("cnn", **sizes)
    network.to(measure.DEVICE, memory_format=torch.contiguous_format)  # as it is where not chosen
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    network.train()
    while True:
        for inputs, _ in batches:
            turn()
            inputs = inputs.to(measure.DEVICE)
            loss = reconstruction_loss(network(inputs), inputs, 0.5)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


if __name__ == "__main__":
    main()
