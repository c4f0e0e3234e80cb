"""Two random views of each image: ours in batches against one image at a time, and kornia.

The recipe is SimCLR's and SupCon's for small color images: resized crop, mirror, jitter of four
colors for 80 %, gray for 20 %, normalized. All have the same cores: image-by-image transforms as
many workers as there are cores, batches as many threads. What torchvision and lightly do to PIL
images begins with `Image.fromarray`, as in torchvision's CIFAR10. That our operations equal
torchvision's for equal parameters is proved in tests/test_augmentation.py.

    python benchmarks/augmentation.py --out runs/bench/augmentation.json
"""

from collections.abc import Callable, Iterable

import measure
import numpy as np
import torch
from PIL import Image

BATCH, SIZE = 256, 32
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)
JITTER = (0.4, 0.4, 0.4, 0.1)


def main() -> None:
    arguments = measure.parser(__doc__).parse_args()
    place = measure.surroundings()
    contenders = {
        "ours": ours,
        "torchvision (PIL)": torchvision_pil,
        "torchvision v2": torchvision_v2,
        "lightly": lightly,
        "kornia": kornia,
    }
    # long turns: what the workers have in their queues at either end must not matter
    times = measure.alternate(contenders, arguments.rounds, seconds=2.0)
    goals = {"torchvision (PIL)": "≥ 8", "torchvision v2": "≥ 8", "lightly": "≥ 8", "kornia": "≥ 4"}
    rows = [
        measure.row(
            "two views, images per second, against " + name,
            *(times["ours"], times[name], goal),
            images=BATCH,
            names=("ours", name),
        )
        for name, goal in goals.items()
    ]
    measure.report("augmentation", place, rows, times, arguments.out)


def pictures() -> np.ndarray:
    """uint8 (N,32,32,3), as torchvision's CIFAR10 holds them."""
    return measure.arrays(10_000, 3, SIZE).train_images.transpose(0, 2, 3, 1).copy()


def ours(turn: measure.Turn) -> None:
    from common import models
    from common.data import augmentation
    from common.data.philox import Random
    from common.run import runtime

    runtime.start("no", seed=0)
    images = torch.from_numpy(pictures()).permute(0, 3, 1, 2).contiguous().to(measure.DEVICE)
    preprocess = models.Preprocess(MEAN, STD).to(measure.DEVICE)
    epoch = -1
    while True:
        epoch += 1
        for positions in torch.randperm(len(images)).split(BATCH)[:-1]:
            turn()
            positions = positions.to(measure.DEVICE)
            batch = images[positions]
            for view in range(2):
                random = Random(positions, 0, epoch, view)
                preprocess(augmentation.augment(batch, random, "contrastive", True))


class Pictures(torch.utils.data.Dataset):
    """Images one at a time: what `transform` makes of a PIL image, and a label."""

    def __init__(self, transform: Callable):
        self.data, self.transform = pictures(), transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[list, int]:
        return self.transform(Image.fromarray(self.data[index])), index % 10


def worker_batches(transform: Callable, batch_size: int, workers: int) -> Iterable:
    """Batches of views and labels from workers, as training code usually has them."""
    return torch.utils.data.DataLoader(
        Pictures(transform),
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=True,
        multiprocessing_context="fork",
    )


def one_at_a_time(turn: measure.Turn, transform: Callable) -> None:
    """As many workers as there are cores: they do all the work, the main process only waits."""
    batches = worker_batches(transform, BATCH, measure.CORES)
    while True:
        for views, _ in batches:
            turn()
            for view in views:
                view.to(measure.DEVICE, non_blocking=True)


def torchvision_pil(turn: measure.Turn) -> None:
    one_at_a_time(turn, transform_pil())


def transform_pil() -> Callable:
    """Two views of a PIL image by torchvision."""
    from torchvision import transforms

    one = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, SCALE, RATIO),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([transforms.ColorJitter(*JITTER)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    return lambda image: [one(image), one(image)]


def torchvision_v2(turn: measure.Turn) -> None:
    """The order that torchvision's page on v2 advises: tensors of bytes, floats at the end."""
    from torchvision.transforms import v2

    one = v2.Compose(
        [
            v2.RandomResizedCrop(SIZE, SCALE, RATIO, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(*JITTER)], p=0.8),
            v2.RandomGrayscale(p=0.2),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    to_image = v2.ToImage()

    def both(picture: Image.Image) -> list:
        image = to_image(picture)
        return [one(image), one(image)]

    one_at_a_time(turn, both)


def lightly(turn: measure.Turn) -> None:
    from lightly.transforms import SimCLRTransform

    transform = SimCLRTransform(
        input_size=SIZE,
        cj_strength=0.5,
        min_scale=SCALE[0],
        gaussian_blur=0.0,
        normalize={"mean": MEAN, "std": STD},
    )
    one_at_a_time(turn, transform)


def kornia(turn: measure.Turn) -> None:
    from kornia import augmentation

    views = [
        augmentation.AugmentationSequential(
            augmentation.RandomResizedCrop((SIZE, SIZE), SCALE, RATIO),
            augmentation.RandomHorizontalFlip(),
            augmentation.ColorJitter(*JITTER, p=0.8),
            augmentation.RandomGrayscale(p=0.2),
            augmentation.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
        ).to(measure.DEVICE)
        for _ in range(2)
    ]
    images = torch.from_numpy(pictures()).permute(0, 3, 1, 2).contiguous().to(measure.DEVICE)
    while True:
        for positions in torch.randperm(len(images)).split(BATCH)[:-1]:
            turn()
            batch = images[positions.to(measure.DEVICE)].float() / 255
            for view in views:
                view(batch)


if __name__ == "__main__":
    main()
