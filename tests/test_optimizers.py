import copy
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from common import models, optimizers
from common.optimizers import Muon, orthogonalize, schedule
from common.run import runtime


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_without_warmup_it_falls_from_the_peak_to_zero(name):
    assert schedule(name, 0, 100, 0) == 1
    assert schedule(name, 50, 100, 0) == pytest.approx(0.5)
    assert schedule(name, 100, 100, 0) == pytest.approx(0)
    quarter = (1 + math.sqrt(0.5)) / 2 if name == "cosine" else 0.75
    assert schedule(name, 25, 100, 0) == pytest.approx(quarter)


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_warmup_ends_on_the_curve_without_a_jump(name):
    shares = [schedule(name, step, 100, 10) for step in range(100)]
    assert shares[0] == pytest.approx(0.1)
    assert shares[:9] == sorted(shares[:9])
    assert shares[9] == schedule(name, 9, 100, 0)
    assert shares[9:] == sorted(shares[9:], reverse=True)
    largest_step = max(abs(a - b) for a, b in itertools.pairwise(shares[9:]))
    assert largest_step <= math.pi / 200 + 1e-9  # the steepest slope of the cosine


def network() -> nn.Module:
    encoder = models.build_encoder(
        "airbench", channels=1, image_size=16, width=4, blocks=0, latent_dim=8
    )
    return models.JointClassifier(encoder, 3)


def build(name: str, module: nn.Module, scaler=None) -> torch.optim.Optimizer:
    rates = {"learning_rate": 0.2, "adamw_learning_rate": 0.003, "weight_decay": 0.01}
    return optimizers.build(SimpleNamespace(optimizer=name, **rates), module, scaler)


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
def test_every_parameter_that_learns_is_in_one_group_and_follows_the_schedule(name):
    module = network()
    optimizer = build(name, module)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in module.parameters() if p.requires_grad)
    optimizers.set_learning_rate(optimizer, 0.5)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == ([0.1, 0.0015] if name == "muon" else [0.1])


def test_muon_takes_the_weights_in_front_of_a_batch_norm():
    module = network()
    matrices = {id(p) for p in build("muon", module).param_groups[0]["params"]}
    names = [name for name, p in module.named_parameters() if id(p) in matrices]
    assert len(names) == 6 and all(name.startswith("encoder.stages.") for name in names)


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (5, 5)])
def test_an_orthogonalized_matrix_keeps_its_singular_vectors(shape):
    left, values, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    values = torch.linspace(0.3, 1, len(values))
    result = left.mT @ orthogonalize(left @ torch.diag(values) @ right, 3) @ right.mT
    assert torch.allclose(result, result.diag().diag(), atol=1e-4)
    assert ((result.diag() > 0.6) & (result.diag() < 1.3)).all()


def test_a_step_of_muon_is_what_its_docstring_says():
    weight = nn.Parameter(torch.randn(4, 2, 3, 3))
    optimizer = Muon([weight], 0.1, [], 0.01, momentum=0.6, weight_decay=0.1)
    expected, momentum = weight.detach().clone(), torch.zeros_like(weight)
    for _ in range(3):
        gradient = torch.randn_like(weight)
        weight.grad = gradient.clone()
        optimizer.step()
        momentum = 0.6 * momentum + gradient
        expected *= 2 / expected.norm()
        expected -= 0.1 * orthogonalize((gradient + 0.6 * momentum).flatten(1)).view(4, 2, 3, 3)
        assert torch.allclose(weight, expected, atol=1e-6)


def test_the_length_of_the_gradient_does_not_matter():
    weights = [nn.Parameter(torch.ones(3, 5)) for _ in range(2)]
    gradient = torch.randn(3, 5)
    for weight, scale in zip(weights, (1, 1000), strict=True):
        weight.grad = scale * gradient
        Muon([weight], 0.1, [], 0.01).step()
    assert torch.allclose(*weights, atol=1e-5)


def test_beside_muon_the_others_are_trained_as_adamw_does():
    weight, bias, alone = (nn.Parameter(torch.ones(shape)) for shape in ((2, 3), (3,), (3,)))
    both = Muon([weight], 0.1, [bias], 0.01, weight_decay=0.1)
    adamw = torch.optim.AdamW([alone], 0.01, weight_decay=0.1)
    for _ in range(3):
        weight.grad, bias.grad = torch.randn(2, 3), torch.randn(3)
        alone.grad = bias.grad.clone()
        both.step()
        adamw.step()
    assert torch.equal(bias, alone) and not torch.equal(bias, torch.ones(3))


def test_without_a_gradient_nothing_moves():
    weight = nn.Parameter(torch.ones(2, 3))
    Muon([weight], 0.1, [], 0.01, weight_decay=0.5).step()
    assert torch.equal(weight, torch.ones(2, 3))


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
def test_a_step_that_overflows_is_left_out_whole_even_the_first(name):
    """With a real scaler of fp16, through Accelerate; the others are as if there were none."""
    runtime.start("no", seed=0)
    first = network()
    second = copy.deepcopy(first)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scaled = AcceleratedOptimizer(build(name, first, scaler), scaler=scaler)
    plain = build(name, second)
    noise = [torch.full_like(p, 7e7) for p in first.parameters()]  # for memory that nobody fills
    del noise
    for factor in (math.inf, 1.0, math.inf, 1.0):
        before = copy.deepcopy(first.state_dict())
        images = torch.randn(4, 1, 16, 16)
        scaler.scale(first.train()(images).square().sum() * factor).backward()
        scaler.unscale_(scaled.optimizer)
        scaled.step()
        scaled.zero_grad()
        if factor == 1:
            second.train()(images).square().sum().backward()
            plain.step()
            plain.zero_grad()
        for (key, value), other in zip(first.named_parameters(), second.parameters(), strict=True):
            assert torch.equal(value, before[key]) == (factor != 1 or not value.requires_grad), key
            assert torch.allclose(value, other, atol=1e-6), key
