"""Do any number of processes see the same images?"""

import pytest
import torch

from common.errors import UserError
from common.run.sampling import epoch_batches, local_slice


def test_batches_are_a_pure_function_of_seed_and_epoch():
    batches = epoch_batches(103, 10, seed=1, epoch=2)
    torch.manual_seed(5)
    assert torch.equal(batches, epoch_batches(103, 10, seed=1, epoch=2))
    assert batches.shape == (10, 10)
    assert len(set(batches.flatten().tolist())) == 100
    for seed, epoch in ((1, 3), (2, 2)):
        assert not torch.equal(batches, epoch_batches(103, 10, seed=seed, epoch=epoch))


def test_the_processes_share_a_batch_without_gap_or_overlap():
    batch = epoch_batches(100, 12, seed=0, epoch=0)[0]
    parts = [batch[local_slice(100, 12, process, 3)] for process in range(3)]
    assert torch.equal(torch.cat(parts), batch)
    with pytest.raises(UserError, match="more than the 100 training images"):
        local_slice(100, 101, 0, 1)
    with pytest.raises(UserError, match="multiple of 3"):
        local_slice(100, 10, 0, 3)
