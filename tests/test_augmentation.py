"""Does every operation equal torchvision's, and is every draw a pure function of its seed?"""

import math
from typing import get_args

import pytest
import torch
import torchvision.transforms.v2.functional as reference
from sklearn.datasets import load_digits
from torchvision.transforms import InterpolationMode

from common.data import augmentation, color
from common.data.philox import Random, philox

SIZE = 32
COLORS = torch.tensor(
    [
        *([0, 0, 0], [1, 1, 1], [0.5, 0.5, 0.5], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]),
        *([0, 1, 1], [1, 0, 1], [1e-6, 0, 0], [0.3, 0.3, 0.3000001]),
        *([0.2, 0.7, 0.7], [0.7, 0.2, 0.7]),
    ]
)


@pytest.fixture(autouse=True, scope="module")
def one_thread():  # thousands of tiny tensors: a second thread, on busy cores, only waits
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def streams(count: int, seed: int = 0) -> Random:
    return Random(torch.arange(count), seed)


def uniform(low: float, high: float, *shape: int, seed: int = 1) -> torch.Tensor:
    return low + (high - low) * torch.rand(shape, generator=seeded(seed))


def pictures(batch_size: int, channels: int = 3, size: int = 12) -> torch.Tensor:
    """Noise with a line of black, white, gray, pure and nearly gray pixels; two plain images."""
    images = torch.rand((batch_size, channels, size, size), generator=seeded(7))
    images.flatten(2)[:, :, : len(COLORS)] = COLORS[:, :channels].T
    images[0], images[1] = 0, 1
    return images


def digits() -> torch.Tensor:
    images = torch.from_numpy(load_digits().images[:200]).float()[:, None] / 16
    return torch.nn.functional.interpolate(images, size=(SIZE, SIZE), mode="bilinear")


def one_by_one(operation, images: torch.Tensor, *parameters) -> torch.Tensor:
    return torch.stack(
        [operation(image, *p) for image, *p in zip(images, *parameters, strict=True)]
    )


def assert_equal(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-6) -> None:
    assert actual.shape == expected.shape and actual.dtype == torch.float32
    assert (actual - expected).abs().max() <= tolerance
    assert actual.min() >= 0 and actual.max() <= 1


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_each_color_operation_equals_torchvision(name, channels):
    images = pictures(200, channels)
    if name == "hue":
        factors = uniform(-0.5, 0.5, 200)
        extremes = torch.tensor([-0.5, 0.5, 0.0, 1 / 6, -1 / 6, 1 / 3, -1 / 3])
    else:
        factors, extremes = uniform(0, 3, 200), torch.tensor([0.0, 1.0, 2.0, 0.5, 10.0])
    factors[: 10 * len(extremes)] = extremes.repeat(10)
    if name == "hue":
        actual = color.adjust_hue_(images.clone(), factors)
    else:
        operation = torch.full((200,), getattr(color, name.upper()))
        actual = color.blend_(images.clone(), factors, operation)
    expected = one_by_one(getattr(reference, f"adjust_{name}"), images, factors.tolist())
    assert_equal(actual, expected)


def test_colors_alone_leave_the_callers_images_alone():
    images = pictures(30)
    before = images.clone()
    everybody = torch.ones(30, dtype=torch.bool)
    factors, order = color.draw_jitter(streams(30), (0.8, 0.8, 0.8, 0.5))
    chosen = {"jitters": everybody, "factors": factors, "order": order, "grayscale": everybody}
    drawn = augmentation.Draw(**chosen)
    assert not torch.equal(augmentation.apply(images, drawn), before)
    assert torch.equal(images, before)


def test_gray_equals_torchvision():
    images = pictures(10)
    assert_equal(color.rgb_to_grayscale(images), reference.rgb_to_grayscale(images, 3), tolerance=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_color_jitter_equals_torchvision_in_each_images_own_order(channels):
    images = pictures(300, channels)
    factors, order = color.draw_jitter(streams(300), (0.8, 0.8, 0.8, 0.5))
    jitters = torch.rand(300, generator=seeded(3)) < 0.8
    operations = [
        reference.adjust_brightness,
        reference.adjust_contrast,
        reference.adjust_saturation,
        reference.adjust_hue,
    ]

    def jitter(image, chosen, factors, order):
        for operation in order if chosen else []:
            image = operations[operation](image, factors[operation])
        return image

    assert len(set(map(tuple, order.tolist()))) == math.factorial(4)
    expected = one_by_one(jitter, images, jitters.tolist(), factors.tolist(), order.tolist())
    actual = color.color_jitter_(images.clone(), jitters, factors, order)
    assert_equal(actual, expected, tolerance=1e-5)
    assert torch.equal(actual[~jitters], images[~jitters])
    # what a GPU computes instead, where no shape may depend on a value
    everything = color._jitter_all_(images.clone(), jitters, factors, order)
    assert_equal(everything, expected, tolerance=1e-5)
    assert (actual - images)[jitters].abs().mean() > 0.1
    nobody = torch.zeros(300, dtype=torch.bool)
    actual = color.color_jitter_(images.clone(), nobody, factors, order)
    assert torch.equal(actual, images)


@pytest.mark.parametrize("antialias", [True, False])
def test_resized_crop_equals_torchvision_up_to_its_border(antialias):
    images = pictures(300, 3, SIZE)
    boxes = augmentation.draw_boxes(streams(300), SIZE, (0.01, 1.0), (3 / 4, 4 / 3))
    boxes[:2] = torch.tensor([[0.0, 0, SIZE, SIZE], [SIZE - 1, SIZE - 1, 1, 1]])

    def crop(image, box):
        return reference.resized_crop(image, *map(int, box), [SIZE, SIZE], antialias=antialias)

    expected = one_by_one(crop, images, boxes.tolist())
    # positions are fractions of a pixel in float32: 32 * 2^-24 beside noise of full contrast
    assert_equal(augmentation.resized_crop(images, boxes), expected, tolerance=1e-5)


def test_affine_equals_torchvision():
    images = torch.rand((100, 1, 20, 16), generator=seeded())
    angles, shifts = uniform(-180, 180, 100), uniform(-6, 6, 100, 2)
    angles[:3], shifts[:2] = torch.tensor([0.0, 90, 15]), 0

    def affine(image, angle, shift):
        return reference.affine(image, angle, shift, 1.0, [0.0], InterpolationMode.BILINEAR)

    expected = one_by_one(affine, images, angles.tolist(), shifts.tolist())
    assert_equal(augmentation.affine(images, angles, shifts), expected, tolerance=1e-5)


def test_affine_with_a_box_is_crop_then_affine_in_one_resampling():
    # on a plane, bilinear sampling is exact, so one resampling equals two away from the borders
    ramp = torch.arange(SIZE) / SIZE
    images = (0.3 * ramp + 0.6 * ramp[:, None]).expand(50, 1, SIZE, SIZE)
    boxes = augmentation.draw_boxes(streams(50), SIZE, (0.5, 1.0), (3 / 4, 4 / 3))
    angles, shifts = uniform(-15, 15, 50), uniform(-2, 2, 50, 2)
    cropped = augmentation.resized_crop(images, boxes)
    expected = augmentation.affine(cropped, angles, shifts)
    actual = augmentation.affine(images, angles, shifts, boxes)
    inner = (..., slice(9, -9), slice(9, -9))
    assert_equal(actual[inner], expected[inner], tolerance=1e-5)
    still = torch.zeros(50)
    actual = augmentation.affine(images, still, torch.zeros(50, 2), boxes)
    assert_equal(actual[inner], cropped[inner], tolerance=1e-5)


@pytest.mark.parametrize("reflect", [True, False])
def test_pad_and_crop_moves_pixels_exactly(reflect):
    images = pictures(100)
    offsets = torch.randint(0, 9, (100, 2), generator=seeded())
    offsets[:3] = torch.tensor([[0, 0], [8, 8], [4, 4]])

    def crop(image, offset):
        padded = reference.pad(image, [4], padding_mode="reflect" if reflect else "constant")
        return reference.crop(padded, *offset, *image.shape[-2:])

    expected = one_by_one(crop, images, offsets.tolist())
    actual = augmentation.pad_and_crop(images, offsets, 4, reflect)
    assert_equal(actual, expected, tolerance=0)
    assert torch.equal(actual[2], images[2])


def test_flip_and_to_float_equal_torchvision():
    images, flips = pictures(20), torch.arange(20) % 3 == 0
    expected = torch.stack([x.flip(-1) if f else x for x, f in zip(images, flips, strict=True)])
    assert torch.equal(augmentation.horizontal_flip(images, flips), expected)
    every_byte = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    expected = reference.to_dtype(every_byte, torch.float32, scale=True)
    assert_equal(augmentation.to_float(every_byte), expected, tolerance=1e-7)


@pytest.mark.parametrize("side", [1, 4, 5, 30])
def test_cutout_equals_torchvisions_erase(side):
    images = pictures(144)
    centers = torch.cartesian_prod(torch.arange(12), torch.arange(12))

    def erased(image, center):  # which takes no square that leaves the image
        first, last = (center - side // 2).clamp(min=0), (center - side // 2 + side).clamp(max=12)
        fill = torch.tensor(0.5)
        return reference.erase(image, *first.tolist(), *(last - first).tolist(), fill)

    expected = one_by_one(erased, images, centers)
    assert torch.equal(augmentation.cutout(images, centers, side, 0.5), expected)


CASES = [(kind, flip, color) for kind in get_args(augmentation.Kind)
         for flip in (False, True) for color in (False, True)]  # fmt: skip


@pytest.mark.parametrize("kind, flip, color", CASES)
def test_a_pipeline_keeps_shape_and_range_and_depends_on_the_seed_alone(kind, flip, color):
    everything = torch.arange(64)

    def view(images, seed, numbers=everything):
        return augmentation.augment(images, Random(numbers, seed), kind, flip)

    images = pictures(64, 3 if color else 1, SIZE).mul(255).round().to(torch.uint8)
    before = images.clone()
    whole = view(images, 0)
    assert whole.shape == images.shape and whole.dtype == torch.float32
    assert whole.min() >= 0 and whole.max() <= 1
    assert torch.equal(images, before)
    floats = augmentation.to_float(images)
    assert torch.equal(view(floats, 0), whole)
    assert torch.equal(floats, augmentation.to_float(images))
    assert torch.equal(view(images, 0), whole)
    if kind == "none":
        assert torch.equal(whole, augmentation.to_float(images))
    else:
        assert not torch.equal(view(images, 1), whole)
    rows = torch.tensor([5, 3, 60])  # whatever batch an image is in
    assert_equal(view(images[rows], 0, rows), whole[rows], tolerance=1e-6)


def test_views_and_epochs_differ():
    images = pictures(64, 3, SIZE)
    first, *others = (
        augmentation.augment(images, Random(torch.arange(64), 0, *more), "contrastive", True)
        for more in [(0, 0), (0, 1), (1, 0)]
    )
    for other in others:
        assert (first - other)[2:].abs().flatten(1).mean(1).min() > 0.01


def test_philox_gives_the_words_that_its_authors_publish():
    # Random123's known answers of philox4x32-10
    for counter, key, expected in [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ]:
        words = philox(*map(torch.tensor, counter), tuple(key))
        assert " ".join(f"{int(word):08x}" for word in words) == expected


def test_a_stream_goes_on_where_it_was_and_its_numbers_are_uniform():
    at_once = Random(torch.arange(5000), 3, 2, 1).uniform(8)
    stream = Random(torch.arange(5000), 3, 2, 1)
    assert torch.equal(torch.cat([stream.uniform(4), stream.uniform(4)], dim=1), at_once)
    assert at_once.min() >= 0 and at_once.max() < 1
    assert abs(at_once.mean() - 0.5) < 5 / math.sqrt(12 * at_once.numel())
    assert (torch.corrcoef(at_once.T) - torch.eye(8)).abs().max() < 5 / math.sqrt(5000)
    for others in [(4, 2, 1), (3, 1, 1), (3, 2, 0), (3 + 2**32, 2, 1)]:
        assert not torch.equal(Random(torch.arange(5000), *others).uniform(8), at_once)
    assert (Random(torch.arange(5000), 0).uniform(2, 0, 9).long().unique()).tolist() == [*range(9)]


def test_each_image_is_mirrored_in_every_other_epoch():
    flips = [Random(torch.arange(1000), 0, epoch).bits() for epoch in range(4)]
    assert torch.equal(flips[0], flips[2]) and torch.equal(flips[1], flips[3])
    assert torch.equal(flips[0], ~flips[1])
    assert within_binomial(flips[0].float().mean(), 0.5, 1000)


def test_two_views_of_an_image_are_mirrored_independently():
    """So that each image meets its mirror image as a positive, as in SimCLR and SupCon."""
    equal = []
    for epoch in range(40):
        first, second = (Random(torch.arange(100), 0, epoch, view).bits() for view in (0, 1))
        equal.append(first == second)
    assert within_binomial(torch.stack(equal).float().mean(), 0.5, 4000)
    assert (torch.stack(equal).float().mean(0) - 0.5).abs().max() < 4 * 0.5 / math.sqrt(40)


def test_strength_zero_changes_nothing():
    images = pictures(40, 3, SIZE)
    boxes = augmentation.draw_boxes(streams(40), SIZE, (1.0, 1.0), (1.0, 1.0))
    assert_equal(augmentation.resized_crop(images, boxes), images, tolerance=1e-5)
    still = torch.zeros(40)
    assert_equal(augmentation.affine(images, still, torch.zeros(40, 2)), images, tolerance=1e-5)
    factors, order = color.draw_jitter(streams(40), (0.0, 0.0, 0.0, 0.0))
    everybody = torch.ones(40, dtype=torch.bool)
    actual = color.color_jitter_(images.clone(), everybody, factors, order)
    assert_equal(actual, images)


@pytest.mark.parametrize("kind", ["crop_flip", "affine", "contrastive"])
@pytest.mark.parametrize("color", [False, True])
def test_only_flip_mirrors(kind, color):
    # dark to the left, bright to the right: only a mirror can turn the slope round
    images = torch.linspace(0.2, 0.8, SIZE).expand(500, 3 if color else 1, SIZE, SIZE)

    def shares(flip):
        drawn = augmentation.draw(kind, streams(500), SIZE, flip, color)
        columns = augmentation.apply(images, drawn)[..., 8:-8, 8:-8].mean(dim=(1, 2))
        slope = (columns[:, -1] - columns[:, 0]).sign()
        return (slope < 0).float().mean(), (slope > 0).float().mean()

    mirrored, plain = shares(flip=False)
    assert mirrored == 0 and plain > 0.99
    mirrored, plain = shares(flip=True)
    assert 0.4 < mirrored < 0.6 and mirrored + plain > 0.99


@pytest.mark.parametrize(
    "kind, kept, least",
    [("crop_flip", 0.95, 0.8), ("affine", 0.92, 0.65), ("contrastive", 0.85, 0.6)],
)
def test_digits_keep_background_and_ink(kind, kept, least):
    images = digits()
    drawn = augmentation.draw(kind, streams(len(images)), SIZE, flip=False, color=False)
    changed = augmentation.apply(images, drawn)
    zoom = 1.0 if drawn.boxes is None else drawn.boxes[:, 2:].prod(dim=1) / SIZE**2
    share = zoom * changed.sum(dim=(1, 2, 3)) / images.sum(dim=(1, 2, 3))
    assert share.mean() > kept and share.min() > least
    # ink in the middle alone: what comes in from outside the image must be background
    small = torch.nn.functional.pad(images[..., ::4, ::4], (12, 12, 12, 12))
    changed = augmentation.apply(small, drawn)
    changed[..., 4:-4, 4:-4] = 0
    assert changed.max() == 0


def within_binomial(share: torch.Tensor, probability: float, count: int) -> bool:
    return abs(share - probability) < 5 * math.sqrt(probability * (1 - probability) / count)


def test_draws_follow_their_distributions():
    count = 10_000
    drawn = augmentation.draw("contrastive", streams(count), SIZE, flip=True, color=True)
    for chosen, probability in [(drawn.flips, 0.5), (drawn.jitters, 0.8), (drawn.grayscale, 0.2)]:
        assert within_binomial(chosen.float().mean(), probability, count)
    both = drawn.jitters & drawn.grayscale
    assert within_binomial(both.float().mean(), 0.16, count)
    low, high = torch.tensor([0.6, 0.6, 0.6, -0.1]), torch.tensor([1.4, 1.4, 1.4, 0.1])
    assert (drawn.factors >= low).all() and (drawn.factors <= high).all()
    assert torch.allclose(drawn.factors.mean(dim=0), (low + high) / 2, atol=0.02)
    assert torch.allclose(drawn.factors.amin(dim=0), low, atol=0.01)
    assert torch.equal(drawn.order.sort(dim=1).values, torch.arange(4).expand(count, 4))
    for step in range(4):
        for operation in range(4):
            share = (drawn.order[:, step] == operation).float().mean()
            assert within_binomial(share, 0.25, count)

    top, left, height, width = drawn.boxes.unbind(1)
    assert torch.equal(drawn.boxes, drawn.boxes.round())
    assert top.min() == 0 and left.min() == 0 and height.min() >= 1 and width.min() >= 1
    assert (top + height).max() == SIZE and (left + width).max() == SIZE
    area, ratio = height * width / SIZE**2, width / height  # sides are rounded to whole pixels
    assert 0.18 < area.min() < 0.22 and area.max() == 1
    assert 0.7 < ratio.min() < 0.78 and 1.29 < ratio.max() < 1.43
    assert abs(ratio.log().mean()) < 0.01


def test_factors_are_never_negative():
    factors, _ = color.draw_jitter(streams(1000), (2.0, 3.0, 4.0, 0.5))
    assert factors[:, :3].min() >= 0 and (factors[:, 3].abs() <= 0.5).all()
    assert (factors.amax(dim=0) > torch.tensor([2.9, 3.9, 4.8, 0.49])).all()


@pytest.mark.parametrize(
    "kind, color", [("contrastive", False), ("affine", False), ("affine", True)]
)
def test_images_are_rotated_and_shifted_a_little(kind, color):
    drawn = augmentation.draw(kind, streams(5000), SIZE, flip=False, color=color)
    assert drawn.jitters is None and drawn.grayscale is None and drawn.flips is None
    for values, limit in [(drawn.angles, 15), (drawn.shifts, 2)]:
        assert -limit <= values.min() < -0.99 * limit and 0.99 * limit < values.max() <= limit
        assert abs(values.mean()) < 0.05 * limit


@pytest.mark.parametrize("color", [False, True])
def test_affine_zooms_in_and_out_alike_about_the_middle(color):
    drawn = augmentation.draw("affine", streams(5000), SIZE, flip=False, color=color)
    top, left, height, width = drawn.boxes.unbind(1)
    assert torch.allclose(top + height / 2, torch.full_like(top, SIZE / 2))
    assert torch.allclose(left + width / 2, torch.full_like(left, SIZE / 2))
    for values, limit in [
        (height * width / SIZE**2, math.log(1 / 0.7)),
        (width / height, math.log(1.25)),
    ]:
        logs = values.log()
        assert -1.001 * limit < logs.min() < -0.99 * limit
        assert 0.99 * limit < logs.max() < 1.001 * limit
        assert abs(logs.mean()) < 0.05 * limit


def test_boxes_are_distributed_as_torchvisions():
    from torchvision.transforms import RandomResizedCrop

    image = torch.zeros(1, SIZE, SIZE)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = torch.tensor(
            [RandomResizedCrop.get_params(image, (0.2, 1.0), (3 / 4, 4 / 3)) for _ in range(2000)]
        ).float()
    ours = augmentation.draw_boxes(streams(20_000), SIZE, (0.2, 1.0), (3 / 4, 4 / 3))
    assert torch.allclose(ours.mean(dim=0), theirs.mean(dim=0), atol=0.6)
    assert torch.allclose(ours.std(dim=0), theirs.std(dim=0), atol=0.4)


def test_boxes_that_never_fit_are_the_whole_image():
    boxes = augmentation.draw_boxes(streams(5), SIZE, (1.0, 1.0), (2.0, 3.0))
    assert torch.equal(boxes, torch.tensor([0.0, 0, SIZE, SIZE]).expand(5, 4))


def test_crop_flip_offsets_reach_every_place():
    for is_rgb, padding in [(True, 4), (False, 2)]:
        drawn = augmentation.draw("crop_flip", streams(2000), SIZE, flip=False, color=is_rgb)
        assert drawn.flips is None and drawn.padding == padding and drawn.reflect == is_rgb
        assert set(drawn.offsets.flatten().tolist()) == set(range(2 * padding + 1))


@pytest.mark.parametrize("color", [False, True])
def test_cutout_is_crop_flip_with_one_hole_anywhere(color):
    images = torch.full((5000, 3 if color else 1, SIZE, SIZE), 0.8)
    drawn = augmentation.draw("cutout", streams(5000), SIZE, flip=False, color=color)
    cropped = augmentation.draw("crop_flip", streams(5000), SIZE, flip=False, color=color)
    assert torch.equal(drawn.offsets, cropped.offsets)
    assert drawn.centers.amin() == 0 and drawn.centers.amax() == SIZE - 1
    changed, whole = (augmentation.apply(images, d) for d in (drawn, cropped))
    holes = (changed != whole).all(dim=1)  # (B,S,S)
    assert (changed[:, 0][holes] == (0.5 if color else 0)).all()
    assert torch.equal(changed[:, 0][~holes], whole[:, 0][~holes])
    sides = holes.any(dim=2).sum(1), holes.any(dim=1).sum(1)
    assert 10 <= holes.sum(dim=(1, 2)).float().sqrt().mean() <= 12
    assert max(side.max() for side in sides) == 12 and min(side.min() for side in sides) <= 6


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="unknown kind"):
        augmentation.draw("heavy", streams(4), SIZE, flip=False, color=True)
