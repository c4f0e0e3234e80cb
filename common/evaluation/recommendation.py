"""Which method serves which need, by how much, and whether there is a clear winner.

A need is a score, higher is better. A method is recommended where its score exceeds that of every
other method by more than the uncertainty of the difference: the 95 % interval of
`scores.difference` excludes 0. Else there is no clear winner among the best and all methods whose
interval includes 0. Baselines without training that the best method does not exceed in the same way
are named.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from . import scores

CLOSE = 0.01  # of accuracy: what the cheapest method may be below the best
TIME_NOISE = 1.25  # times of training within this factor of each other do not differ


@dataclass(frozen=True)
class Need:
    """What someone wants of a latent space, and how well each method serves it.

    Attributes:
        title: such as "highest accuracy with all labels".
        values: by method, one float array (N,) for each run, of the same N test images.
        baselines: the same of what needs no training, by name: as many arrays, or one.
        read_by: what stands before the names of the baselines, such as "the linear probe on ".
    """

    title: str
    values: Mapping[str, Sequence[np.ndarray]]
    baselines: Mapping[str, Sequence[np.ndarray]] = field(default_factory=dict)
    read_by: str = ""


Values = Mapping[str, Sequence[np.ndarray]]  # as in `Need`


def mean_scores(values: Values) -> dict[str, float]:
    """The score of each method over its runs, the best first."""
    means = {name: scores.interval(runs).value for name, runs in values.items()}
    return dict(sorted(means.items(), key=lambda item: item[1], reverse=True))


def leads_of_the_best(values: Values) -> dict[str, scores.Interval]:
    """How far the best method is above each other one, the second best first."""
    best, *others = mean_scores(values)
    return {name: scores.difference(values[best], values[name]) for name in others}


def leader(values: Values) -> str | None:
    """The method that is clearly above each other one; None if there is none, or one only."""
    leads = leads_of_the_best(values).values()
    return (
        next(iter(mean_scores(values))) if leads and all(x.excludes_zero for x in leads) else None
    )


def recommend(need: Need) -> str:
    """One sentence: the best method and its lead, or those without a clear winner; then the
    baselines that exceed it, and those that it does not clearly exceed.
    """
    return _of_methods(need) + _of_baselines(need)


def _of_baselines(need: Need) -> str:
    best, text = next(iter(mean_scores(need.values))), ""
    leads = {
        name: scores.difference(need.values[best], runs) for name, runs in need.baselines.items()
    }
    named = {name: f"{name} ({mean:.1%})" for name, mean in mean_scores(need.baselines).items()}
    if better := [name for name, lead in leads.items() if lead.high < 0]:
        verb, needs = ("is", "needs") if len(better) == 1 else ("are", "need")
        text += f"; but {need.read_by}{' and '.join(named[name] for name in better)} {verb} "
        text += f"better still, and {needs} no network"
    if reached := [name for name, lead in leads.items() if lead.low <= 0 <= lead.high]:
        needs = "needs" if len(reached) == 1 else "need"
        text += f"; {best} is not clearly above {need.read_by}"
        text += f"{' or '.join(named[name] for name in reached)}, which {needs} no network"
    return text


def _of_methods(need: Need) -> str:
    means, leads = mean_scores(need.values), leads_of_the_best(need.values)
    best, text = next(iter(means)), f"{need.title}: "
    if not leads:
        return text + f"{best} ({means[best]:.1%}), the only method"
    undecided = [name for name, lead in leads.items() if not lead.excludes_zero]
    if not undecided:
        second, lead = next(iter(leads.items()))
        return text + f"{best} ({means[best]:.1%}), {_points(lead)} above {second}"
    named = ", ".join(f"{name} ({means[name]:.1%})" for name in [best, *undecided[:-1]])
    last = undecided[-1]
    lead = _points(leads[undecided[0]])
    return (
        text + f"no clear winner between {named} and {last} ({means[last]:.1%}); "
        f"{best} is {lead} above {undecided[0]}"
    )


def cheapest(accuracy: Need, seconds: Mapping[str, float]) -> str:
    """One sentence: of the methods within 1 point of the best accuracy, the one with least time.

    `seconds` of training, by method. Others that took less than `TIME_NOISE` times as long are
    named with it: on a shared machine the same training varies as much.
    """
    means = mean_scores(accuracy.values)
    best = max(means.values())
    close = [name for name in seconds if means.get(name, 0) >= best - CLOSE]
    if not close:
        return "cheapest: no method that is trained comes within 1 point of the best accuracy"
    close.sort(key=seconds.get)
    equal = [name for name in close if seconds[name] < TIME_NOISE * seconds[close[0]]]
    names = [f"{name} ({means[name]:.1%}, {seconds[name]:,.0f} s of training)" for name in equal]
    title = f"cheapest within {100 * CLOSE:.0f} point of the best accuracy: "
    if len(names) == 1:
        return title + names[0]
    return title + f"no clear winner between {', '.join(names[:-1])} and {names[-1]}"


def reconstruction(errors: Mapping[str, float], pca: float | None, augmented: bool) -> str:
    """One sentence on the methods with a decoder, by their mean squared error on test images.

    `augmented`: they learned from random views, where PCA learned from the images as they are.
    """
    title = "reconstruction: "
    if not errors:
        return title + "none of these methods has a decoder; train an autoencoder"
    best = min(errors, key=errors.get)
    text = title + f"{best}, the only method with a decoder; its MSE is {errors[best]:.5f}"
    if augmented:
        text += " (it learned from augmented images)"
    return text if pca is None else text + f", {errors[best] / pca:.2f} times that of PCA"


def _points(lead: scores.Interval) -> str:
    return f"{100 * lead.value:.1f} ± {50 * (lead.high - lead.low):.1f} points"
