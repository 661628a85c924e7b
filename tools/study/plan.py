"""study.toml -> the plan of a study: groups of arms, what each run is set to, and under which key it is filed.

title = "..."                     about = "..."
data = "wikitext2_bytes"          a folder in data/datasets, or a path
seeds = [1, 2, 3, 4, 5]           shared by all arms: runs of one seed are paired
[settings]                        of every run; names are those of the environment
NUM_LAYERS = 6

[tune]                            the nuisance settings: the best of the grid, on a seed of its own, for every arm
seed = 100
settings = {VAL_MAX_TOKENS = 100_000}
grid = [{MATRIX_LR = 0.02}, {MATRIX_LR = 0.04}]

[arms]
gpt = {}                          ARCH is the arm's name unless it says otherwise
"ti_ssm lti" = {ARCH = "ti_ssm", SSM_MODE = "lti"}
"gpt narrow" = {ARCH = "gpt", MODEL_DIM = 64, tuned_as = "gpt"}    at the rates that suit another arm

[[group]]
name = "same shape"               question = "..."
baseline = "gpt"                  arms = ["gpt", "ti_ssm lti"]
settings = {MATRIX_LR = 0.002}    optional: of this group's runs, whatever tuning found
vary = {TI_FEAT = ["const"]}      optional: a copy of each arm (but the baseline) for every combination
seeds = {first = 1, close = 3, within = 0.05}   optional: each arm is run with the first seed, those within so many
                                  bits per byte of the baseline on it with three (more = ["...", ...]: these
                                  too), the baseline with all; of two arms of a claim both if they are as close
                                  to each other, else one
budget = {steps = 200}            or {seconds = 600}: by the clock; or {steps = 200, clock_of = "gpt"}: the steps
                                  that fit into the time of 200 of gpt's; or {steps = 200, bytes_of = "ti_mlp"}:
                                  at the width (MODEL_DIM) whose artifact is as large
"""

import hashlib
import itertools
import json
import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path

from tools.costs import stored_bytes
from tools.pack import check_settings
from tools.study.results import check_claim, need

ROOT = Path(__file__).resolve().parents[2]
NOT_HASHED = ("OUT_DIR", "RUN_ID", "DATA_PATH")  # where a run is, not what it is
BUDGETS = ({"steps"}, {"seconds"}, {"steps", "clock_of"}, {"steps", "bytes_of"})


@dataclass
class Arm:
    """One line of a table: an architecture with settings; `base` is its name among [arms]."""

    name: str
    base: str
    arch: str
    settings: dict[str, str]  # as in the environment; without what tuning and budget add
    tuned_as: str  # the one of [arms] whose tuning it takes


@dataclass
class Group:
    """Arms that are compared with each other."""

    name: str
    question: str
    baseline: str
    budget: dict
    arms: list[Arm]
    data: str
    published: dict[str, str] = field(default_factory=dict)  # arm -> what others reported
    train_score: bool = False  # score the training text too, for the gap
    seeds: dict | None = None  # first, close, within, more; None: all seeds for all arms
    settings: dict[str, str] = field(default_factory=dict)  # of all its runs, over arms' and tuning's

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)


@dataclass
class Study:
    folder: Path
    title: str
    about: str
    data: str
    seeds: list[int]
    tune: dict | None
    arms: dict[str, Arm]
    groups: list[Group]
    claims: list[dict]


@dataclass
class Run:
    """One training run: its settings, and the key that names its files. Equal settings are one run."""

    arch: str
    seed: int
    data: str
    settings: dict[str, str]
    train_score: bool = False  # score the training text as well

    @property
    def key(self) -> str:
        what = {name: value for name, value in self.settings.items() if name not in NOT_HASHED}
        text = json.dumps([self.data, what, self.train_score], sort_keys=True)
        return f"{self.arch}_{hashlib.sha256(text.encode()).hexdigest()[:10]}_seed{self.seed}"


def spelled(value: object) -> str:
    """A TOML value as the environment would have it."""
    return str(int(value)) if isinstance(value, bool) else str(value)


def make_arm(name: str, common: dict, own: dict) -> Arm:
    """An arm with the study's settings under its own; a setting that nothing reads stops the study."""
    settings = {key.upper(): spelled(value) for key, value in (common | own).items()}
    arch, tuned_as = settings.pop("ARCH", name), settings.pop("TUNED_AS", name)
    try:
        known = {key: value for key, value in settings.items() if key not in NOT_HASHED}
        check_settings(arch, known)
    except ValueError as error:
        raise ValueError(f'arm "{name}": {error}') from None
    return Arm(name, name, arch, settings, tuned_as)


def varied(arms: list[Arm], vary: dict[str, list], baseline: str) -> list[Arm]:
    """The arms, and for each but the baseline a copy per combination of the values, named after what differs."""
    found = list(arms)
    for arm in arms:
        if arm.name == baseline and len(arms) > 1:
            continue
        for values in itertools.product(*vary.values()):
            changes = {key.upper(): spelled(value) for key, value in zip(vary, values, strict=True)}
            changed = make_arm(arm.arch, arm.settings, changes).settings
            if changed != arm.settings:
                words = " ".join(f"{key}={value}" for key, value in changes.items())
                found.append(replace(arm, name=f"{arm.name} {words}", settings=changed))
    return found


def read_group(table: dict, arms: dict[str, Arm], data: str) -> Group:
    need(table, "name question baseline arms budget", f'group "{table.get("name", "?")}"')
    where, budget, seeds = f'group "{table["name"]}"', table["budget"], table.get("seeds")
    if unknown := [name for name in (*table["arms"], budget.get("bytes_of")) if name not in (None, *arms)]:
        raise ValueError(f'{where} names the arm "{unknown[0]}", which [arms] does not define')
    if set(budget) not in BUDGETS:
        raise ValueError(f"{where}: budget {budget} must be steps or seconds, or steps and clock_of or bytes_of")
    chosen = [arms[name] for name in table["arms"]]
    own = {key.upper(): spelled(value) for key, value in table.get("settings", {}).items()}
    for i, arm in enumerate(chosen):
        chosen[i] = replace(arm, settings=make_arm(arm.name, {"ARCH": arm.arch} | arm.settings, own).settings)
    chosen = varied(chosen, table.get("vary", {}), table["baseline"])
    names = [arm.name for arm in chosen]
    if table["baseline"] not in names:
        raise ValueError(f'{where}: its baseline "{table["baseline"]}" is none of its arms')
    if seeds is not None:
        need(seeds, "first close within", f"{where}: seeds")
    published = table.get("published", {})
    for what, named in (
        ("budget, clock_of,", [budget.get("clock_of")]), ("seeds, more,", (seeds or {}).get("more", [])),
        ("published", published),
    ):  # fmt: skip
        if unknown := [name for name in named if name not in (None, *names)]:
            raise ValueError(f'{where}: {what} names "{unknown[0]}", which is none of its arms')
    return Group(
        table["name"], table["question"], table["baseline"], budget, chosen, table.get("data", data),
        published, table.get("train_score", False), seeds, own,
    )  # fmt: skip


def load_study(path: Path) -> Study:
    """The study that a study.toml describes; ValueError says what is wrong with it."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not TOML: {error}") from None
    need(table, "title about data seeds arms group", path)
    if len(set(table["seeds"])) < len(table["seeds"]) or not table["seeds"]:
        raise ValueError(f"{path}: seeds {table['seeds']} must be different whole numbers")
    tune = table.get("tune")
    if tune is not None:
        need(tune, "seed grid", f"{path}: [tune]")
        if tune["seed"] in table["seeds"]:
            raise ValueError(f"{path}: [tune] seed {tune['seed']} is one of the study's; tune on another")
    arms = {name: make_arm(name, table.get("settings", {}), own) for name, own in table["arms"].items()}
    tuned = {arm.name for arm in arms.values() if arm.tuned_as == arm.name}
    if unknown := [arm.tuned_as for arm in arms.values() if arm.tuned_as not in tuned]:
        raise ValueError(f'{path}: tuned_as = "{unknown[0]}" must name one of [arms] that is tuned itself')
    groups = [read_group(group, arms, table["data"]) for group in table["group"]]
    names_of = {group.name: [arm.name for arm in group.arms] for group in groups}
    for claim in table.get("claims", []):
        check_claim(claim, names_of, f'{path}: claim "{claim.get("claim", "?")}"')
    names = [group.name for group in groups]
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: two groups have one name: {names}")
    return Study(
        path.parent, table["title"], table["about"], table["data"], table["seeds"], tune, arms, groups,
        table.get("claims", []),
    )  # fmt: skip


def tuning_runs(study: Study, arm: Arm) -> list[tuple[dict, Run]]:
    """(the grid's settings, the run that tries them) of an arm, in the grid's order."""
    if study.tune is None:
        return []
    found = []
    for point in study.tune["grid"]:
        changes = study.tune.get("settings", {}) | point
        settings = arm.settings | {key.upper(): spelled(value) for key, value in changes.items()}
        seed = study.tune["seed"]
        found.append((point, Run(arm.arch, seed, study.data, settings | {"SEED": str(seed)})))
    return found


def fitted_width(arm: Arm, target: int, vocab_size: int) -> dict[str, str]:
    """MODEL_DIM at which the arm's artifact comes closest to `target` stored bytes."""
    step = 2 * int(arm.settings.get("NUM_HEADS", 8))
    low, high = step, step

    def size(width: int) -> int:
        return stored_bytes(arm.arch, arm.settings | {"MODEL_DIM": str(width)}, vocab_size)

    while size(high) < target:
        low, high = high, 2 * high
    while high - low > step:
        middle = (low + high) // (2 * step) * step
        low, high = (middle, high) if size(middle) < target else (low, middle)
    return {"MODEL_DIM": str(min((low, high), key=lambda width: abs(size(width) - target)))}
