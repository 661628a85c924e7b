"""Draws learning curves and sizes as SVG. A record has a colour, by a class of board.html, and a letter besides."""

import math
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from statistics import fmean, median

from tools.records import CAP_BYTES, Record

BINS = 64
NARROW_WIDTH = 360  # a plot this wide is for phones
LABEL_GAP = 20.5
SHORTEST = 1 / 40  # of the shortest run: where the curves begin, on a logarithmic axis
TIMES = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14_400, 36_000, 86_400)
COUNTS = tuple(digit * 10**power for power in range(7) for digit in (1, 2, 5))


@dataclass
class Mark:
    """How a record looks in the plots and tables of its section."""

    record: Record
    key: str
    letter: str
    classes: str

    @property
    def is_out(self) -> bool:
        return "out" in self.classes

    @property
    def title(self) -> str:
        size = f", {self.record.bytes_total:,} bytes" if self.record.bytes_total else ""
        return escape(f"{self.record.name}: {self.record.val_bpb:.4f} bits per byte{size}")


@dataclass
class Frame:
    """A plot's size and the linear map of its data onto it."""

    width: int
    height: int
    left: float
    right: float  # of x, in data units
    bottom: float
    top: float

    def x(self, value: float) -> float:
        return 48 + (value - self.left) / (self.right - self.left) * (self.width - 48 - 84)

    def y(self, value: float) -> float:
        return self.height - 34 - (value - self.bottom) / (self.top - self.bottom) * (self.height - 34 - 12)


def ticks(low: float, high: float, wanted: float) -> list[float]:
    """Returns about `wanted` round numbers from low to high."""
    rough = (high - low) / wanted
    scale = 10.0 ** math.floor(math.log10(rough))
    step = min((scale * times for times in (1, 2, 2.5, 5, 10)), key=lambda one: abs(math.log(one / rough)))
    return [index * step for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def decimals(values: list[float]) -> int:
    """Returns how many decimals tell these ticks apart."""
    return next((places for places in range(6) if all(abs(value - round(value, places)) < 1e-9 for value in values)), 6)


def clock(seconds: float) -> str:
    unit, word = (3600, "h") if seconds % 1800 == 0 and seconds >= 3600 else (60, "min") if seconds >= 60 else (1, "s")
    return f"{seconds / unit:g} {word}"


def axes(frame: Frame, xs: dict[float, str], ys: list[float], x_name: str) -> str:
    """Returns the grid and the words around a plot."""
    places = decimals(ys)
    floor = frame.height - 34
    parts = [f'<line class="axis" x1="48" x2="{frame.width - 84}" y1="{floor}" y2="{floor}"/>']
    for value in ys:
        y = frame.y(value)
        parts.append(f'<line class="grid" x1="48" x2="{frame.width - 84}" y1="{y:.1f}" y2="{y:.1f}"/>'
                     f'<text x="42" y="{y + 4:.1f}" text-anchor="end">{value:.{places}f}</text>')
    for value, words in xs.items():
        parts.append(f'<text x="{frame.x(value):.1f}" y="{floor + 17}" text-anchor="middle">{words}</text>')
    return "".join(parts) + f'<text x="{frame.width - 78}" y="{floor + 17}">{x_name}</text>'


def length(record: Record, against: str) -> float:
    """Returns how long the record's longest run is, in seconds or steps; 0 if its curve cannot be drawn."""
    ends = [getattr(point, against) or 0 for points in record.curves.values() for point in points]
    return max(ends, default=0) if record.bpb_per_nat else 0


def curve(record: Record, against: str, left: float, right: float) -> list[tuple[float, list[float]]]:
    """Returns (log of seconds or steps, mean train loss of each seed in bits per byte) for each bin that has data."""
    width = (right - left) / BINS
    bins: dict[int, dict[int, list[float]]] = {}
    for seed, points in enumerate(record.curves.values()):
        for point in points:
            at = math.log(max(getattr(point, against) or 0, 1e-9))
            if point.train_loss is not None and left <= at <= right:
                losses = bins.setdefault(min(int((at - left) / width), BINS - 1), {}).setdefault(seed, [])
                losses.append(point.train_loss * record.bpb_per_nat)
    return [(left + (index + .5) * width, [fmean(losses) for losses in bins[index].values()]) for index in sorted(bins)]


def spread(wanted: list[float], low: float, high: float) -> list[float]:
    """Returns the heights moved apart to at least LABEL_GAP, in the same order and near where they were."""
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    placed = [max(height, low) for height in wanted]
    for before, now in pairwise(order):
        placed[now] = max(placed[now], placed[before] + LABEL_GAP)
    for position, now in enumerate(reversed(order)):
        placed[now] = min(placed[now], high - position * LABEL_GAP)
    return placed


def badge(mark: Mark, x: float, y: float) -> str:
    return (f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="9.5"/><text class="key" x="{x:.1f}" y="{y + 4.2:.1f}">'
            f'{mark.letter}</text><title>{mark.title}</title>')


def comparable(marks: list[Mark]) -> list[Mark]:
    """Returns the marks that fit on one plot: a wild claim or a failed run must not flatten all the others."""
    middle = median(mark.record.val_bpb for mark in [one for one in marks if not one.is_out] or marks) if marks else 1.0
    return [mark for mark in marks if abs(mark.record.val_bpb / middle - 1) < (0.12 if mark.is_out else 0.6)]


def curve_plot(marks: list[Mark], against: str, width: int, height: int) -> str:
    """Returns the learning curves: the mean over seeds, a band from best to worst, and the score at the end."""
    drawn = [mark for mark in comparable(marks) if length(mark.record, against) > 0]
    if not drawn:
        return ""
    lengths = [length(mark.record, against) for mark in drawn]
    left, right = math.log(min(lengths) * SHORTEST), math.log(max(lengths))
    found = [curve(mark.record, against, left, right) for mark in drawn]
    late = [fmean(losses) for points in found for at, losses in points if at > left + .3 * (right - left)]
    scores = [mark.record.val_bpb for mark in drawn]
    low, high = min([*late, *scores]), max([*late, *scores])
    frame = Frame(width, height, left, right, low - .06 * (high - low or 1), high + .02 * (high - low or 1))
    words = {}
    for value in reversed(TIMES if against == "seconds" else COUNTS):
        if left <= math.log(value) <= right and all(frame.x(other) - frame.x(math.log(value)) > 52 for other in words):
            words[math.log(value)] = clock(value) if against == "seconds" else f"{value:,}"
    name = "time" if against == "seconds" else "steps"
    parts = [axes(frame, words, ticks(frame.bottom, frame.top, height / 55), name)]
    room = round((height - 58) / LABEL_GAP)
    ends = spread([frame.y(score) for score in scores[:room]], 14, height - 44) + [None] * len(scores[room:])
    for mark, bins, end in reversed(list(zip(drawn, found, ends, strict=True))):
        start = max((index for index, (_, losses) in enumerate(bins) if fmean(losses) > frame.top), default=-1) + 1
        points = [(frame.x(at), [max(frame.y(loss), 12) for loss in losses]) for at, losses in bins[start:]]
        line = " ".join(f"{x:.1f},{fmean(ys):.1f}" for x, ys in points)
        edge = [f"{x:.1f},{min(ys):.1f}" for x, ys in points]
        edge += [f"{x:.1f},{max(ys):.1f}" for x, ys in reversed(points)]
        x, y = frame.x(math.log(length(mark.record, against))), frame.y(mark.record.val_bpb)
        parts.append(f'<g data-key="{mark.key}" class="{mark.classes}">'
                     f'<polygon class="band" points="{" ".join(edge)}"/><polyline class="line" points="{line}"/>'
                     f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="4"/>')
        if end is not None:
            parts.append(f'<line class="leader" x1="{x + 4:.1f}" y1="{y:.1f}" x2="{width - 72}" y2="{end:.1f}"/>'
                         f'{badge(mark, width - 64, end)}'
                         f'<text class="end" x="{width - 50}" y="{end + 4.2:.1f}">{mark.record.val_bpb:.4f}</text>')
        parts.append(f"<title>{mark.title}</title></g>")
    return svg(against, width, height, parts)


def size_plot(marks: list[Mark], width: int, height: int) -> str:
    """Returns artifact bytes against bits per byte, with the cap."""
    drawn = [mark for mark in comparable(marks) if mark.record.bytes_total]
    if not drawn:
        return ""
    sizes, scores = [mark.record.bytes_total for mark in drawn], [mark.record.val_bpb for mark in drawn]
    pad = .08 * (max(scores) - min(scores)) or .01
    widest = max(*sizes, CAP_BYTES)
    left = max(0, min(sizes) - .08 * (widest - min(sizes)) - 2e5)
    frame = Frame(width, height, left, widest + .02 * (widest - left), min(scores) - pad, max(scores) + pad)
    xs = [value for value in ticks(left, frame.right, width / 110) if abs(frame.x(value) - frame.x(CAP_BYTES)) > 24]
    places = decimals([value / 1e6 for value in xs])
    words = {value: f"{value / 1e6:.{places}f}" for value in xs}
    cap = frame.x(CAP_BYTES)
    parts = [axes(frame, words, ticks(frame.bottom, frame.top, height / 55), "MB"),
             f'<line class="cap" x1="{cap:.1f}" x2="{cap:.1f}" y1="12" y2="{height - 34}"/>'
             f'<text class="cap" x="{cap + 5:.1f}" y="22">16 MB cap</text>']
    for mark in reversed(drawn):
        x, y = frame.x(mark.record.bytes_total), frame.y(mark.record.val_bpb)
        parts.append(f'<g data-key="{mark.key}" class="{mark.classes}">{badge(mark, x, y)}</g>')
    return svg("sizes", width, height, parts)


def svg(name: str, width: int, height: int, parts: list[str]) -> str:
    shown = "narrow" if width <= NARROW_WIDTH else "wide"
    return f'<svg class="plot {shown} {name}" viewBox="0 0 {width} {height}" role="img">{"".join(parts)}</svg>'
