"""Random numbers as a pure function of seed, epoch, image and view, on the device of the images.

A counter-based generator has no state: whichever process, batch or device an image is in, and
whether the run was resumed, its numbers are the same.
"""

import torch
from torch import Tensor

WORD = 2**32 - 1  # the largest number of 32 bits
ROUNDS = 10


class Random:
    """A stream of uniform numbers for each of B images: Philox 4×32-10 (Salmon et al. 2011).

    Args:
        images: int64 (B,), the numbers of the images, at least 0; their device is used.
        seed, epoch, view: what else the numbers depend on, at least 0.
    """

    def __init__(self, images: Tensor, seed: int, epoch: int = 0, view: int = 0):
        self.images, self.seed, self.epoch, self.view = images, seed, epoch, view
        self._blocks = 0  # of four numbers, used up so far

    def uniform(self, count: int, low: float = 0, high: float = 1) -> Tensor:
        """The next `count` numbers of each stream, float32 (B,count) from `low` to `high`.

        Where `low` is 0 they stay below `high`, so that `.long()` gives the numbers 0 … high − 1.
        """
        blocks = -(-count // 4)
        first, self._blocks = self._blocks, self._blocks + blocks
        numbers = torch.arange(first, first + blocks, device=self.images.device)
        epoch, view = (self.images.new_full((1, 1), word) for word in (self.epoch, self.view))
        key = self.seed & WORD, self.seed >> 32
        words = torch.stack(philox(numbers[None], self.images[:, None], epoch, view, key), dim=2)
        unit = (words.flatten(1)[:, :count] >> 8).to(torch.float32) * 2**-24
        return low + (high - low) * unit

    def bits(self) -> Tensor:
        """A random bit of each image and view, bool (B,), that changes with every epoch."""
        always = Random(self.images, self.seed, WORD, self.view)
        return (always.uniform(1)[:, 0] < 0.5) ^ bool(self.epoch % 2)


def philox(
    a: Tensor, b: Tensor, c: Tensor, d: Tensor, key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words of a counter, broadcast, and two of a key to four random words.

    Words are int64 in [0, 2³²).
    """
    a, b, c, d = torch.broadcast_tensors(a, b, c, d)
    low_key, high_key = key
    for _ in range(ROUNDS):
        # the product of two words may wrap around in int64; its bits are right all the same
        first, second = a * 0xD2511F53, c * 0xCD9E8D57
        a, b = ((second >> 32) & WORD) ^ b ^ low_key, second & WORD
        c, d = ((first >> 32) & WORD) ^ d ^ high_key, first & WORD
        low_key, high_key = (low_key + 0x9E3779B9) & WORD, (high_key + 0xBB67AE85) & WORD
    return a, b, c, d
