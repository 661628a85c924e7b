"""Draws one group into given axes. An arm has one colour, marker and dash everywhere; bars are 95 % intervals."""

from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from tools import significance as sig
from tools.study.pairs import all_pairs
from tools.study.results import Arm, Group, Run, Study
from tools.study.tables import mean_of

# Okabe and Ito (2008), without the yellow that white paper swallows: told apart with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")
MARKERS, DASHES = ("o", "s", "^", "D", "v", "P"), ("-", "--", ":", "-.")
LOSS = "validation loss, bits per byte"
SETTLED = 0.15  # of a run: loss axes begin where the first steep fall is over
GRID_POINTS = 60  # of a mean curve
LEAST_P = 1e-4  # the darkest colour of the map of p-values


def styles(study: Study) -> dict[str, dict]:
    """Arm -> how it is drawn, in the order of the plan."""
    names = dict.fromkeys(arm.name for group in study.groups for arm in group.arms)
    found = {}
    for i, name in enumerate(names):
        turn = i // len(COLOURS)
        found[name] = {
            "color": COLOURS[i % len(COLOURS)], "marker": MARKERS[turn % len(MARKERS)], "linestyle": DASHES[turn % 4]
        }  # fmt: skip
    return found


def draw_scores(ax: Axes, group: Group, look: dict[str, dict]) -> None:
    """A line per arm: every seed, the mean and its 95 % interval; the baseline's mean is the dashed line."""
    for row, arm in enumerate(group.arms):
        scores, style = [*arm.values("val_bpb").values()], look[arm.name]
        if not scores:
            ax.annotate("no runs", (0.02, row), xycoords=("axes fraction", "data"), va="center", color="#777777")
            continue
        sample = sig.describe(scores)
        reach = 0.0 if sample.low is None else sample.mean - sample.low
        ax.errorbar(sample.mean, row, xerr=reach, fmt=style["marker"], color=style["color"], capsize=3, markersize=5)
        ax.plot(scores, [row + 0.28] * len(scores), "|", color=style["color"], alpha=0.7, markersize=5)
        if arm.name == group.baseline:
            ax.axvline(sample.mean, color="#777777", linestyle="--", linewidth=0.8, zorder=0)
    name_rows(ax, group)
    ax.set_xlabel(f"{LOSS} (mean, 95 % interval; | each seed)")


def name_rows(ax: Axes, group: Group) -> None:
    ax.set_yticks(range(len(group.arms)), [arm.name for arm in group.arms])
    ax.set_ylim(len(group.arms) - 0.5, -0.5)
    ax.grid(False, axis="y")


def draw_sizes(ax: Axes, group: Group, look: dict[str, dict]) -> None:
    """Bytes of the stored model against the score, with its 95 % interval; nearly equal sizes stand side by side."""
    scored = [arm for arm in group.arms if arm.values("val_bpb")]
    sizes = [mean_of(arm, lambda run: run.bytes_model) / 1e6 for arm in scored]
    widest = max(sizes) / min(sizes)
    for i, (arm, size) in enumerate(zip(scored, sizes, strict=True)):
        sample, style = sig.describe([*arm.values("val_bpb").values()]), look[arm.name]
        aside = widest ** (0.015 * sum(abs(size / other - 1) < 0.02 for other in sizes[:i]))
        reach = 0.0 if sample.low is None else sample.mean - sample.low
        ax.errorbar(size * aside, sample.mean, yerr=reach, fmt=style["marker"], color=style["color"], capsize=2,
                    markersize=5, label=arm.name)  # fmt: skip
    if widest > 1.5:
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if widest > 4 else (1, 1.5, 2, 3, 5, 7)))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.margins(0.08)
    ax.set_xlabel("stored model, MB ($10^6$ bytes)")
    ax.set_ylabel(f"{LOSS}\n(95 % interval)")


def draw_speed(ax: Axes, group: Group, look: dict[str, dict]) -> None:
    """The median step of each arm, every round, and its time over the baseline's."""
    slowest = max(max(arm.costs.step_ms_rounds or [arm.costs.step_ms]) for arm in group.arms if arm.costs)
    for row, arm in enumerate(group.arms):
        if arm.costs is None:
            ax.annotate("not measured", (0.02, row), xycoords=("axes fraction", "data"), va="center", color="#777777")
            continue
        ax.barh(row, arm.costs.step_ms, height=0.6, color=look[arm.name]["color"], alpha=0.55)
        rounds = arm.costs.step_ms_rounds
        ax.plot(rounds, [row] * len(rounds), "|", color="#222222", markersize=6)
        words = f"{arm.costs.step_ms:.4g} ms" + (f", {arm.costs.ratio:.2f}x" if arm.costs.ratio else "")
        ax.annotate(words, (max([*rounds, arm.costs.step_ms]), row), (5, 0), textcoords="offset points", va="center")
    name_rows(ax, group)
    ax.set_xlim(0, 1.3 * slowest)
    ax.set_xlabel("a training step, ms (median; | each round; x: over the baseline)")


def draw_matrix(ax: Axes, names: list[str], cells: dict, shade: ScalarMappable, form: Callable) -> None:
    """A square of arms by arms, its cells, value by (row, column), coloured and written out."""
    for (row, column), value in cells.items():
        y, x = names.index(row), names.index(column)
        colour = shade.to_rgba(value)
        ax.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colour, edgecolor="white"))
        dark = 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2] < 0.5
        ax.text(x, y, form(value), ha="center", va="center", fontsize=6, color="white" if dark else "black")
    ax.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(names)), names)
    ax.set_xlim(-0.5, len(names) - 0.5)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_aspect("equal")
    ax.grid(False)


def draw_tests(axes: tuple[Axes, Axes], group: Group) -> None:
    """Holm's p of all paired tests, low is green; and Hedges' g of row - column, below 0 (row better) is blue."""
    pairs = all_pairs(group)
    ps = {(pair.arm, pair.against): pair.p_holm for pair in pairs if pair.p_holm is not None}
    ps |= {(column, row): p for (row, column), p in ps.items()}
    effects = {(pair.arm, pair.against): pair.hedges_g for pair in pairs if pair.hedges_g is not None}
    effects |= {(column, row): -g for (row, column), g in effects.items()}
    reach = min(10.0, max(map(abs, effects.values()), default=1.0))
    for ax, cells, norm, colours, form, title in (
        (axes[0], ps, LogNorm(LEAST_P, 1, clip=True), "Greens_r", lambda p: "<.0001" if p < 1e-4 else f"{p:.1g}",
         "p of paired t-tests (Holm)"),
        (axes[1], effects, Normalize(-reach, reach, clip=True), "RdBu_r", lambda g: f"{g:+.1f}",
         "Hedges' g (blue: row better)"),
    ):  # fmt: skip
        shade = ScalarMappable(norm, colours)
        draw_matrix(ax, [arm.name for arm in group.arms], cells, shade, form)
        ax.set_title(f"{group.name}\n{title}", loc="left")
        ax.figure.colorbar(shade, ax=ax, shrink=0.7)


def smoothed(curve: tuple[tuple, ...], against: int) -> tuple[np.ndarray, np.ndarray]:
    """(steps or seconds, training loss as the mean of its neighbours) of a run."""
    points = np.array(curve, dtype=float)
    width = max(1, len(points) // 40)
    kernel = np.ones(width) / width
    return np.convolve(points[:, against], kernel, "valid"), np.convolve(points[:, 1], kernel, "valid")


def limit_loss(ax: Axes, lines: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Cut the loss axis above where the first steep fall is over, so that what follows can be seen."""
    end = max(x[-1] for x, _ in lines)
    late = np.concatenate([y[x >= SETTLED * end] if (x >= SETTLED * end).any() else y[-1:] for x, y in lines])
    pad = 0.05 * (late.max() - late.min()) or 0.05
    ax.set_ylim(late.min() - pad, late.max() + pad)


def draw_curves(axes: tuple[Axes, Axes], group: Group, look: dict[str, dict]) -> None:
    """Training loss against steps and against seconds: the mean over seeds, and a band from lowest to highest seed."""
    for ax, against, name in ((axes[0], 0, "step"), (axes[1], 2, "training time, s")):
        lines = []
        for arm in group.arms:
            found = [smoothed(run.curve, against) for run in arm.runs.values() if len(run.curve) > 1]
            if not found:
                continue
            x = np.linspace(max(x[0] for x, _ in found), min(x[-1] for x, _ in found), GRID_POINTS)
            losses = np.array([np.interp(x, *line) for line in found])
            style = look[arm.name]
            ax.plot(x, losses.mean(0), color=style["color"], linestyle=style["linestyle"], label=arm.name)
            ax.fill_between(x, losses.min(0), losses.max(0), color=style["color"], alpha=0.2, linewidth=0)
            lines.append((x, losses.mean(0)))
        limit_loss(ax, lines)
        ax.set_xlabel(name)
    axes[0].set_ylabel("training loss, nats per token\n(mean; band: all seeds)")


def draw_overlay(axes: tuple[Axes, Axes], group: Group, look: dict[str, dict]) -> None:
    """Every run by itself: training loss, and the validation scores on the way."""
    runs = [(arm, run) for arm in group.arms for run in arm.runs.values()]
    for ax, points_of in ((axes[0], curve_of), (axes[1], scores_of)):
        lines, named = [], set()
        for arm, run in runs:
            x, y = points_of(run)
            if not len(x):
                continue
            style = look[arm.name]
            ax.plot(x, y, color=style["color"], linestyle=style["linestyle"], linewidth=0.7, alpha=0.8,
                    marker=style["marker"] if len(x) < 12 else None, markersize=2.5,
                    label=None if arm.name in named else arm.name)  # fmt: skip
            lines.append((x, y))
            named.add(arm.name)
        if lines:
            limit_loss(ax, lines)
        ax.set_xlabel("step")
    axes[0].set_ylabel("training loss, nats per token\n(every seed)")
    axes[1].set_ylabel(LOSS)


def curve_of(run: Run) -> tuple[np.ndarray, np.ndarray]:
    return smoothed(run.curve, 0) if run.curve else (np.zeros(0), np.zeros(0))


def scores_of(run: Run) -> tuple[np.ndarray, np.ndarray]:
    points = np.array(run.val_curve, dtype=float).reshape(-1, 2)
    return points[:, 0], points[:, 1]


def draw_gates(ax: Axes, arm: Arm, name: str, style: dict) -> None:
    """A gate group over the layers: the middle quantile of each seed, and a band from lowest to highest quantile."""
    gates = np.array([run.gates[name] for run in arm.runs.values() if name in (run.gates or {})])  # (seed, layer, q)
    layers, low, high = np.arange(1, gates.shape[1] + 1), gates[:, :, 0].mean(0), gates[:, :, -1].mean(0)
    ax.fill_between(layers, low, high, color=style["color"], alpha=0.2, linewidth=0)
    for seed in gates:
        ax.plot(layers, seed[:, seed.shape[1] // 2], color=style["color"], linewidth=0.8, marker=".", markersize=3)
    ax.set_xticks(layers if len(layers) < 9 else layers[:: len(layers) // 6])
