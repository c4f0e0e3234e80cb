"""The loop around the network: a script's steps against bare ones on ready batches.

A bare step is forward, loss, backward and optimizer on one batch that lies there, augmented and
normalised, in the same precision and with the same settings of threads and malloc. What a script
adds: picking the images, augmenting them, clipping the gradient, logging, the progress bar.

    python benchmarks/overhead.py --out runs/bench/overhead.json
"""

import functools

import measure
import torch

GRAY, COLOR = 1, 3


def main() -> None:
    arguments = measure.parser(__doc__).parse_args()
    place = measure.surroundings()
    rows, times = [], {}
    for settings in (
        ("supcon", "resnet18", COLOR, 128),
        ("ae", "cnn", GRAY, 128),
        ("joint", "cnn", GRAY, 128),
        ("supcon", "cnn", GRAY, 256),
    ):
        name, encoder, channels, batch_size = settings
        contenders = {
            "script": functools.partial(script, *settings),
            "bare": functools.partial(bare, *settings),
        }
        found = measure.alternate(contenders, arguments.rounds, seconds=1.5)
        what = f"train_{name}.py, {encoder}, {'gray' if channels == GRAY else 'color'}"
        times |= {f"{what}, {contender}": taken for contender, taken in found.items()}
        goal = "≤ 1.03" if found["bare"].median > 0.1 else "≤ 1.10"  # a short step shows more
        names = ("script", "bare step")
        rows.append(measure.row(what, found["script"], found["bare"], goal, batch_size, names))
    measure.report("overhead", place, rows, times, arguments.out)


def module_of(name: str):
    """The training script of that method."""
    return __import__(f"train_{name}")


def script(name: str, encoder: str, channels: int, batch_size: int, turn: measure.Turn) -> None:
    module = module_of(name)
    module.datasets.read = lambda *_: measure.arrays(20_000, channels)
    settings = {"dataset": "cifar10" if channels == COLOR else "mnist"}
    measure.long_epochs()
    measure.script(turn, module, encoder=encoder, batch_size=batch_size, **settings)


def bare(name: str, encoder: str, channels: int, batch_size: int, turn: measure.Turn) -> None:
    from common import losses, models
    from common.run import runtime

    accelerator = runtime.start("auto", seed=0)
    sizes = {"channels": channels, "image_size": 32, "width": None, "blocks": 0}
    images = torch.randn(batch_size, channels, 32, 32).clamp(-1, 1).to(accelerator.device)
    labels = torch.arange(batch_size).remainder(10).to(accelerator.device)
    if name == "ae":
        network = models.build_autoencoder(encoder, **sizes, latent_dim=128)
        rates = {"lr": 2e-3, "weight_decay": 1e-4}
    elif name == "joint":
        network = models.JointClassifier(
            models.build_encoder(encoder, **sizes, latent_dim=128), classes=10
        )
        rates = {"lr": 0.1, "weight_decay": 5e-4, "momentum": 0.9, "nesterov": True}
    else:
        network = models.SupConNet(
            models.build_encoder(encoder, **sizes, latent_dim=None), projection_dim=128
        )
        images = torch.cat([images, images.flip(-1)])  # two views
        rates = {"lr": 0.01, "weight_decay": 1e-4, "momentum": 0.9, "nesterov": True}
    kind = torch.optim.SGD if "momentum" in rates else torch.optim.AdamW
    optimizer = kind(network.to(accelerator.device).parameters(), fused=True, **rates)
    model, optimizer = accelerator.prepare(network.train(), optimizer)
    while True:
        turn()
        found = model(images)
        if name == "ae":
            loss = losses.reconstruction_loss(found, images, 0.5)
        elif name == "joint":
            loss = torch.nn.functional.cross_entropy(found, labels)
            loss = loss + losses.probability_mae(found, labels)
        else:
            embeddings, _ = found
            loss = losses.supcon_loss(torch.stack(embeddings.chunk(2), dim=1), labels, 0.1)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    main()
