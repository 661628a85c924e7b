"""Reads the folder of a study: plan.json, runs/*.json, measures/*.json. A run or a measure may be missing.

Claims stand in study.toml and go from there into plan.json; check_claim serves both.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

METRICS = {
    "val_bpb": "bits per byte", "gap": "bits per byte", "bytes_model": "bytes", "step_ms": "ms", "params": "parameters",
}  # fmt: skip
EXPECTED = ("lower", "higher", "ratio")  # of a claim


@dataclass(frozen=True)
class Run:
    """One training run. val_bpb is None for one that ended without a finite score."""

    key: str
    arch: str
    seed: int
    settings: dict[str, object]
    steps: int
    val_bpb: float | None
    params: int
    bytes_model: int
    pre_quant_val_bpb: float | None = None
    val_loss: float | None = None  # nats per token
    bytes_code: int | None = None
    train_seconds: float | None = None
    mean_lr_scale: float | None = None
    train_bpb: float | None = None  # of the training text
    curve: tuple[tuple[float, float, float], ...] = ()  # step, nats per token, seconds
    val_curve: tuple[tuple[float, float], ...] = ()  # step, bits per byte
    gates: dict[str, list[list[float]]] | None = None  # gate group -> layer -> quantile

    @property
    def gap(self) -> float | None:
        """Bits per byte by which the validation text scores worse than the training text."""
        return None if self.val_bpb is None or self.train_bpb is None else self.val_bpb - self.train_bpb


@dataclass(frozen=True)
class Costs:
    """What a step costs on `hardware`; ratio is over the baseline, in turns with it."""

    step_ms: float
    step_ms_rounds: tuple[float, ...] = ()
    ratio: float | None = None
    peak_mem_mb: float | None = None  # 10^6 bytes
    flops_per_token: float | None = None  # forward, 2 per multiply-add
    hardware: str = ""


@dataclass(frozen=True)
class Arm:
    """An architecture with settings; runs: seed -> what there is of the seeds wanted."""

    name: str
    arch: str
    settings: dict[str, object]
    tuned: dict[str, object]
    runs: dict[int, Run]
    costs: Costs | None
    published: str
    seeds: tuple[int, ...] = ()  # wanted

    @property
    def failed(self) -> list[int]:
        """The seeds whose run ended without a finite score."""
        return [seed for seed, run in self.runs.items() if run.val_bpb is None]

    def values(self, metric: str) -> dict[int, float]:
        """The metric of each finished run, by seed; a step time by round instead."""
        if metric == "step_ms":
            return dict(enumerate(self.costs.step_ms_rounds)) if self.costs else {}
        found = {seed: getattr(run, metric) for seed, run in self.runs.items() if run.val_bpb is not None}
        return {seed: float(value) for seed, value in found.items() if value is not None}


@dataclass(frozen=True)
class Group:
    """Arms that are compared with each other, above all with the baseline."""

    name: str
    question: str
    budget: str
    baseline: str
    seeds: tuple[int, ...]  # wanted of its arms, some perhaps of one arm alone
    arms: tuple[Arm, ...]
    text: str = ""  # the data set; that of the study, if the plan does not say

    def arm(self, name: str) -> Arm | None:
        return next((arm for arm in self.arms if arm.name == name), None)

    @property
    def missing(self) -> list[str]:
        """What the group lacks, a sentence each."""
        found = []
        for arm in self.arms:
            num_scores, num_seeds = len(arm.values("val_bpb")), len(arm.seeds)
            if num_scores < num_seeds:
                failed = f", without a finite score: seed {', '.join(map(str, arm.failed))}" if arm.failed else ""
                found.append(f"{arm.name}: {num_scores} of {num_seeds} seeds{failed}")
        if unmeasured := [arm.name for arm in self.arms if arm.costs is None]:
            names = "any arm" if len(unmeasured) == len(self.arms) else ", ".join(unmeasured)
            found.append(f"step time, memory and operations not measured of {names}")
        return found

    def in_turns(self, arm: Arm) -> bool:
        """True if the arm's rounds and the baseline's are of one measurement: only then are they pairs."""
        base = self.arm(self.baseline)
        if not (arm.costs and base.costs and arm.costs.ratio):
            return False
        rounds, base_rounds = arm.costs.step_ms_rounds, base.costs.step_ms_rounds
        if not rounds or len(rounds) != len(base_rounds):
            return False
        ratios = sorted(a / b for a, b in zip(rounds, base_rounds, strict=True))
        middle = (ratios[(len(ratios) - 1) // 2] + ratios[len(ratios) // 2]) / 2
        return math.isclose(middle, arm.costs.ratio, rel_tol=1e-6)


@dataclass(frozen=True)
class Study:
    """A study as far as it is done. ngram_bpb: by text, bits per byte of its count tables."""

    folder: Path
    title: str
    about: str
    hardware: str
    text: str
    vocab: int
    ngram_bpb: dict[str, dict[str, float]]
    groups: tuple[Group, ...]
    claims: tuple[dict, ...]
    tuning: tuple[dict, ...]

    def group(self, name: str) -> Group | None:
        return next((group for group in self.groups if group.name == name), None)


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; a study's report needs it") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None


def need(table: dict, names: str, where: object) -> list:
    """The values under these names; ValueError says which is not there."""
    for name in names.split():
        if name not in table:
            raise ValueError(f"{where} lacks {name!r}; it needs {names.replace(' ', ', ')}")
    return [table[name] for name in names.split()]


def check_claim(claim: dict, arms: dict[str, list[str]], where: str) -> None:
    """ValueError says what is wrong with a claim about groups that have these arms."""
    _, group, arm, against, metric, expect = need(claim, "claim group arm against metric expect", where)
    for name, value, known in (("group", group, arms), ("metric", metric, METRICS), ("expect", expect, EXPECTED)):
        if value not in known:
            raise ValueError(f"{where}: {name} {value!r} must be one of {', '.join(known)}")
    if unknown := [name for name in (arm, against) if name not in arms[group]]:
        raise ValueError(f'{where} names "{unknown[0]}", which is none of the arms of group "{group}"')
    if expect == "ratio" and not (claim.get("at_least") or 0) > 0:
        raise ValueError(f"{where}: at_least {claim.get('at_least')} must be above 0 for a ratio")


def whole(points: list[list]) -> tuple[tuple, ...]:
    """The points that have all their numbers, finite ones."""
    return tuple(tuple(point) for point in points if all(value is not None and math.isfinite(value) for value in point))


def read_run(path: Path) -> Run:
    row = read_json(path)
    need(row, "key arch seed steps val_bpb params bytes_model", path)
    own = {name: row[name] for name in Run.__dataclass_fields__ if name in row}
    own |= {"curve": whole(row.get("curve") or []), "val_curve": whole(row.get("val_curve") or [])}
    score = row["val_bpb"]
    return Run(**{"settings": {}} | own | {"val_bpb": score if score is not None and math.isfinite(score) else None})


def read_costs(path: Path) -> Costs | None:
    if not path.is_file():
        return None
    row = read_json(path)
    need(row, "step_ms", path)
    own = {name: row[name] for name in Costs.__dataclass_fields__ if name in row}
    return Costs(**own | {"step_ms_rounds": tuple(row.get("step_ms_rounds") or ())})


def read_arm(table: dict, folder: Path, published: dict, planned: list[int], where: str) -> Arm:
    """An arm of the plan; planned: the study's seeds, wanted of an arm whose runs are not known yet."""
    name, arch = need(table, "name arch", where)
    paths = {int(seed): folder / "runs" / f"{key}.json" for seed, key in (table.get("runs") or {}).items()}
    runs = {seed: read_run(path) for seed, path in sorted(paths.items()) if path.is_file()}
    costs = read_costs(folder / "measures" / f"{table['measure']}.json") if table.get("measure") else None
    words = table.get("published", published.get(name, ""))
    settings, tuned = table.get("settings") or {}, table.get("tuned") or {}
    return Arm(name, arch, settings, tuned, runs, costs, "" if words is None else str(words), tuple(paths or planned))


def read_group(table: dict, folder: Path, planned: list[int], text: str) -> Group:
    """A group of the plan; planned: the study's seeds, else those that its arms name."""
    where = f'{folder / "plan.json"}: group "{table.get("name", "?")}"'
    name, question, budget, baseline, arms = need(table, "name question budget baseline arms", where)
    found = tuple(read_arm(arm, folder, table.get("published") or {}, planned, f"{where}, an arm") for arm in arms)
    if baseline not in [arm.name for arm in found]:
        raise ValueError(f'{where}: its baseline "{baseline}" is none of its arms')
    seeds = planned or sorted({int(seed) for arm in arms for seed in arm.get("runs") or {}})
    return Group(name, question, str(budget), baseline, tuple(seeds), found, str(table.get("data", text)))


def read_study(folder: Path) -> Study:
    """The study in a folder; ValueError names the file and what it lacks."""
    plan = read_json(folder / "plan.json")
    title, about, groups = need(plan, "title about groups", folder / "plan.json")
    words = [str(plan.get(name, "")) for name in ("hardware", "text")]
    found = [read_group(group, folder, plan.get("seeds") or [], words[1]) for group in groups]
    return Study(
        folder, title, about, *words, int(plan.get("vocab", 0)), plan.get("ngram_bpb") or {},
        tuple(found), tuple(plan.get("claims") or ()), tuple(plan.get("tuning") or ()),
    )  # fmt: skip
