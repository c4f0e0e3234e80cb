"""The loop around the network: a script's steps against bare ones on ready batches.

A bare step is forward, loss, backward and optimizer on one batch that lies there, augmented and
normalized, in the same precision and with the same settings of threads and malloc. What a script
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


def network_of(name: str, encoder: str, channels: int) -> torch.nn.Module:
    """The network of a training script at its default sizes, for images of 32×32 in ten classes."""
    from common import models

    sizes = {"channels": channels, "image_size": 32, "width": None, "blocks": 0}
    if name == "ae":
        return models.build_autoencoder(encoder, **sizes, latent_dim=128)
    if name == "joint":
        return models.JointClassifier(
            models.build_encoder(encoder, **sizes, latent_dim=128), classes=10
        )
    return models.SupConNet(
        models.build_encoder(encoder, **sizes, latent_dim=None), "mlp", projection_dim=128
    )


def loss_of(name: str, model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor):
    """The loss of a step on images (B,C,S,S), of which contrastive learning has a second view."""
    from common import losses

    if name == "ae":
        return losses.reconstruction_loss(model(images), images, 0.5)
    if name == "joint":
        logits = model(images)
        loss = torch.nn.functional.cross_entropy(logits, labels)
        return loss + losses.probability_mae(logits, labels)
    embeddings, _ = model(torch.cat([images, images.flip(-1)]))
    return losses.supcon_loss(torch.stack(embeddings.chunk(2), dim=1), labels, 0.1)


def bare(
    name: str,
    encoder: str,
    channels: int,
    batch_size: int,
    turn: measure.Turn,
    compiled: bool = False,
) -> None:
    from common.run import runtime

    accelerator = runtime.start("auto", seed=0)
    network = network_of(name, encoder, channels)
    images = torch.randn(batch_size, channels, 32, 32).clamp(-1, 1).to(accelerator.device)
    labels = torch.arange(batch_size).remainder(10).to(accelerator.device)
    if name == "ae":
        rates = {"lr": 2e-3, "weight_decay": 1e-4}
    else:
        rates = {"momentum": 0.9, "nesterov": True}
        rates |= {"lr": 0.1 if name == "joint" else 0.01, "weight_decay": 5e-4}
    kind = torch.optim.SGD if "momentum" in rates else torch.optim.AdamW
    network = runtime.place(network, accelerator.device)
    optimizer = kind(network.parameters(), fused=True, **rates)
    model, optimizer = accelerator.prepare(network.train(), optimizer)
    loss_of_step = runtime.compile_step(loss_of, accelerator) if compiled else loss_of
    while True:
        turn()
        accelerator.backward(loss_of_step(name, model, images, labels))
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    main()
