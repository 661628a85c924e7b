"""The figures of a study, each as PNG and as PDF: a panel per group, and a figure of its own for each group."""

from collections.abc import Callable
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tools.study import charts
from tools.study.pairs import all_pairs
from tools.study.results import Arm, Group, Study
from tools.study.tables import slug

LOOK = {
    "font.size": 8, "axes.titlesize": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": "#dddddd", "grid.linewidth": 0.6, "axes.axisbelow": True, "legend.frameon": False,
    "legend.fontsize": 7, "lines.linewidth": 1.3, "pdf.fonttype": 42,
}  # fmt: skip
WIDTH, ROW, FRAME = 8.0, 0.27, 1.0  # inches: a figure's width, an arm's height, the height around the arms
LINE, LEGEND, IN_LEGEND = 0.16, 1.8, 16  # inches: a name's height in a legend, its width; names in a column
SQUARE = 0.42  # inches: a cell of a matrix
DPI = 120
TITLES = {
    "statistical_performance": "Loss of every arm with its 95 % interval",
    "efficiency_with_error": "Size of the stored model against its loss; nearly equal sizes stand side by side",
    "speed_comparison": "Time of a training step, measured in turns",
    "significance_tests": "All pairs of arms: p-values and effect sizes",
    "learning_curves": "Learning curves, mean over seeds",
    "all_seeds_overlay": "Learning curves of every seed",
    "gate_trajectories": "Gates over the depth: the middle quantile of each seed, and a band between the outer ones",
}


def save(figure: Figure, path: Path) -> list[Path]:
    """Writes path.png and path.pdf without dates, so that equal figures are equal files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    found = [path.with_name(f"{path.name}.{kind}") for kind in ("png", "pdf")]
    figure.savefig(found[0], dpi=DPI, metadata={"Software": None})
    figure.set_layout_engine("none")  # what the first file has fitted stays as it is
    figure.savefig(found[1], metadata={"CreationDate": None, "ModDate": None, "Creator": None, "Producer": None})
    return found


def titled(ax: Axes, group: Group) -> None:
    ax.set_title(f"{group.name} ({group.budget})", loc="left", wrap=True)


def stacked(groups: list[Group], draw: Callable, look: dict) -> Figure:
    """A panel per group, as high as its arms, which are named on the axis."""
    heights = high(groups)
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    for ax, group in zip(figure.subplots(len(groups), gridspec_kw={"height_ratios": heights}, squeeze=False)[:, 0],
                         groups, strict=True):  # fmt: skip
        draw(ax, group, look)
        titled(ax, group)
    return figure


def high(groups: list[Group]) -> list[float]:
    return [ROW * len(group.arms) + FRAME for group in groups]


def with_legends(groups: list[Group], draw: Callable, look: dict, num_panels: int) -> Figure:
    """A row of panels per group, and the arms' names to the right of the last."""
    heights = [max(2.6, LINE * min(IN_LEGEND, len(group.arms)) + FRAME) for group in groups]
    num_columns = [-(-len(group.arms) // IN_LEGEND) for group in groups]
    figure = Figure(figsize=(WIDTH + LEGEND * (max(num_columns) - 1), sum(heights)), layout="constrained")
    grid = figure.subplots(len(groups), num_panels, squeeze=False, gridspec_kw={"height_ratios": heights})
    for row, group, columns in zip(grid, groups, num_columns, strict=True):
        draw(row[0] if num_panels == 1 else tuple(row), group, look)
        titled(row[0], group)
        handles = {name: handle for ax in row for handle, name in zip(*ax.get_legend_handles_labels(), strict=True)}
        row[-1].legend(handles.values(), handles.keys(), loc="upper left", bbox_to_anchor=(1.01, 1.0), ncols=columns,
                       borderaxespad=0)  # fmt: skip
    return figure


def tests(groups: list[Group]) -> Figure:
    """A row per group: p-values to the left, effect sizes to the right."""
    heights = [SQUARE * len(group.arms) + 1.6 for group in groups]
    figure = Figure(figsize=(max(WIDTH, 2 * max(heights) + 1), sum(heights)), layout="compressed")
    grid = figure.subplots(len(groups), 2, squeeze=False, gridspec_kw={"height_ratios": heights})
    for row, group in zip(grid, groups, strict=True):
        charts.draw_tests(tuple(row), group)
    return figure


def gates(study: Study, look: dict) -> Figure | None:
    """A row per arm that has gates, a column per gate group; None if no run has any."""
    arms: dict[tuple, Arm] = {}
    for arm in (arm for group in study.groups for arm in group.arms):
        if keys := tuple(run.key for run in arm.runs.values() if run.gates):
            arms.setdefault(keys, arm)  # one run may be filed in several groups
    if not arms:
        return None
    names = list(dict.fromkeys(name for arm in arms.values() for run in arm.runs.values() for name in run.gates or {}))
    figure = Figure(figsize=(max(WIDTH, 1.9 * len(names)), 1.5 * len(arms) + 0.6), layout="constrained")
    grid = figure.subplots(len(arms), len(names), squeeze=False, sharey="col")
    for row, arm in zip(grid, arms.values(), strict=True):
        for ax, name in zip(row, names, strict=True):
            if not any(name in (run.gates or {}) for run in arm.runs.values()):
                ax.set_axis_off()
                continue
            charts.draw_gates(ax, arm, name, look[arm.name])
            ax.set_title(f"{arm.name}\n{name}", fontsize=7)
    figure.supxlabel("layer", fontsize=8)
    figure.supylabel("gate", fontsize=8)
    return figure


def own_figure(group: Group, look: dict) -> Figure:
    """A group's section shows its scores, and its sizes against them."""
    figure = Figure(figsize=(1.3 * WIDTH, max(3.0, *high([group]))), layout="constrained")
    left, right = figure.subplots(1, 2)
    charts.draw_scores(left, group, look)
    charts.draw_sizes(right, group, look)
    return figure


def own_name(i: int, group: Group) -> str:
    """The name of the figure of the plan's group i, counted from 0."""
    return f"group_{i + 1:02d}_{slug(group.name)}"


def drawn(study: Study) -> dict[str, Figure]:
    """Every figure by its name; what has no data yet is left out."""
    look = charts.styles(study)
    scored = [group for group in study.groups if any(arm.values("val_bpb") for arm in group.arms)]
    timed = [group for group in study.groups if any(arm.costs for arm in group.arms)]
    tested = [group for group in scored if any(pair.paired for pair in all_pairs(group))]
    curved = [
        group for group in study.groups if any(len(run.curve) > 1 for arm in group.arms for run in arm.runs.values())
    ]
    found = {}
    if scored:
        found["statistical_performance"] = stacked(scored, charts.draw_scores, look)
        found["efficiency_with_error"] = with_legends(scored, charts.draw_sizes, look, 1)
    if timed:
        found["speed_comparison"] = stacked(timed, charts.draw_speed, look)
    if tested:
        found["significance_tests"] = tests(tested)
    if curved:
        found["learning_curves"] = with_legends(curved, charts.draw_curves, look, 2)
        found["all_seeds_overlay"] = with_legends(curved, charts.draw_overlay, look, 2)
    if figure := gates(study, look):
        found["gate_trajectories"] = figure
    own = {own_name(i, group): own_figure(group, look) for i, group in enumerate(study.groups) if group in scored}
    return found | own


def write_figures(study: Study) -> list[Path]:
    """All files written to figures/."""
    with rc_context(LOOK):
        return [path for name, figure in drawn(study).items() for path in save(figure, study.folder / "figures" / name)]
