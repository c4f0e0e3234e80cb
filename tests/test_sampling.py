"""Do any number of processes see the same images?"""

import pytest
import torch

from common.config import TrainingConfig
from common.data.datasets import Split
from common.errors import UserError
from common.run.sampling import FEWEST_STEPS, epoch_batches, local_slice, with_epochs


def test_batches_are_a_pure_function_of_seed_and_epoch():
    batches = epoch_batches(103, 10, seed=1, epoch=2, steps=10)
    torch.manual_seed(5)
    assert torch.equal(batches, epoch_batches(103, 10, seed=1, epoch=2, steps=10))
    assert batches.shape == (10, 10)
    assert len(set(batches.flatten().tolist())) == 100
    for seed, epoch in ((1, 3), (2, 2)):
        assert not torch.equal(batches, epoch_batches(103, 10, seed, epoch, steps=10))


def test_the_processes_share_a_batch_without_gap_or_overlap():
    batch = epoch_batches(100, 12, seed=0, epoch=0, steps=8)[0]
    parts = [batch[local_slice(100, 12, process, 3)] for process in range(3)]
    assert torch.equal(torch.cat(parts), batch)
    with pytest.raises(UserError, match="more than the 100 training images"):
        local_slice(100, 101, 0, 1)
    with pytest.raises(UserError, match="multiple of 3"):
        local_slice(100, 10, 0, 3)


@pytest.mark.parametrize(
    ("steps_per_epoch", "epochs", "every"),
    [
        (54_000 // 256, 20, 1),  # MNIST
        (45_000 // 128, 20, 1),  # CIFAR-10
        (50, 20, 1),
        (49, 21, 1),
        (21, 48, 2),
        (1, FEWEST_STEPS, FEWEST_STEPS // 20),
    ],
)
def test_few_images_are_passed_more_often_by_default(steps_per_epoch, epochs, every):
    config = with_epochs(TrainingConfig(), steps_per_epoch)
    assert (config.epochs, config.evaluate_every) == (epochs, every)
    assert config.epochs * steps_per_epoch >= FEWEST_STEPS
    assert 20 <= config.epochs // config.evaluate_every <= 40


def test_a_given_number_of_epochs_is_taken_as_it_is():
    config = with_epochs(TrainingConfig(epochs=3), 10)
    assert (config.epochs, config.evaluate_every) == (3, 1)
    assert with_epochs(TrainingConfig(epochs=3, evaluate_every=2), 10).evaluate_every == 2
    assert with_epochs(TrainingConfig(evaluate_every=7), 10).evaluate_every == 7
    assert with_epochs(config, 1) == config  # once known, it stays


def split_of(*counts: int) -> Split:
    """Images of so many members of each class, mixed; the first pixel is an image's number."""
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    numbers = torch.arange(len(labels), dtype=torch.uint8)
    return Split(numbers[:, None, None, None], torch.arange(len(labels)), labels)


def epochs_of(split: Split, epochs: int, batch_size: int = 10) -> torch.Tensor:
    """The positions that some epochs take, (epochs,N), as the session draws them."""
    steps = (split.per_epoch or len(split)) // batch_size
    drawn = [epoch_batches(len(split), batch_size, 0, n, steps).flatten() for n in range(epochs)]
    return torch.stack(drawn)


def test_a_balanced_split_draws_all_classes_evenly():
    plain = split_of(150, 40, 10, 0)  # a class without images stays without
    balanced = plain.balanced()
    assert balanced.labels.bincount().tolist() == [150, 150, 150]
    positions = epochs_of(balanced, 30)
    assert positions.shape == (30, 200)  # an epoch is as long as before
    counts = balanced.labels[positions].flatten().bincount()
    assert (counts / counts.sum() - 1 / 3).abs().max() < 0.02
    # the label goes with its image, and every image is seen, equally often within its class
    numbers = balanced.images(positions.flatten())[:, 0, 0, 0].long()
    assert torch.equal(plain.labels[numbers], balanced.labels[positions.flatten()])
    seen = numbers.bincount(minlength=200)
    for label, often in ((0, 2000 / 150), (1, 2000 / 40), (2, 2000 / 10)):
        of_class = seen[plain.labels == label].float()
        assert of_class.min() > 0 and of_class.mean() == pytest.approx(often, rel=0.06)


def test_copies_have_numbers_of_their_own_so_that_each_is_augmented_differently():
    balanced = split_of(90, 10).balanced()
    for positions in epochs_of(balanced, 5):
        assert len(positions.unique()) == len(positions)


def test_balanced_classes_are_drawn_as_without_balance():
    plain = split_of(50, 50)
    balanced = plain.balanced()
    assert torch.equal(balanced.labels, plain.labels)
    assert torch.equal(epochs_of(balanced, 3), epochs_of(plain, 3))
