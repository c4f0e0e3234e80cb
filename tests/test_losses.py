"""Losses against loops of their equations, in blocks, in half types and on several processes."""

import math
import multiprocessing
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing import start_processes
from torch.nn import functional

from common.losses import (
    probability_mae,
    reconstruction_loss,
    supcon_collapse,
    supcon_floor,
    supcon_loss,
)

LABELS = torch.tensor([3, 0, 3, 1, 0, 3, 7])  # 1 and 7 are alone in their class


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors this small only wait for a second thread, long where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def unit_embeddings(images: int, views: int, size: int = 6, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randn(images, views, size, generator=generator, dtype=torch.float64)
    return functional.normalize(raw, dim=-1)


def loss_in_loops(
    embeddings: Tensor, labels: Tensor | None, temperature: float, log_inside: bool = False
) -> Tensor:
    """Equation 2 (or 3, with the log inside) of Khosla et al. 2020, term by term."""
    images, views, _ = embeddings.shape
    labels = range(images) if labels is None else labels.tolist()
    flat = [embeddings[image, view] for image in range(images) for view in range(views)]
    classes = [labels[image] for image in range(images) for view in range(views)]
    terms = []
    for i in range(len(flat)):
        others = [a for a in range(len(flat)) if a != i]
        positives = [p for p in others if classes[p] == classes[i]]
        if not positives:
            continue
        logits = {a: flat[i] @ flat[a] / temperature for a in others}
        denominator = torch.logsumexp(torch.stack(list(logits.values())), 0)
        logs = torch.stack([logits[p] - denominator for p in positives])
        terms.append(-logs.exp().mean().log() if log_inside else -logs.mean())
    return torch.stack(terms).mean() if terms else embeddings.sum() * 0


def loss_and_gradient(embeddings: Tensor, *arguments, loss=supcon_loss) -> tuple[Tensor, Tensor]:
    embeddings = embeddings.clone().requires_grad_()
    value = loss(embeddings, *arguments)
    value.backward()
    return value.detach(), embeddings.grad


# reconstruction and probabilities


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_reconstruction_loss_is_the_stated_mean(alpha):
    images = torch.tensor([-1.0, 0.0, 1.0, 0.5]).view(1, 1, 2, 2)
    reconstructions = torch.tensor([1.0, 0.0, 0.5, 0.5]).view(1, 1, 2, 2)
    expected = alpha * (4 + 0.25) / 4 + (1 - alpha) * (2 + 0.5) / 4
    assert reconstruction_loss(reconstructions, images, alpha).item() == pytest.approx(expected)


def test_reconstruction_loss_of_half_types_is_summed_in_float32():
    images = torch.zeros(4, 3, 64, 64)
    reconstructions = torch.full_like(images, 0.125)
    for dtype in (torch.bfloat16, torch.float16):
        loss = reconstruction_loss(reconstructions.to(dtype), images, 0.5)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(0.5 * 0.125**2 + 0.5 * 0.125, rel=1e-6)


def test_reconstruction_loss_refuses_what_would_broadcast():
    with pytest.raises(ValueError, match="same shape"):
        reconstruction_loss(torch.zeros(2, 1, 4, 4), torch.zeros(2, 3, 4, 4), 0.5)
    with pytest.raises(ValueError, match="alpha"):
        reconstruction_loss(torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 4), 1.5)


def test_probability_mae_is_the_mean_distance_of_softmax_and_one_hot():
    logits = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 3, 2, 2, 1])
    distance = (logits.softmax(1) - functional.one_hot(labels, 4)).abs().mean()
    identity = (2 * (1 - logits.softmax(1)[torch.arange(5), labels]) / 4).mean()
    torch.testing.assert_close(probability_mae(logits, labels), distance)
    torch.testing.assert_close(probability_mae(logits, labels), identity)
    assert torch.autograd.gradcheck(
        lambda logits: probability_mae(logits, labels), logits.requires_grad_()
    )


def test_probability_mae_is_stable_at_both_ends():
    labels = torch.tensor([0])
    sure = torch.tensor([[20.0, 0.0]])  # 1 - p_y = 2e-9 is lost in 1 - softmax in float32
    assert probability_mae(sure, labels).item() == pytest.approx(math.exp(-20), rel=1e-5)
    wrong = torch.tensor([[-1e4, 1e4]], dtype=torch.float16, requires_grad=True)
    loss = probability_mae(wrong, labels)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == 1 and wrong.grad.isfinite().all()


def test_a_second_softmax_leaves_the_floor_that_is_documented():
    perfect = functional.one_hot(torch.arange(10), 10).float()
    floor = 2 * (1 - math.e / (math.e + 9)) / 10
    assert probability_mae(perfect, torch.arange(10)).item() == pytest.approx(floor)
    with pytest.raises(ValueError, match="labels"):
        probability_mae(perfect, torch.arange(9))


# supervised contrastive loss


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("views", [1, 2, 3])
def test_supcon_loss_equals_the_loops(views, temperature):
    embeddings = unit_embeddings(7, views)
    for labels in (LABELS, torch.zeros_like(LABELS), torch.arange(7), None):
        if labels is None and views == 1:
            continue  # refused
        loss = supcon_loss(embeddings, labels, temperature)
        expected = loss_in_loops(embeddings, labels, temperature)
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("labels", [LABELS, None])
def test_supcon_gradient_is_the_loops_gradient(labels):
    def loops(embeddings, *arguments):
        return loss_in_loops(functional.normalize(embeddings, dim=-1), *arguments)

    embeddings = unit_embeddings(7, 2)
    _, gradient = loss_and_gradient(embeddings, labels, 0.1)
    _, expected = loss_and_gradient(embeddings, labels, 0.1, loss=loops)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
@pytest.mark.parametrize(("views", "labels"), [(1, LABELS), (2, LABELS), (3, None)])
def test_supcon_passes_gradcheck(temperature, views, labels):
    embeddings = (2 * unit_embeddings(7, views)).requires_grad_()
    for block_size in (None, 4):
        assert torch.autograd.gradcheck(
            lambda embeddings, block_size=block_size: (
                3 * supcon_loss(embeddings, labels, temperature, block_size)
            ),
            embeddings,
            eps=1e-7,
            atol=1e-4,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.005, 0.02, 0.025, 0.05, 0.07, 0.1, 0.5, 1.0])
def test_supcon_is_finite_and_right_in_every_type(dtype, temperature):
    rounded = unit_embeddings(20, 2).to(dtype)
    labels = torch.arange(20) % 4
    opposite = torch.zeros(2, 2, 6, dtype=dtype)  # the farthest that positives can be apart
    opposite[0, 0, 0], opposite[0, 1, 0], opposite[1, :, 1] = 1, -1, 1
    for embeddings, classes in ((rounded, labels), (opposite, None), (opposite * 0 + 1, None)):
        loss, gradient = loss_and_gradient(embeddings, classes, temperature)
        exact, exact_gradient = loss_and_gradient(embeddings.double(), classes, temperature)
        unit = functional.normalize(embeddings.double(), dim=-1)
        torch.testing.assert_close(exact, loss_in_loops(unit, classes, temperature))
        assert loss.dtype == torch.float32 and gradient.dtype == dtype
        assert loss.item() == pytest.approx(exact.item(), rel=1e-5, abs=1e-5)
        error = (gradient.double() - exact_gradient).abs().max()
        assert error <= 2 * torch.finfo(dtype).eps * exact_gradient.abs().max() + 1e-4


def test_supcon_is_computed_in_float32_under_autocast():
    embeddings = unit_embeddings(20, 2).float()
    expected = loss_and_gradient(embeddings, None, 0.1, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = loss_and_gradient(embeddings, None, 0.1, 7)
    assert torch.equal(result[0], expected[0]) and torch.equal(result[1], expected[1])


def test_supcon_scales_its_input_to_unit_length():
    embeddings = unit_embeddings(7, 2)
    lengths = torch.logspace(-3, 3, 14, dtype=torch.float64).view(7, 2, 1)
    loss, gradient = loss_and_gradient(embeddings * lengths, LABELS, 0.1)
    expected, unit_gradient = loss_and_gradient(embeddings, LABELS, 0.1)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient * lengths, unit_gradient)
    embeddings[2] = 0  # no direction: similarity 0 to all, and no NaN
    loss, gradient = loss_and_gradient(embeddings, LABELS, 0.1)
    torch.testing.assert_close(loss, loss_in_loops(embeddings, LABELS, 0.1))
    assert gradient.isfinite().all()


def test_supcon_shows_a_nan_instead_of_hiding_it():
    embeddings = unit_embeddings(4, 2)
    embeddings[0, 0, 0] = math.nan
    assert supcon_loss(embeddings, None, 0.1).isnan()


@pytest.mark.parametrize("views", [1, 2])
def test_supcon_blocks_change_nothing(views):
    embeddings = unit_embeddings(40, views)
    labels = torch.arange(40) % 9
    labels[:3] = torch.tensor([20, 21, 22])  # without positives where there is one view
    whole = loss_and_gradient(embeddings, labels, 0.1, 10_000)
    torch.testing.assert_close(whole[0], loss_in_loops(embeddings, labels, 0.1))
    for block_size in (1, 7, 20, 40 * views - 1):
        blocked = loss_and_gradient(embeddings, labels, 0.1, block_size)
        torch.testing.assert_close(blocked, whole, rtol=1e-11, atol=1e-13)


def test_supcon_never_holds_all_similarities():
    embeddings = unit_embeddings(256, 2).float()
    labels = torch.arange(256) % 5
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        loss_and_gradient(embeddings, labels, 0.1, 32)
    bytes_of_calls = [event.self_cpu_memory_usage for event in profile.function_events]
    assert 4 * 512 * 32 <= max(bytes_of_calls) <= 2 * 4 * 512 * 32  # of 4 * 512 * 512


def test_supcon_without_any_positive_is_zero_with_zero_gradient():
    for images in (1, 7):
        embeddings = unit_embeddings(images, 1)
        loss, gradient = loss_and_gradient(embeddings, torch.arange(images), 0.1)
        assert loss == 0 and torch.equal(gradient, torch.zeros_like(embeddings))


def test_supcon_takes_views_from_the_second_dimension():
    first, second = unit_embeddings(6, 2).unbind(1)
    right = supcon_loss(torch.stack([first, second], dim=1), None, 0.1)
    torch.testing.assert_close(right, loss_in_loops(torch.stack([first, second], 1), None, 0.1))
    mixed = torch.cat([first, second]).view(6, 2, -1)  # pairs images, not views
    assert (supcon_loss(mixed, None, 0.1) - right).abs() > 0.1


def test_supcon_has_the_log_outside_the_mean_over_positives():
    # similarities of the first image to its positives are 1 and 0, and 0 to the negative
    embeddings = torch.eye(3, dtype=torch.float64)[[0, 0, 1, 2]].unsqueeze(1)
    labels = torch.tensor([0, 0, 0, 1])
    outside = (2 * (math.log(math.e + 2) - 0.5) + math.log(3)) / 3
    inside = (2 * (math.log(math.e + 2) - math.log((math.e + 1) / 2)) + math.log(3)) / 3
    assert loss_in_loops(embeddings, labels, 1.0, log_inside=True).item() == pytest.approx(inside)
    assert supcon_loss(embeddings, labels, 1.0).item() == pytest.approx(outside)
    assert outside - inside > 0.05


def test_supcon_refuses_bad_arguments():
    embeddings = unit_embeddings(7, 2)
    for temperature in (0.0, -0.1, math.nan, 0.002):
        with pytest.raises(ValueError, match="temperature"):
            supcon_loss(embeddings, LABELS, temperature)
    for shape in ((14, 6), (0, 2, 6), (7, 2, 3, 2)):
        with pytest.raises(ValueError, match=r"\(B,V,D\)"):
            supcon_loss(torch.zeros(shape), LABELS, 0.1)
    with pytest.raises(ValueError, match="2 views"):
        supcon_loss(embeddings[:, :1], None, 0.1)
    for labels in (LABELS[:6], LABELS.repeat(2), LABELS[:, None]):
        with pytest.raises(ValueError, match="labels"):
            supcon_loss(embeddings, labels, 0.1)
    with pytest.raises(ValueError, match="block_size"):
        supcon_loss(embeddings, LABELS, 0.1, 0)


# the two lines beside the loss


@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
def test_supcon_collapse_is_the_loss_of_equal_embeddings(temperature):
    embeddings = torch.ones(7, 2, 6)
    for labels in (LABELS, None):
        loss = supcon_loss(embeddings, labels, temperature).item()
        assert loss == pytest.approx(supcon_collapse(7, 2), rel=1e-5)
    assert supcon_collapse(256, 2) == pytest.approx(6.2364, abs=1e-4)
    with pytest.raises(ValueError, match="pair"):
        supcon_collapse(1, 1)


@pytest.mark.parametrize("temperature", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("counts", [[2, 2, 2], [3, 1, 5], [4], [1, 1, 1]])
@pytest.mark.parametrize("views", [1, 2])
def test_supcon_floor_is_the_loss_of_a_simplex_of_points(temperature, counts, views):
    simplex = torch.eye(len(counts), dtype=torch.float64) - 1 / len(counts)
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    embeddings = (simplex + (len(counts) == 1))[labels].unsqueeze(1).expand(-1, views, -1)
    loss = supcon_loss(embeddings, labels, temperature).item()
    floor = supcon_floor(counts, sum(counts), views, temperature)  # one batch of all images
    assert floor == pytest.approx(loss, rel=1e-9, abs=1e-12)


def test_supcon_floor_is_not_undercut_and_is_the_stated_limit():
    labels = torch.arange(8) % 4
    embeddings = unit_embeddings(8, 2, size=3).requires_grad_()
    floor = supcon_floor([2] * 4, 8, 2, 0.5)
    for _ in range(300):
        loss = supcon_loss(embeddings, labels, 0.5)
        assert loss.item() >= floor - 1e-12
        (gradient,) = torch.autograd.grad(loss, embeddings)
        embeddings = (embeddings - gradient).detach().requires_grad_()
    assert loss.item() == pytest.approx(floor, abs=1e-2)
    assert supcon_floor([16] * 8, 128, 2, 0.05) == pytest.approx(math.log(256 / 8 - 1))
    # without labels each image is its own class
    lone = math.log(1 + 510 * math.exp(-1 / 0.1))
    assert supcon_floor(torch.ones(60_000), 256, 2, 0.1) == pytest.approx(lone, rel=1e-3)
    with pytest.raises(ValueError, match="temperature"):
        supcon_floor([2, 2], 4, 2, 0)
    with pytest.raises(ValueError, match="4 images are fewer than the 5 of a batch"):
        supcon_floor([2, 2], 5, 2, 0.1)


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("counts", [[30] * 40, [5, 200, 80, 1, 14], [10] * 200])
def test_supcon_floor_is_the_mean_over_random_batches(counts, views):
    """With many classes a batch has some of them twice and others not at all."""
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    simplex = torch.eye(len(counts), dtype=torch.float64) - 1 / len(counts)
    torch.manual_seed(0)
    total, anchors = 0.0, 0
    for _ in range(600):
        batch = labels[torch.randperm(len(labels))[:64]]
        embeddings = functional.normalize(simplex[batch], dim=1).unsqueeze(1).expand(-1, views, -1)
        valid = 64 if views > 1 else int((batch.bincount()[batch] > 1).sum())
        total += valid * supcon_loss(embeddings, batch, 0.1).item()
        anchors += valid
    floor = supcon_floor(counts, 64, views, 0.1)
    assert floor == pytest.approx(total / anchors, rel=0.05)


# several processes

CASES = {  # name: (views, labels of the global batch); the last images are the last ranks'
    "labels": (2, torch.tensor([0, 1, 0, 2, 1, 0, 3, 2, 0, 1, 1, 4])),
    "lone_anchors": (1, torch.tensor([0, 0, 1, 0, 5, 1, 6, 0, 7, 8, 9, 10])),
    "simclr": (2, None),
}


def case_step(case: str, rank: int = 0, world_size: int = 1) -> tuple[Tensor, Tensor]:
    """Loss and weight gradient of a linear network on the rank's share of the batch."""
    views, labels = CASES[case]
    share = slice(rank * 12 // world_size, (rank + 1) * 12 // world_size)
    network = nn.Linear(6, 4, bias=False)
    with torch.no_grad():
        network.weight.copy_(unit_embeddings(4, 1, seed=1)[:, 0])
    images = unit_embeddings(12, views)[share].float()
    loss = supcon_loss(network(images), None if labels is None else labels[share], 0.1, 5)
    loss.backward()
    if dist.is_initialized():  # what DistributedDataParallel does, without its seconds of import
        dist.all_reduce(network.weight.grad)
        network.weight.grad /= world_size
    return loss.detach(), network.weight.grad


def run_rank(rank: int, folder) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    for world_size in (1, 2, 4):
        if rank >= world_size:
            continue
        address = f"file://{folder}/store{world_size}"
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world_size)
        results = {case: case_step(case, rank, world_size) for case in CASES}
        torch.save(results, folder / f"{world_size}_{rank}.pt")
        dist.destroy_process_group()


def test_supcon_on_1_2_and_4_processes_is_that_of_one(tmp_path):
    multiprocessing.set_forkserver_preload(["torch"])  # imported once, not four times
    start_processes(run_rank, (tmp_path,), nprocs=4, start_method="forkserver")
    for case in CASES:
        expected_loss, expected = case_step(case)
        for world_size in (1, 2, 4):
            files = [tmp_path / f"{world_size}_{rank}.pt" for rank in range(world_size)]
            losses, gradients = zip(*(torch.load(file)[case] for file in files), strict=True)
            assert torch.stack(losses).mean().item() == pytest.approx(
                expected_loss.item(), rel=1e-5
            )
            for gradient in gradients:
                ratio = (gradient.norm() / expected.norm()).item()
                cosine = functional.cosine_similarity(gradient.ravel(), expected.ravel(), dim=0)
                assert ratio == pytest.approx(1, abs=1e-5), (case, world_size)
                assert cosine.item() == pytest.approx(1, abs=1e-5), (case, world_size)
