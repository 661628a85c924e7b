"""Draws what an analysis found, one figure per kind of measurement, from the JSON alone."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

GATE_COLUMNS = 4


def by_layer(entries: list[dict]) -> list[tuple[int, dict]]:
    """(layer, entry); what runs outside the layers stands in its running order."""
    return [(i if entry["layer"] is None else entry["layer"], entry) for i, entry in enumerate(entries)]


def depth_axis(axes: Axes, label: str = "layer") -> None:
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def spectra(heads: list[dict]) -> Figure:
    """Eigenvalues in the complex plane, coloured by layer, and their radius by layer."""
    figure = Figure(figsize=(10, 8), layout="constrained")
    placed = by_layer(heads)
    deepest = max(layer for layer, _ in placed)
    for row, kind in zip(figure.subplots(2, 2), ("qk", "ov"), strict=True):
        plane, radius = row
        values = np.concatenate([head[f"{kind}_eigenvalues"] for head in heads])
        depth = np.concatenate([np.full(len(head[f"{kind}_eigenvalues"]), layer) for layer, head in placed])
        dots = plane.scatter(values[:, 0], values[:, 1], c=depth, s=5, cmap="viridis", vmin=0, vmax=max(1, deepest))
        figure.colorbar(dots, ax=plane, label="layer", ticks=MaxNLocator(integer=True))
        plane.axhline(0, color="0.8", lw=0.8, zorder=0)
        plane.axvline(0, color="0.8", lw=0.8, zorder=0)
        plane.set(title=f"{kind.upper()} eigenvalues", xlabel="real part", ylabel="imaginary part")
        radius.plot([layer for layer, _ in placed], [head[f"{kind}_radius"] for head in heads], ".", color="C0")
        means = {at: np.mean([h[f"{kind}_radius"] for layer, h in placed if layer == at]) for at, _ in placed}
        radius.plot(list(means), list(means.values()), color="C1", label="mean over heads")
        radius.set(title=f"{kind.upper()} spectral radius", ylabel="radius of a head", ylim=(0, None))
        depth_axis(radius)
        radius.legend()
    return figure


def time_constants(modules: list[dict]) -> Figure:
    """Tokens until a state falls to 1 / e: median and 5 to 95 % of the tokens, for every head or state of a layer."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for layer, entry in by_layer(modules):
        low, middle, high = (np.array(entry[f"tau_{word}"]) for word in ("p05", "p50", "p95"))
        at = layer + np.linspace(-0.3, 0.3, len(middle)) if len(middle) > 1 else np.array([layer])
        axes.vlines(at, low, high, color="C0", lw=0.8)
        axes.plot(at, middle, ".", color="C0", ms=3)
    axes.set(yscale="log", ylabel="time constant, tokens")
    depth_axis(axes, "layer; its heads or states side by side")
    return figure


def lyapunov(found: dict) -> Figure:
    """The exponents with standard errors, and the growth through the layers."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    spectrum, growth = figure.subplots(1, 2)
    numbers = np.arange(1, len(found["exponents"]) + 1)
    spectrum.errorbar(numbers, found["exponents"], yerr=found["exponents_error"], fmt="o", capsize=3)
    spectrum.axhline(0, color="0.8", lw=0.8, zorder=0)
    spectrum.set(xlabel="exponent", ylabel="nats per layer", title="Lyapunov exponents")
    leading = np.array(found["leading_by_layer"])  # (L, k)
    layers = np.arange(len(leading))
    growth.plot(layers, leading[:, 0], color="C0", label="leading directions")
    growth.plot(layers, leading[:, 1:], color="C0", alpha=0.4, lw=0.8)
    growth.plot(layers, found["random_by_layer"], color="C1", label="random perturbation")
    growth.plot(layers, found["stream_by_layer"], "--", color="0.5", label="the stream itself")
    growth.set(ylabel="log of growth since the embedding, nats", title="Growth up to each layer's end")
    depth_axis(growth)
    growth.legend()
    return figure


def sensitivity(found: dict) -> Figure:
    """The matrix of targets by tokens, and its mean by distance."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    map_axes, decay = figure.subplots(1, 2)
    matrix = np.array(found["matrix"])
    top = matrix.max()
    shown = np.ma.masked_less_equal(matrix, 0)
    image = map_axes.imshow(shown, norm=LogNorm(top * 1e-4, top), cmap="magma", interpolation="nearest")
    figure.colorbar(image, ax=map_axes, label="|d nats / d embedding|, relative")
    map_axes.set(xlabel="token read", ylabel="target scored", title=f"max over the future: {found['max_future']:.3g}")
    means, error = np.array(found["by_distance"]), found["by_distance_error"]
    distance = np.arange(1, len(means) + 1)
    decay.plot(distance, means, color="C0")
    if error is not None:
        decay.fill_between(distance, means - error, means + error, color="C0", alpha=0.25, lw=0)
    decay.set(xscale="log", yscale="log", xlabel="distance of the token from the target", ylabel="mean sensitivity")
    return figure


def gate_panel(axes: Axes, group: dict) -> None:
    """One group over depth: median and 5 to 95 % of its channels."""
    layers = group["layers"]
    axes.fill_between(layers, group["p05_by_layer"], group["p95_by_layer"], color="C0", alpha=0.25, lw=0)
    axes.plot(layers, group["p50_by_layer"], ".-", color="C0")
    depth_axis(axes, "")
    share = "" if group["depth_share"] is None else f", depth {group['depth_share']:.0%}"
    axes.set_title(f"{group['group']}{share}", fontsize=8)
    axes.tick_params(labelsize=7)


def gates(found: list[dict]) -> Figure:
    """A panel per group of gates or scales; "depth" is the share of its variance that is over depth."""
    rows = -(-len(found) // GATE_COLUMNS)
    figure = Figure(figsize=(2.8 * GATE_COLUMNS, 2.1 * rows), layout="constrained")
    panels = figure.subplots(rows, GATE_COLUMNS, squeeze=False).flatten()
    for axes, group in zip(panels, found, strict=False):
        gate_panel(axes, group)
    for axes in panels[len(found) :]:
        axes.set_axis_off()
    figure.supxlabel("layer", fontsize=9)
    return figure


def drawn(analysis: dict) -> Iterator[tuple[str, Figure]]:
    """(name, figure) of every measurement that applies to the model."""
    kinds = {"spectra": ("attention", spectra), "time_constants": ("ssm", time_constants)}
    kinds |= {"lyapunov": ("lyapunov", lyapunov), "sensitivity": ("sensitivity", sensitivity)}
    kinds |= {"gates": ("gates", gates)}
    for name, (key, draw) in kinds.items():
        if analysis[key]:
            yield name, draw(analysis[key])


def save(analysis: dict, folder: Path) -> list[Path]:
    """Write every figure as PNG and PDF; the same analysis gives the same files."""
    paths = []
    for name, figure in drawn(analysis):
        for suffix, metadata in (("png", {"Software": None}), ("pdf", {"CreationDate": None})):
            paths.append(folder / f"{name}.{suffix}")
            figure.savefig(paths[-1], dpi=150, metadata=metadata)
    return paths
