"""Writes the report of a study into its folder, from nothing but the folder: the same files make the same bytes."""

from pathlib import Path

from tools.study import tables
from tools.study.claims import FAILS, HOLDS, NOT_RUN, OPEN, Finding, judge
from tools.study.data_files import as_json, runs_csv, summary, tests
from tools.study.figures import TITLES, own_name, write_figures
from tools.study.pairs import dead_pairs
from tools.study.results import Group, Run, Study, read_study

BIGRAM = "bigram"
READING = """Loss is bits per byte of the validation text, lower is better, of the model as stored and read back. Each
arm has its mean over seeds, its sample deviation (n-1) and a 95 % t interval. Runs of one seed share initialisation and
data order, so differences (arm - baseline, below 0: the arm is better) are paired by seed, with a paired t-test and
Holm's correction over a group's comparisons with its baseline. An arm of a single run is set against the mean of the
other's three or more, by the test of one score that takes its deviation to be theirs (Crawford and Howell 1998). d_z is
the mean difference over the deviation of the differences, Hedges' g over the pooled deviation. Step times are medians
over rounds in which the arms took turns."""

JUDGING = """A difference holds, or does not, if its paired test is significant at 5 % after Holm's correction over the
claims; a ratio if its whole 95 % interval lies on one side of what is claimed. What is not resolved may be true or not:
beside it stands the difference that its seeds would have found with a power of 80 %."""


def dead_words(group: Group) -> list[str]:
    """A sentence for each arm whose setting changes nothing."""
    found = []
    for pair in dead_pairs(group):
        seeds = f"{pair.n} seed{'s' if pair.n > 1 else ''}"
        found.append(
            f"{pair.arm} and {pair.against} are the same runs under two names ({seeds}): their settings are equal."
            if pair.same_runs else
            f"**Dead knob, not a finding:** {pair.arm} scores as {pair.against} does, to four decimals, at all {seeds}."
        )  # fmt: skip
    return found


def bullets(lines: list[str]) -> str:
    return "".join(f"* {line}\n" for line in lines) + ("\n" if lines else "")


def setting_words(study: Study) -> str:
    """Hardware, text, seeds and runs in a sentence each."""
    seeds = sorted({seed for group in study.groups for seed in group.seeds})
    runs = {run.key for group in study.groups for arm in group.arms for run in arm.runs.values()}
    planned = [f"{group.name}: {group.budget}" for group in study.groups]
    return bullets([
        f"Hardware: {study.hardware or 'not named'}", f"Text: {study.text or 'not named'}",
        f"Vocabulary: {study.vocab:,} tokens", f"Seeds: {', '.join(map(str, seeds)) or 'none'} ({len(seeds)})",
        f"Runs: {len(runs)}", f"Budget: {'; '.join(planned)}",
    ])  # fmt: skip


def ngram_words(study: Study) -> str:
    """The count tables of each text, and which runs on it are no better than that of pairs."""
    parts = []
    for text, tables_of in study.ngram_bpb.items():
        rows = [[name, f"{value:.4f}"] for name, value in tables_of.items()]
        head = (f"Counts of the training text of {text}", "Bits per byte of its validation text")
        runs: dict[str, tuple[Run, str]] = {}
        for group in (group for group in study.groups if group.text == text):
            for arm in group.arms:
                for seed, run in arm.runs.items():
                    runs.setdefault(run.key, (run, f"{arm.name} of {group.name}, seed {seed}"))
        words = said_of_bar(list(runs.values()), tables_of[BIGRAM]) if BIGRAM in tables_of else ""
        parts.append(f"{tables.Table(head, rows).markdown()}\n{words}\n")
    return f"## Against count tables\n\n{''.join(parts)}" if parts else ""


def said_of_bar(runs: list[tuple[Run, str]], bar: float) -> str:
    if not runs:
        return "No run on this text is done yet.\n"
    above = [f"{where}: " + ("no score" if run.val_bpb is None else f"{run.val_bpb:.4f}")
             for run, where in runs if run.val_bpb is None or run.val_bpb >= bar]  # fmt: skip
    if not above:
        return f"All {len(runs)} runs beat the bigram table.\n"
    return f"{len(above)} of {len(runs)} runs do not beat the bigram table:\n\n{bullets(above)}"


def claims_words(findings: list[Finding]) -> str:
    if not findings:
        return ""
    found = [one.verdict for one in findings]
    counts = ", ".join(f"{found.count(verdict)}: {verdict}" for verdict in (HOLDS, FAILS, OPEN, NOT_RUN))
    return (
        f"## Claims\n\nOf {len(findings)} claims, {counts}.\n\n{JUDGING}\n\n{tables.claim_table(findings).markdown()}\n"
    )


def group_words(group: Group, image: str | None = None) -> str:
    about = f"Budget: {group.budget}. Baseline: {group.baseline}. Text: {group.text}."
    parts = [f"## {group.name}\n\n{group.question}\n\n{about}\n"]
    parts += [f"Not complete:\n\n{bullets(group.missing)}"] if group.missing else []
    parts += [bullets(dead_words(group))] if dead_pairs(group) else []
    parts += [tables.score_table(group).markdown(), tables.cost_table(group).markdown()]
    if image:
        parts.append(f"![{group.name}: loss of every arm, and size against loss](figures/{image}.png)\n")
    return "\n".join(part.rstrip("\n") + "\n" for part in parts) + "\n"


def readme(study: Study, findings: list[Finding], figures: set[str]) -> str:
    """The study's page; figures: the names of those that there are."""
    names = [name for name in TITLES if name in figures]
    drawn = [
        f"![{TITLES[name]}](figures/{name}.png)\n\n{TITLES[name]} ([PDF](figures/{name}.pdf)).\n" for name in names
    ]
    parts = [f"# {study.title}\n\n{study.about}\n\n{setting_words(study)}{READING}\n\n", claims_words(findings),
             ngram_words(study)]  # fmt: skip
    for i, group in enumerate(study.groups):
        parts.append(group_words(group, own_name(i, group) if own_name(i, group) in figures else None))
    parts += [f"## Tuning\n\n{tables.tuning_table(study).markdown()}\n"] if study.tuning else []
    parts += ["## Figures\n\n" + "\n".join(drawn) + "\n"] if drawn else []
    return "".join(parts) + (
        "## Files\n\n`results.md` has every pair of arms and every run, `runs.csv` a row per run, `results_table.tex` "
        "the tables,\n`statistics_summary.json` and `significance_tests.json` all statistics. The page is generated.\n"
    )


def results_page(study: Study, findings: list[Finding]) -> str:
    """The tables of all groups: scores, costs, single runs, all pairs."""
    parts = [f"# {study.title}: results\n\n{READING}\n\n", claims_words(findings)]
    for group in study.groups:
        parts.append(group_words(group))
        parts.append(f"Every run, bits per byte:\n\n{tables.seed_table(group).markdown()}\n")
        if (pairs := tables.pair_table(group)).rows:
            parts.append(f"All pairs, Holm's correction over them:\n\n{pairs.markdown()}\n")
    return "".join(parts)


def latex(study: Study) -> str:
    """The score and cost tables of all groups, to be included in a document."""
    parts = [
        "% \\usepackage{booktabs,graphicx} and \\usepackage[T1]{fontenc} in the document that includes this file\n"
    ]
    for i, group in enumerate(study.groups):
        label = f"{i + 1}-{tables.slug(group.name).replace('_', '-')}"
        about = f"{group.name} ({group.budget}), against {group.baseline}"
        parts.append(tables.score_table(group).latex(f"Loss: {about}", f"tab:loss-{label}"))
        parts.append(tables.cost_table(group).latex(f"Cost: {about}", f"tab:cost-{label}"))
    return "\n".join(parts)


def texts(study: Study, figures: set[str]) -> dict[str, str]:
    """Every file of the report but the figures: name -> content."""
    findings = judge(study)
    return {
        "README.md": readme(study, findings, figures), "results.md": results_page(study, findings),
        "results_table.tex": latex(study), "runs.csv": runs_csv(study),
        "statistics_summary.json": as_json(summary(study)),
        "significance_tests.json": as_json(tests(study, findings)),
    }  # fmt: skip


def write_report(folder: Path) -> list[Path]:
    """Every file of the report, written; ValueError says what is wrong with the folder, before anything is."""
    study = read_study(Path(folder))
    judge(study)  # a wrong claim stops it here
    files = write_figures(study)
    for name, text in texts(study, {path.stem for path in files}).items():
        files.append(study.folder / name)
        files[-1].write_text(text, encoding="utf-8")
    return files
