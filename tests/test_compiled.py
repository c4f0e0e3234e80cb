"""A compiled step computes what the plain one does: augmentation, network, loss and gradients."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import run

from common.data import datasets


@pytest.mark.parametrize(
    ("method", "channels", "words"),
    [("ae", 1, ()), ("joint", 3, ("--augment=cutout",)), ("supcon", 3, ())],
)
def test_a_compiled_run_ends_like_a_plain_one(
    tmp_path, monkeypatch, capsys, method, channels, words
):
    random = np.random.RandomState(0)
    images = random.randint(0, 256, (60, channels, 16, 16)).astype(np.uint8)
    labels = np.arange(60) % 4
    arrays = (images, labels, images[:8], labels[:8], tuple("abcd"), "made here")
    monkeypatch.setattr(datasets, "read", lambda *words: datasets.Arrays(*arrays))
    words = ("--dataset=cifar10", "--image_size=16", "--batch_size=16", "--width=4", *words)
    words += ("--test=False", "--precision=no", "--warmup_epochs=0", "--log_every=1")
    graphs = []
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *w, **o: graphs.append(w) or compile_(*w, **o))
    weights = []
    for compiled in (False, True):
        folder = tmp_path / str(compiled)
        run(method, folder, *words, f"--compile={compiled}")
        weights.append(load_file(folder / "encoder.safetensors"))
    assert len(graphs) == 1
    assert capsys.readouterr().out.count("compiled the training step in") == 1
    for name, value in weights[0].items():
        assert torch.allclose(value, weights[1][name], rtol=1e-3, atol=1e-4), name
