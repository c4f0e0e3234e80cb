"""Batches of images that do not fit on the GPU, fetched while it computes."""

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

AHEAD = 3  # batches


def fetch_ahead(
    fetch: Callable[[Tensor], Tensor], order: Tensor, device: torch.device
) -> Iterator[Tensor]:
    """`fetch` of each row of `order`, in turn, on the device.

    A thread fetches them into pinned memory, from which a copy does not make the host wait.
    """

    def pinned(row: Tensor) -> Tensor:
        images = fetch(row)
        return images.pin_memory() if device.type == "cuda" else images

    rows = iter(order)
    with ThreadPoolExecutor(1, "images") as thread:
        fetched = deque(thread.submit(pinned, row) for row in itertools.islice(rows, AHEAD))
        while fetched:
            images = fetched.popleft().result()
            fetched.extend(thread.submit(pinned, row) for row in itertools.islice(rows, 1))
            yield images.to(device, non_blocking=True)
