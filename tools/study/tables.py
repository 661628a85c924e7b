"""The tables of a study, as Markdown and as LaTeX. A difference is arm - baseline: below 0 the arm is better."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

from tools import significance as sig
from tools.study.claims import Finding
from tools.study.pairs import Pair, all_pairs, to_baseline
from tools.study.results import Arm, Group, Study

NONE = "–"
SCORE_HEAD = (
    "Arm", "n", "Loss, bits per byte", "sd", "95 % interval", "Difference to the baseline", "95 % interval of it",
    "p (Holm)", "d_z", "Hedges' g",
)  # fmt: skip
COST_HEAD = (
    "Arm", "Parameters", "Model, bytes", "Artifact with code, bytes", "Steps", "Step, ms", "Over the baseline",
    "Peak memory, MB", "Forward FLOPs per token",
)  # fmt: skip
LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "–": "--", "×": r"$\times$", "±": r"$\pm$", "≤": r"$\leq$", "≥": r"$\geq$",
    '"': r"\textquotedbl{}",
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """Cells as text; the first `num_words` columns stand to the left, the others are numbers."""

    head: tuple[str, ...]
    rows: list[list[str]]
    num_words: int = 1

    def markdown(self) -> str:
        sides = [":--" if i < self.num_words else "--:" for i in range(len(self.head))]
        cells = [[re.sub(r"([|\\`*<])", r"\\\1", cell) for cell in row] for row in [list(self.head), *self.rows]]
        lines = [cells[0], sides, *cells[1:]]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"

    def latex(self, caption: str, label: str) -> str:
        """A booktabs table with its caption above."""
        sides = "l" * self.num_words + "r" * (len(self.head) - self.num_words)
        lines = [" & ".join(map(escaped, row)) + r" \\" for row in [list(self.head), *self.rows]]
        return "\n".join([
            r"\begin{table}[p]", r"\centering",
            rf"\caption{{{escaped(caption)}}}", rf"\label{{{label}}}", r"\resizebox{\textwidth}{!}{%",
            rf"\begin{{tabular}}{{{sides}}}", r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule",
            r"\end{tabular}}", r"\end{table}", "",
        ])  # fmt: skip


def escaped(text: str) -> str:
    """The text as LaTeX prints it; a sign before a number is a minus."""
    plain = "".join(LATEX.get(char, char) for char in text)
    return re.sub(r"(?<![\w.)$])-(?=[\d.])", "$-$", plain)


def slug(name: str) -> str:
    """The name as part of a file's name or a label."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def cell(value: float | None, form: str = ".4f") -> str:
    return NONE if value is None else f"{value:{form}}"


def probability(p: float | None) -> str:
    return NONE if p is None else "< 0.0001" if p < 1e-4 else f"{p:.4f}" if p < 0.1 else f"{p:.2f}"


def interval(low: float | None, high: float | None, form: str = ".4f") -> str:
    return NONE if low is None else f"[{low:{form}}, {high:{form}}]"


def of_wanted(num_seeds: int, wanted: int) -> str:
    return str(num_seeds) if num_seeds == wanted else f"{num_seeds} of {wanted}"


def large(value: float) -> str:
    """A number of operations with a unit's letter, three digits."""
    units = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (0, ""))
    unit, letter = next(pair for pair in units if value >= pair[0])
    return f"{value / (unit or 1):.3g}{letter}"


def mean_of(arm: Arm, of: Callable) -> float | None:
    """The mean over an arm's runs of what `of` gives; None if none gives anything."""
    found = [value for run in arm.runs.values() if (value := of(run)) is not None]
    return fmean(found) if found else None


def optional(head: tuple, arms: tuple[Arm, ...], columns: dict[str, Callable]) -> tuple[tuple, list[list[str]]]:
    """The head with those columns that some arm fills, and what each arm has in them."""
    found = {name: [of(arm) for arm in arms] for name, of in columns.items()}
    kept = {name: texts for name, texts in found.items() if any(text not in ("", NONE) for text in texts)}
    return head + tuple(kept), [[texts[i] or NONE for texts in kept.values()] for i in range(len(arms))]


def score_row(arm: Arm, group: Group, pair: Pair | None) -> list[str]:
    scores = [*arm.values("val_bpb").values()]
    n = of_wanted(len(scores), len(arm.seeds))
    if not scores:
        return [arm.name, n, *[NONE] * 8]
    sample = sig.describe(scores, arm.name)
    own = [arm.name, n, cell(sample.mean), cell(sample.deviation), interval(sample.low, sample.high)]
    if pair is None:
        return [*own, "baseline", *[NONE] * 4]
    if pair.dead:
        return [*own, cell(pair.difference, "+.4f"), "same run" if pair.same_runs else "dead knob", *[NONE] * 3]
    test = pair.paired
    return [
        *own, cell(pair.difference, "+.4f"), interval(test and test.low, test and test.high, "+.4f"),
        probability(pair.p_holm), cell(pair.d_z, "+.2f"), cell(pair.hedges_g, "+.2f"),
    ]  # fmt: skip


def score_table(group: Group) -> Table:
    """Loss of every arm with its interval, and its paired difference to the baseline."""
    pairs = to_baseline(group)
    columns = {
        "Before quantising": lambda arm: cell(mean_of(arm, lambda run: run.pre_quant_val_bpb)),
        "Training text": lambda arm: cell(mean_of(arm, lambda run: run.train_bpb)),
        "Gap": lambda arm: cell(mean_of(arm, lambda run: run.gap), "+.4f"),
        "Published": lambda arm: arm.published,
    }
    head, more = optional(SCORE_HEAD, group.arms, columns)
    rows = [score_row(arm, group, pairs.get(arm.name)) + own for arm, own in zip(group.arms, more, strict=True)]
    return Table(head, rows)


def cost_row(arm: Arm) -> list[str]:
    costs = arm.costs
    code = mean_of(arm, lambda run: None if run.bytes_code is None else run.bytes_model + run.bytes_code)
    return [
        arm.name, cell(mean_of(arm, lambda run: run.params), ",.0f"),
        cell(mean_of(arm, lambda run: run.bytes_model), ",.0f"), cell(code, ",.0f"),
        cell(mean_of(arm, lambda run: run.steps), ",.0f"), cell(costs and costs.step_ms, ".2f"),
        cell(costs and costs.ratio, ".2f"), cell(costs and costs.peak_mem_mb, ",.1f"),
        large(costs.flops_per_token) if costs and costs.flops_per_token else NONE,
    ]  # fmt: skip


def cost_table(group: Group) -> Table:
    """Size and cost of every arm: means over its runs; step time is a median over rounds."""
    columns = {
        "Training, s": lambda arm: cell(mean_of(arm, lambda run: run.train_seconds), ",.1f"),
        "Mean learning-rate scale": lambda arm: cell(mean_of(arm, lambda run: run.mean_lr_scale), ".2f"),
        "Tuned": lambda arm: ", ".join(f"{name} {value}" for name, value in arm.tuned.items()),
    }
    head, more = optional(COST_HEAD, group.arms, columns)
    return Table(head, [cost_row(arm) + own for arm, own in zip(group.arms, more, strict=True)])


def seed_table(group: Group) -> Table:
    """The loss of every run, a column per seed."""
    rows = []
    for arm in group.arms:
        scores = arm.values("val_bpb")
        cells = ["no score" if seed in arm.failed else cell(scores.get(seed)) for seed in group.seeds]
        rows.append([arm.name, *cells])
    return Table(("Arm", *(f"seed {seed}" for seed in group.seeds)), rows)


def pair_table(group: Group) -> Table:
    """All pairs of arms that share seeds."""
    head = ("Pair", "n", "Difference", "95 % interval", "paired p", "Holm", "Welch p", "Holm", "d_z", "Hedges' g",
            "exact p", "least exact p")  # fmt: skip
    rows = []
    for pair in (pair for pair in all_pairs(group) if pair.n):
        test, welch = pair.paired, pair.welch
        rows.append([
            f"{pair.arm} - {pair.against}" + (" (dead knob)" if pair.dead and not pair.same_runs else ""), str(pair.n),
            cell(pair.difference, "+.4f"), interval(test and test.low, test and test.high, "+.4f"),
            probability(test and test.p_two_sided), probability(pair.p_holm), probability(welch and welch.p_two_sided),
            probability(pair.welch_p_holm), cell(pair.d_z, "+.2f"), cell(pair.hedges_g, "+.2f"),
            probability(pair.permutation_p), probability(pair.smallest_p),
        ])  # fmt: skip
    return Table(head, rows)


def claim_table(findings: list[Finding]) -> Table:
    rows = []
    for one in findings:
        value = NONE if one.value is None else one.shown(one.value)
        ends = NONE if one.low is None else f"[{one.shown(one.low)}, {one.shown(one.high)}]".replace(f" {one.unit}", "")
        ends = "exact" if one.low is not None and one.metric == "params" else ends
        n = NONE if not one.n else f"{one.n} rounds" if one.num_wanted is None else of_wanted(one.n, one.num_wanted)
        compared = f"{one.arm} against {one.against}, {one.group}"
        rows.append([one.claim, one.published or NONE, compared, value, ends, probability(one.p_holm), n, one.verdict,
                     one.words])  # fmt: skip
    head = ("Claim", "Published", "Compared", "Measured", "95 % interval", "p (Holm)", "n", "Verdict", "In numbers")
    return Table(head, rows, num_words=9)


def tuning_table(study: Study) -> Table:
    """The score of every value tried in tuning, and which was taken."""
    rows = []
    for entry in study.tuning:
        values = {name: value for name, value in (entry.get("values") or {}).items() if value is not None}
        tried = ", ".join(f"{name}: {value:.4f}" for name, value in values.items())
        best = min(values, key=values.get, default=None)
        ends = min(values, key=number_of, default=None), max(values, key=number_of, default=None)
        edge = "at the edge of what was tried" if len(values) > 2 and best in ends else ""
        words = " ".join(str(value) for name, value in entry.items() if name not in ("values", "chosen"))
        rows.append([words, tried or NONE, str(entry.get("chosen", NONE)), edge or NONE])
    return Table(("What", "Value: bits per byte", "Taken", "Remark"), rows, num_words=4)


def number_of(words: str) -> float:
    """The first number in some words; 0 if there is none."""
    found = re.search(r"[-+]?\d*\.?\d+(?:e[-+]?\d+)?", words.lower())
    return float(found.group()) if found else 0.0
