"""Writes the README's table of architectures from their files, the studies and the records.

    python -m tools.catalogue              rewrite the table between the ARCHITECTURES marks of README.md
    python -m tools.catalogue --check      for CI: write nothing, exit 1 if the table is out of date

A file's first line gives name, idea and paper; its Config the knobs and the parameter count at the kit's normal size.
"""

import argparse
import ast
import json
import re
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from statistics import fmean

from architectures import load_architecture, names
from architectures.layers import ModelConfig
from tools.records import read_record
from tools.study.plan import ROOT

BEGIN, END = "<!-- BEGIN ARCHITECTURES -->", "<!-- END ARCHITECTURES -->"
HEADER = """| `ARCH` | Idea | Main knobs | Parameters | Artifact, MB | Where it stands |
|---|---|---|--:|--:|---|"""
SHOWN_KNOBS = 5
FIRST_LINE = re.compile(r"(?P<idea>.*?)\s*\((?P<paper>.*?)(?:, )?(?P<link>https://\S+?)\)\.$")


def first_line(path: Path) -> tuple[str, str, str]:
    """(idea, paper, link) of an architecture's file; ValueError for a first line of another form."""
    line = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0]
    if not (match := FIRST_LINE.match(line)):
        raise ValueError(f'{path}: its first line must end in "(paper, https://...)."; it is "{line}"')
    return match["idea"], match["paper"].strip(" ,"), match["link"]


def knobs(Config: type) -> str:
    """The settings that an architecture adds, with their defaults."""
    common = {f.name: f.default for f in fields(ModelConfig)}
    added = [f for f in fields(Config) if common.get(f.name, MISSING) != f.default]
    added.sort(key=lambda f: f.name not in Config.__annotations__)  # the file's own before those of its shelves
    words = [f"`{f.name.upper()}={'none' if f.default is None else f.default}`" for f in added]
    more = len(words) - SHOWN_KNOBS
    return ", ".join(words[:SHOWN_KNOBS]) + (f" and {more} more" if more > 0 else "")


def differences(arm: dict, base: dict) -> list[float]:
    """The arm's score less the base's for each seed that both have, bits per byte."""
    theirs = base["all_losses"]
    return [score - theirs[seed] for seed, score in arm["all_losses"].items() if seed in theirs]


def standing(arch: str, studies: Path, records: Path) -> str:
    """The architecture's best record, and in each study its best arm's mean difference to gpt, seed by seed, in the
    first group that has both."""
    scores = []
    for path in sorted(records.glob("track_*/*/submission.json")):
        record = read_record(path.parent)
        if record.logs and {log.config.get("arch") for log in record.logs} == {arch} and record.val_bpb:
            scores.append((record.val_bpb, record.dataset))
    found = [f"{score:.4f} bpb on {dataset}" for score, dataset in sorted(scores)[:1]]
    for path in sorted(studies.glob("*/statistics_summary.json")):
        for group, said in json.loads(path.read_text())["groups"].items():
            arms, base = said["arms"], said["arms"][said["baseline"]]
            mine = {name: differences(arm, base) for name, arm in arms.items() if arm["arch"] == arch}
            if base["arch"] == "gpt" != arch and any(mine.values()):
                name, by_seed = min(((n, d) for n, d in mine.items() if d), key=lambda pair: fmean(pair[1]))
                arm = "" if name == arch else f" by {name}"
                seeds = f"n={len(by_seed)}"
                found.append(f"{fmean(by_seed):+.4f} bpb to `gpt`{arm} in {path.parent.name}, {group} ({seeds})")
                break
    return "; ".join(found) or "not compared yet"


def artifact_sizes(folder: Path) -> dict[str, str]:
    """Megabytes of each architecture's submission at its defaults, by the benchmark that packed it last."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("artifacts_*.json")]
    found.sort(key=lambda one: one["date"])
    return {row["what"]: f"{row['artifact_bytes'] / 1e6:.1f}" for one in found for row in one["rows"]}


def table(studies: Path, records: Path) -> str:
    rows, sizes = [HEADER], artifact_sizes(records / "benchmarks")
    for arch in names():
        idea, paper, link = first_line(ROOT / "architectures" / f"{arch}.py")
        _, Config = load_architecture(arch)
        cells = [f"`{arch}`", f"{idea} ([{paper or 'code'}]({link}))", knobs(Config) or "none of its own"]
        cells += [f"{Config().num_params():,}", sizes.get(arch, "not measured"), standing(arch, studies, records)]
        rows.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    options = parser.parse_args(argv)
    try:
        content = options.readme.read_text(encoding="utf-8")
        if content.count(BEGIN) != 1 or content.count(END) != 1:
            raise ValueError(f"{options.readme} must hold {BEGIN} and {END} once each")
        made = table(ROOT / "records" / "studies", ROOT / "records")
        before, rest = content.split(BEGIN)
        new = f"{before}{BEGIN}\n{made}\n{END}{rest.split(END)[1]}"
        if options.check and new != content:
            raise ValueError(f"{options.readme} is out of date: run python -m tools.catalogue")
        options.readme.write_text(new, encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
