"""Seconds for 1,000 training images of each encoder, against public code of the same network.

airbench stands beside the network of its author's package, in whose place of half precision on a
GPU float32 on this device is put; resnet18 beside torchvision's, its stem changed to 3×3 without
max-pooling, as is usual for small images. Both with a linear layer to 10 classes, cross-entropy and
SGD with momentum, in batches of 128 images of CIFAR-10's size. The plain cnn has no public double:
its row says how much quicker it is than the smallest of the others.

    python benchmarks/encoders.py --out runs/bench/encoders.json
"""

import functools
from unittest import mock

import measure
import torch
import torch.nn.functional as F
from torch import nn

BATCH = 128
PEERS = {"airbench": "package airbench", "resnet18": "torchvision"}


def main() -> None:
    arguments = measure.parser(__doc__).parse_args()
    place = measure.surroundings()
    contenders = {name: functools.partial(train, ours, name) for name in ("cnn", *PEERS)}
    contenders |= {peer: functools.partial(train, public, peer) for peer in PEERS.values()}
    times = measure.alternate(contenders, arguments.rounds, units=1 if measure.IS_CPU else 20)
    claims = [(name, peer, "≤ 1") for name, peer in PEERS.items()]
    claims.append(("cnn", PEERS["airbench"], "≤ 0.5"))
    rows = [
        measure.row(
            f"a training step of {name}, batch {BATCH}, float32",
            *(times[name], times[peer], goal),
            images=BATCH,
            names=("ours", peer),
        )
        for name, peer, goal in claims
    ]
    measure.report("encoders", place, rows, times, arguments.out)


def ours(name: str) -> nn.Module:
    """The encoder as the scripts build it, at its usual width."""
    from common.models import JointClassifier, build_encoder

    latent_dim = 128 if name == "cnn" else None  # the others have pooled features
    sizes = {"channels": 3, "image_size": 32, "width": None, "blocks": 0}
    return JointClassifier(build_encoder(name, **sizes, latent_dim=latent_dim), 10)


def public(name: str) -> nn.Module:
    """The same network from another package."""
    if name == "torchvision":
        from torchvision.models import resnet18

        network = resnet18(num_classes=10)
        network.conv1, network.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
        return network.to(memory_format=torch.channels_last)
    from airbench.lib_airbench94 import make_net94

    itself = lambda module: module  # noqa: E731
    with mock.patch.object(nn.Module, "half", itself), mock.patch.object(nn.Module, "cuda", itself):
        return make_net94()


def train(build, name: str, turn: measure.Turn) -> None:
    """Training steps on random images, one a unit."""
    from common.run import runtime

    runtime.start("no", seed=0)  # threads and memory as in the scripts, for both
    network = build(name).to(measure.DEVICE).train()
    learned = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(learned, lr=0.01, momentum=0.9, nesterov=True)
    images = torch.randn(BATCH, 3, 32, 32, device=measure.DEVICE)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(BATCH, device=measure.DEVICE) % 10
    while True:
        turn()
        loss = F.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
