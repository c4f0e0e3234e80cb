"""A compiled step computes what the plain one does: augmentation, network, loss and gradients."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import run

from common.data import datasets


# Each script as one graph of PyTorch's own operations, and one as the compiler's machine code: to
# make that takes half a minute of a processor.
@pytest.mark.parametrize(
    ("method", "channels", "backend"),
    [
        ("ae", 1, "aot_eager"),
        ("joint", 3, "aot_eager"),
        ("supcon", 1, "aot_eager"),
        ("supcon", 3, "aot_eager"),
        ("ae", 1, "inductor"),
    ],
)
def test_a_compiled_run_ends_like_a_plain_one(
    tmp_path, monkeypatch, capsys, method, channels, backend
):
    random = np.random.RandomState(0)
    images = random.randint(0, 256, (60, channels, 16, 16)).astype(np.uint8)
    labels = np.arange(60) % 4
    arrays = (images, labels, images[:8], labels[:8], tuple("abcd"), "made here")
    monkeypatch.setattr(datasets, "read", lambda *words: datasets.Arrays(*arrays))
    words = ("--dataset=cifar10", "--image_size=16", "--batch_size=16", "--width=4")
    words += ("--test=False", "--precision=no", "--warmup_epochs=0", "--log_every=1")
    compile_, started = torch.compile, []

    def compile_whole(compute, *, dynamic, mode):
        started.append(mode)
        return compile_(compute, dynamic=dynamic, backend=backend, fullgraph=True)

    monkeypatch.setattr(torch, "compile", compile_whole)
    weights = []
    for compiled in (False, True):
        folder = tmp_path / str(compiled)
        run(method, folder, *words, f"--compile={compiled}")
        weights.append(load_file(folder / "encoder.safetensors"))
    assert started == ["default"]
    assert capsys.readouterr().out.count("compiled the training step in") == 1
    for name, value in weights[0].items():
        assert torch.allclose(value, weights[1][name], rtol=1e-3, atol=1e-4), name
