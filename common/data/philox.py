"""Random numbers as a pure function of seed, epoch, image and view, on the device of the images.

A counter-based generator has no state: whichever process, batch or device an image is in, and
whether the run was resumed, its numbers are the same.
"""

import torch
from torch import Tensor

WORD = 2**32 - 1  # the largest number of 32 bits
ROUNDS = 10
AT_ONCE = 10  # blocks of four numbers, as many as a view needs


class Random:
    """A stream of uniform numbers for each of B images: Philox 4×32-10 (Salmon et al. 2011).

    Args:
        images: int64 (B,), the numbers of the images, at least 0; their device is used.
        seed, epoch, view: what else the numbers depend on, at least 0. The epoch becomes a tensor
            (), so that a compiled step is not compiled anew for each of them.
    """

    def __init__(self, images: Tensor, seed: int, epoch: int | Tensor = 0, view: int = 0):
        self.images, self.seed, self.view = images, seed, view
        self.epoch = epoch if isinstance(epoch, Tensor) else images.new_full((), epoch)
        self._blocks = 0  # of four numbers, used up so far
        self._first: Tensor | None = None  # what `_at_once` has drawn

    def uniform(self, count: int, low: float = 0, high: float = 1) -> Tensor:
        """The next `count` numbers of each stream, float32 (B,count) from `low` to `high`.

        Where `low` is 0 they stay below `high`, so that `.long()` gives the numbers 0 … high − 1.
        """
        first, end = self._blocks, self._blocks + -(-count // 4)
        self._blocks = end
        if end <= AT_ONCE:
            words = self._at_once()[:, first:end]
        else:
            words = self._draw(torch.arange(first, end, device=self.images.device), self.epoch)
        return low + (high - low) * _unit(words.flatten(1)[:, :count])

    def bits(self) -> Tensor:
        """A random bit of each image, bool (B,).

        In the first view it changes with every epoch; in the others it is drawn anew, so that all
        pairs of bits of two views occur.
        """
        bits = _unit(self._at_once()[:, AT_ONCE, 0]) < 0.5
        return bits ^ (self.epoch % 2 == 1) if self.view == 0 else bits

    def _at_once(self) -> Tensor:
        """The first AT_ONCE blocks, and the one of `bits`; int64 (B,blocks,4).

        In the first view the latter is the same in every epoch.
        They are drawn together, since a GPU takes as long for a few numbers as for many.
        """
        if self._first is None:
            numbers = torch.arange(AT_ONCE + 1, device=self.images.device)
            is_last = numbers == AT_ONCE
            number, epoch = (0, WORD) if self.view == 0 else (WORD, self.epoch)
            epochs = torch.where(is_last, epoch, self.epoch)
            self._first = self._draw(torch.where(is_last, number, numbers), epochs)
        return self._first

    def _draw(self, numbers: Tensor, epoch: Tensor) -> Tensor:
        key, view = (self.seed & WORD, self.seed >> 32), self.images.new_full((), self.view)
        return torch.stack(philox(numbers, self.images[:, None], epoch, view, key), dim=2)


def _unit(words: Tensor) -> Tensor:
    return (words >> 8).to(torch.float32) * 2**-24


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
