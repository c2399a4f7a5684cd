"""Curves as pictures. Each line is the median of the seeds, its band the range of all of them."""

import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "proxima"  # the same picture for the same numbers

from matplotlib import pyplot as plt  # noqa: E402  (after the backend is chosen)

from benchmarks.learning.curve import Curve  # noqa: E402


def by_variant(curves: Sequence[Curve]) -> dict[str, list[Curve]]:
    """In the order in which they first appear."""
    groups: dict[str, list[Curve]] = {}
    for curve in curves:
        groups.setdefault(curve.variant, []).append(curve)
    return groups


def rewards(curves: Sequence[Curve], title: str, ylabel: str, path: Path) -> None:
    """Reward against episodes."""
    figure, axes = plt.subplots(figsize=(7, 4))
    for variant, group in by_variant(curves).items():
        seeds = [curve.rewards for curve in group]
        middle = [statistics.median(values) for values in zip(*seeds, strict=True)]
        low = [min(values) for values in zip(*seeds, strict=True)]
        high = [max(values) for values in zip(*seeds, strict=True)]
        (line,) = axes.plot(group[0].episodes, middle, label=variant)
        axes.fill_between(group[0].episodes, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    _finish(figure, axes, title, "episodes", ylabel, path)


def reward_against_kl(curves: Sequence[Curve], title: str, ylabel: str, path: Path) -> None:
    """Where each run went: one faint line per seed."""
    figure, axes = plt.subplots(figsize=(7, 4))
    for index, (variant, group) in enumerate(by_variant(curves).items()):
        for number, curve in enumerate(group):
            label = variant if number == 0 else None
            axes.plot(curve.kl, curve.rewards, color=f"C{index}", alpha=0.5, linewidth=1, label=label)
    _finish(figure, axes, title, "KL of a response from the reference, nats", ylabel, path)


def _finish(figure: plt.Figure, axes: plt.Axes, title: str, xlabel: str, ylabel: str, path: Path) -> None:
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
