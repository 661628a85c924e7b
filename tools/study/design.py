"""What a study's runs are in full, once tuning, widths and clocks are known; and plan.json, which the report reads."""

import hashlib
import json
import math
import re
from functools import cached_property
from pathlib import Path

from tools.costs import stored_bytes
from tools.study.ngrams import ngram_bpb
from tools.study.plan import Arm, Group, Run, Study, fitted_width, spelled, tuning_runs
from tools.study.runner import data_path, result_path
from train_gpt import Dataset

FREE = ("SEED", "ITERATIONS", "MAX_WALLCLOCK_SECONDS", "SCHEDULE")  # what the cost of a step does not depend on


def label(point: dict) -> str:
    """A grid point in words, by its first setting."""
    name, value = next(iter(point.items()))
    return f"{name.lower()}={value}"


class Design:
    """A study, resolved as far as its files allow."""

    def __init__(self, study: Study):
        self.study = study

    @cached_property
    def vocab_size(self) -> int:
        return Dataset(str(data_path(self.study.data)), None).vocab_size

    def row(self, run: Run) -> dict | None:
        """The result of a run, if it is done."""
        path = result_path(run, self.study.folder)
        return json.loads(path.read_text()) if path.is_file() else None

    def tuning(self) -> list[Run]:
        arms = [arm for arm in self.study.arms.values() if arm.tuned_as == arm.name]
        return [run for arm in arms for _, run in tuning_runs(self.study, arm)]

    def tuned(self, arm_name: str) -> dict | None:
        """The grid point at which the arm did best; None until all of its points are done, {} without tuning."""
        tried = [(point, self.row(run)) for point, run in tuning_runs(self.study, self.study.arms[arm_name])]
        if any(row is None for _, row in tried):
            return None
        return min(tried, key=lambda pair: pair[1]["val_bpb"])[0] if tried else {}

    def tuned_in(self, group: Group, arm: Arm) -> dict | None:
        """What tuning gives the arm in this group: all but what the group sets itself; None until it is done."""
        tuned = self.tuned(arm.tuned_as)
        return tuned and {key: value for key, value in tuned.items() if key.upper() not in group.settings}

    def budget_settings(self, group: Group, arm: Arm) -> dict[str, str] | None:
        """What the group's budget makes of the arm; None while a step time is missing."""
        budget = group.budget
        if "seconds" in budget:
            return {"MAX_WALLCLOCK_SECONDS": str(budget["seconds"]), "SCHEDULE": "time"}
        by_steps = {"MAX_WALLCLOCK_SECONDS": "0", "SCHEDULE": "steps"}
        if "clock_of" in budget:
            paths = [self.measure_path(group, one) for one in (group.arm(budget["clock_of"]), arm)]
            if not all(path.is_file() for path in paths):
                return None
            costs = [json.loads(path.read_text()) for path in paths]
            steps = budget["steps"] * costs[0]["ratio"] / costs[1]["ratio"]
            return by_steps | {"ITERATIONS": str(max(1, round(steps)))}
        fixed = by_steps | {"ITERATIONS": str(budget["steps"])}
        if "bytes_of" in budget and arm.base != budget["bytes_of"]:
            model = self.study.arms[budget["bytes_of"]]
            fixed |= fitted_width(arm, stored_bytes(model.arch, model.settings, self.vocab_size), self.vocab_size)
        return fixed

    def timed(self, group: Group, arm: Arm) -> tuple[Group, Arm]:
        """Where the arm's step is timed: by the clock, another group that has all of these arms, if there is one.

        That is a group of steps or seconds, or an earlier one by the clock whose arms differ in the rates alone.
        """
        if "clock_of" not in group.budget:
            return group, arm
        earlier = self.study.groups[: self.study.groups.index(group)]
        for other in self.study.groups:
            named, by_steps = {one.name: one for one in other.arms}, other.budget.keys() <= {"steps", "seconds"}
            if not named.keys() >= {one.base for one in group.arms}:
                continue
            if by_steps:
                return other, named[arm.base]
            if other in earlier and "clock_of" in other.budget and all(
                self.but_rates(one) == self.but_rates(named[one.base]) for one in group.arms
            ):  # fmt: skip
                return self.timed(other, named[arm.base])
        return group, arm

    def but_rates(self, arm: Arm) -> dict[str, str]:
        """The arm's settings without those that tuning may set."""
        rates = {name.upper() for point in self.study.tune["grid"] for name in point} if self.study.tune else set()
        return {name: value for name, value in arm.settings.items() if name not in rates}

    def clocks(self, only: list[str] | None = None) -> set[str]:
        """The groups that must be timed before the runs of these groups are known."""
        by_clock = [group for group in self.study.groups if "clock_of" in group.budget]
        return {
            self.timed(group, arm)[0].name
            for group in by_clock
            if only is None or group.name in only
            for arm in group.arms
        }

    def arm_runs(self, group: Group, arm: Arm) -> dict[int, Run]:
        """The arm's runs by seed; empty while they are not known. What the first seeds show decides on more."""
        runs = self.seeded_runs(group, arm)
        if group.seeds is None or arm.name == group.baseline or not runs:
            return runs
        count = group.seeds["close" if self.is_near(group, arm) or self.is_claimed(group, arm) else "first"]
        return {seed: runs[seed] for seed in self.study.seeds[:count]}

    def is_near(self, group: Group, arm: Arm) -> bool:
        """Whether the arm is close to the baseline or better, or has more seeds in any case."""
        gap = self.first_gap(group, arm, group.arm(group.baseline))
        return arm.name in group.seeds.get("more", []) or gap < group.seeds["within"]

    def is_claimed(self, group: Group, arm: Arm) -> bool:
        """Whether a claim sets the arm beside another that is close to it, or that has one seed: a test needs two."""
        for claim in self.study.claims:
            pair = [claim["arm"], claim["against"]]
            if claim["group"] != group.name or arm.name not in pair or group.baseline in pair:
                continue
            other = group.arm(pair[1 - pair.index(arm.name)])
            gap = abs(self.first_gap(group, arm, other))
            alone = arm.name == claim["arm"] and gap < math.inf and not self.is_near(group, other)
            if alone or gap < group.seeds["within"]:
                return True
        return False

    def first_gap(self, group: Group, arm: Arm, other: Arm) -> float:
        """By how many bits per byte the arm is worse on the first seeds than the other; inf until they are done."""
        mine, theirs = self.seeded_runs(group, arm), self.seeded_runs(group, other)
        if not mine or not theirs:
            return math.inf
        pairs = [(self.row(mine[seed]), self.row(theirs[seed])) for seed in self.study.seeds[: group.seeds["first"]]]
        if not all(a and b and a["val_bpb"] is not None for a, b in pairs):
            return math.inf
        return sum(a["val_bpb"] - b["val_bpb"] for a, b in pairs) / len(pairs)

    def seeded_runs(self, group: Group, arm: Arm) -> dict[int, Run]:
        """The run of every seed of the study; empty while they are not known."""
        tuned, budget = self.tuned_in(group, arm), self.budget_settings(group, arm)
        if tuned is None or budget is None:
            return {}
        settings = arm.settings | {key.upper(): spelled(value) for key, value in tuned.items()} | budget
        return {
            seed: Run(arm.arch, seed, group.data, settings | {"SEED": str(seed)}, group.train_score)
            for seed in self.study.seeds
        }

    def runs(self, only: list[str] | None = None) -> list[Run]:
        """All runs, group by group and seed by seed, so that what is there is fair at any time; each once."""
        found: dict[str, Run] = {}
        for group in self.study.groups:
            if only and group.name not in only:
                continue
            by_arm = [self.arm_runs(group, arm) for arm in group.arms]
            for seed in self.study.seeds:
                for runs in by_arm:
                    if seed in runs:
                        found.setdefault(runs[seed].key, runs[seed])
        return list(found.values())

    def measured_settings(self, group: Group, arm: Arm) -> dict[str, str]:
        """The settings under which a step of the arm is measured."""
        budget = (self.budget_settings(group, arm) or {}) if "clock_of" not in group.budget else {}
        own = {name: value for name, value in (arm.settings | budget).items() if name not in FREE}
        return {"VOCAB_SIZE": str(self.vocab_size)} | own

    def measure_path(self, group: Group, arm: Arm) -> Path:
        """Where the costs of the arm's step are filed; the name holds what they and the baseline's depend on."""
        group, arm = self.timed(group, arm)
        what = [[one.arch, self.measured_settings(group, one)] for one in (group.arm(group.baseline), arm)]
        digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:10]
        return self.study.folder / "measures" / f"{re.sub('[^a-z0-9]+', '_', arm.name.lower())}_{digest}.json"

    def budget_words(self, group: Group) -> str:
        budget = group.budget
        if "seconds" in budget:
            return f"{budget['seconds']} seconds of training"
        if "clock_of" in budget:
            return f"the time of {budget['steps']} steps of {budget['clock_of']}, by measured step times"
        if "bytes_of" in budget:
            return f"{budget['steps']} steps, at the width whose artifact is as large as {budget['bytes_of']}'s"
        return f"{budget['steps']} steps"

    def plan(self) -> dict:
        """What the report reads beside the runs: groups, arms, keys of runs, tuning, claims."""
        study, groups = self.study, []
        for group in study.groups:
            arms = []
            for arm in group.arms:
                runs = self.arm_runs(group, arm)
                settings = runs[study.seeds[0]].settings if runs else arm.settings
                measured = self.measure_path(group, arm)
                arms.append({
                    "name": arm.name, "arch": arm.arch, "settings": {k: v for k, v in settings.items() if k != "SEED"},
                    "tuned": self.tuned_in(group, arm) or {},
                    "runs": {str(seed): run.key for seed, run in runs.items()},
                    "measure": measured.stem, "published": group.published.get(arm.name),
                })  # fmt: skip
            head = {"name": group.name, "question": group.question, "budget": self.budget_words(group)}
            groups.append(head | {"data": group.data, "baseline": group.baseline, "arms": arms})
        tuning = []
        for arm in (arm for arm in study.arms.values() if arm.tuned_as == arm.name):
            tried = [(point, self.row(run)) for point, run in tuning_runs(study, arm)]
            values = {label(point): row and row["val_bpb"] for point, row in tried}
            chosen = self.tuned(arm.name)
            tuning.append({"arm": arm.name, "values": values, "chosen": label(chosen) if chosen else None})
        texts = [group.data for group in study.groups]
        hardware = {row["hardware"] for run in self.runs() if (row := self.row(run))}
        return {
            "title": study.title, "about": study.about, "text": study.data, "vocab": self.vocab_size,
            "seeds": study.seeds, "hardware": ", ".join(sorted(hardware)),
            "ngram_bpb": {name: ngram_bpb(data_path(name)) for name in dict.fromkeys([study.data, *texts])},
            "groups": groups, "claims": study.claims,
            "tuning": tuning if study.tune else [],
        }  # fmt: skip
