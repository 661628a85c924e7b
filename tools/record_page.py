"""The README.md of a record: its runs, how to repeat them, and what was measured. Every number comes from the logs."""

import ast
import shlex
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from tools.referee.claims import NOT_IN_CONFIG_SHA
from tools.referee.code import READABLE
from tools.untrusted import text


class Run(NamedTuple):
    """One finished run."""

    folder: Path
    config: dict
    result: dict


def script_defaults(source: str) -> dict[str, str]:
    """Returns what a packed script uses when nothing is set: setting -> text of its environment variable."""
    found, body = {}, ast.parse(source).body
    for scope in (node for node in body if isinstance(node, ast.ClassDef) and node.name.endswith("Config")):
        for node in scope.body:
            if isinstance(node, ast.AnnAssign) and node.value is not None:
                with suppress(ValueError):  # a default that is not a literal is not known here
                    found[node.target.id] = as_variable(ast.literal_eval(node.value))
    for node in body:  # the settings that tools.pack baked in
        if isinstance(node, ast.For) and ast.unparse(node.target) == "setting":
            found |= {name.lower(): value for name, value in ast.literal_eval(node.iter.func.value).items()}
    return found


def as_variable(value: object) -> str:
    """Returns the environment variable that gives a setting this value."""
    return "none" if value is None else str(int(value)) if isinstance(value, bool) else str(value)


def command(run: Run, source: str, script: str) -> str:
    """Returns the shell command that repeats a run: every setting that differs from the script's own default."""
    defaults, result = script_defaults(source), run.result
    values = {name: as_variable(value) for name, value in run.config.items() if name not in NOT_IN_CONFIG_SHA}
    settings = {"data_path": f"data/datasets/{result['dataset']}", "seed": str(result["seed"])}
    settings |= {name: value for name, value in values.items() if defaults.get(name) != value}
    variables = " ".join(f"{name.upper()}={shlex.quote(value)}" for name, value in settings.items())
    many = f"torchrun --standalone --nproc_per_node={result['world_size']}"
    return f"{variables} {many if result['world_size'] > 1 else 'python'} {script}"


README = """# {name}

{blurb}

{author} ([{github_id}](https://github.com/{github_id})), {date}, track `{track}`, architecture `{arch}`.

| Seed | val_bpb | val_loss | Steps | Training, s | Scoring, s | Model, bytes | Total, bytes |
|-----:|--------:|---------:|------:|------------:|-----------:|-------------:|-------------:|
{rows}
| mean | {val_bpb:.6f} | {val_loss:.6f} | | | | | |
| sample std | {val_bpb_std} | {val_loss_std} | | | | | |
{notes}
{disclosed}

Parameters: {params:,}. Code: {bytes_code:,} bytes. Hardware: {hardware}. PyTorch {torch}.
Data: `{dataset}`, {val_bytes:,} bytes of validation text, {val_tokens:,} scored tokens; sha256 of its manifest.json:
`{data_sha256}`.

## Repeat it
In the root of the kit, with that data set in `data/datasets/{dataset}`:
```bash
{commands}
python -m tools.verify {place} --data data/datasets/{dataset}
```
On another machine the number of steps inside the time limit, and with it the score, will differ.

## What was measured
`val_bpb` is the sum of nats over all {val_tokens:,} targets of the validation text, over ln 2 and its {val_bytes:,}
raw bytes; `val_loss` is the same sum per target. Both are of the stored artifact, read back from disk. Training
seconds run from the first batch to the last update{cap}; warm-up on random tokens, export and scoring
lie outside. Bytes are those of `train_gpt.py` and of the artifact on disk; the largest seed counts.
`model_seed{first_seed}.bin` is the artifact of the first seed{copy}. `tools.record` wrote this file from the logs.
"""


def disclosed(rows: list[dict]) -> str:
    """Returns the sentence or table that says which runs of this configuration there were besides."""
    others = [row for row in rows if row["status"] != "scored"]
    if not others:
        return "Beside these runs there was no other of this configuration."
    lines = [f"| {text(row['run_id']).replace('|', '/')} | {row['seed']} | "
             f"{'' if row['val_bpb'] is None else format(row['val_bpb'], '.6f')} | {row['status']} |" for row in others]
    return "\n".join(["Other runs of this configuration, which do not count:", "", "| Run | Seed | val_bpb | Status |",
                      "|-----|-----:|--------:|--------|", *lines])


def readme(runs: list[Run], said: dict, source: str, place: str, compressed: bool) -> str:
    """Returns the text of README.md; every number comes from the logs."""
    row = ("| {seed} | {val_bpb:.6f} | {val_loss:.6f} | {steps:,} | {train_seconds:.3f} | {score_seconds:.3f} | "
           "{bytes_model:,} | {bytes_total:,} |")
    notes = ["One seed: nothing is known about the spread."] if len(runs) == 1 else []
    notes += [f"Interrupted by hand: seed {run.result['seed']}." for run in runs if run.result["interrupted"]]
    stds = {key: "none" if said[key] is None else f"{said[key]:.6f}" for key in ("val_bpb_std", "val_loss_std")}
    cap = f", at most {said['cap_seconds']:g} s" if said["cap_seconds"] else ", without a cap"
    return README.format(
        **{**said, **stds}, notes="".join(f"\n{note}\n" for note in notes), cap=cap, place=place,
        disclosed=disclosed(said["all_runs"]),
        copy=f"; `{READABLE}` is the text inside `train_gpt.py`, to be read and not counted" if compressed else "",
        rows="\n".join(row.format(**run.result) for run in runs),
        data_sha256=runs[0].result["data_sha256"], first_seed=said["seeds"][0],
        commands="\n".join(command(run, source, f"{place}/train_gpt.py") for run in runs),
    )
