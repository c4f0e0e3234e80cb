import itertools
import math

import pytest

from common.optimizers import warmup_cosine


def test_without_warmup_it_falls_from_the_peak_on_the_cosine():
    assert warmup_cosine(0, 100, 0, peak=0.5) == 0.5
    assert warmup_cosine(50, 100, 0, peak=0.5) == pytest.approx(0.25)
    assert warmup_cosine(100, 100, 0, peak=0.5) == pytest.approx(0)


def test_warmup_ends_on_the_cosine_curve_without_a_jump():
    rates = [warmup_cosine(step, 100, 10, peak=1.0) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[:10] == sorted(rates[:10])
    assert rates[9] == warmup_cosine(9, 100, 0, peak=1.0)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    largest_step = max(abs(a - b) for a, b in itertools.pairwise(rates[9:]))
    assert largest_step <= math.pi / 200 + 1e-9  # the steepest slope of the cosine
