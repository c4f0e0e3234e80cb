"""Which method serves which need, by how much, and whether that can be told.

A need is a score, higher is better. A method is recommended where its score exceeds that of every
other method by more than the uncertainty of the difference: the 95 % interval of
`scores.difference` excludes 0. Else it cannot be told between the best and all methods whose
interval includes 0.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from common.evaluation import scores

CLOSE = 0.01  # of accuracy: what the cheapest method may be below the best


@dataclass(frozen=True)
class Need:
    """What someone wants of a latent space, and how well each method serves it.

    Attributes:
        title: such as "highest accuracy with all labels".
        values: by method, one float array (N,) for each run, of the same N test images.
    """

    title: str
    values: Mapping[str, Sequence[np.ndarray]]


def leader(values: Mapping[str, Sequence[np.ndarray]]) -> str | None:
    """The method whose lead over each other one can be told; None if there is none, or one only."""
    means = {name: scores.interval(runs).value for name, runs in values.items()}
    best, *others = sorted(means, key=means.get, reverse=True)
    leads = [scores.difference(values[best], values[name]) for name in others]
    return best if leads and all(lead.low > 0 for lead in leads) else None


def recommend(need: Need) -> str:
    """One sentence: the best method and its lead, or between which it cannot be told."""
    means = {name: scores.interval(runs).value for name, runs in need.values.items()}
    best, *others = sorted(means, key=means.get, reverse=True)
    text = f"{need.title}: "
    if not others:
        return text + f"{best} ({means[best]:.1%}), the only method"
    leads = {name: scores.difference(need.values[best], need.values[name]) for name in others}
    undecided = [name for name in others if not leads[name].excludes_zero]
    if not undecided:
        lead = leads[others[0]]
        return text + f"{best} ({means[best]:.1%}), {_points(lead)} above {others[0]}"
    named = ", ".join(f"{name} ({means[name]:.1%})" for name in [best, *undecided[:-1]])
    last = undecided[-1]
    lead = _points(leads[undecided[0]])
    return (
        text + f"cannot be told between {named} and {last} ({means[last]:.1%}); "
        f"{best} is {lead} above {undecided[0]}"
    )


def cheapest(accuracy: Need, seconds: Mapping[str, float]) -> str:
    """One sentence: of the methods within 1 point of the best accuracy, the one with least time.

    `seconds` of training, by method.
    """
    means = {name: scores.interval(runs).value for name, runs in accuracy.values.items()}
    best = max(means.values())
    close = [name for name in seconds if means.get(name, 0) >= best - CLOSE]
    if not close:
        return "cheapest: no method that is trained comes within 1 point of the best accuracy"
    quickest = min(close, key=seconds.get)
    return (
        f"cheapest within {100 * CLOSE:.0f} point of the best accuracy: {quickest} "
        f"({means[quickest]:.1%}), {seconds[quickest]:,.0f} s of training"
    )


def reconstruction(errors: Mapping[str, float], pca: float | None) -> str:
    """One sentence on the methods with a decoder, by their mean squared error on test images."""
    title = "reconstruction and generation: "
    if not errors:
        return title + "none of these methods has a decoder; train an autoencoder"
    best = min(errors, key=errors.get)
    text = title + f"{best}, the only method with a decoder; its MSE is {errors[best]:.5f}"
    return text if pca is None else text + f", {errors[best] / pca:.2f} times that of PCA"


def _points(lead: scores.Interval) -> str:
    return f"{100 * lead.value:.1f} ± {50 * (lead.high - lead.low):.1f} points"
