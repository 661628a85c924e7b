"""The report's files for programs: runs.csv, statistics_summary.json, significance_tests.json."""

import csv
import io
import json
import math
from dataclasses import asdict

from tools import significance as sig
from tools.study import tables
from tools.study.claims import Finding
from tools.study.pairs import Pair, all_pairs, dead_pairs
from tools.study.results import Arm, Group, Study

IN_CSV = (
    "steps", "val_bpb", "val_loss", "pre_quant_val_bpb", "train_bpb", "gap", "params", "bytes_model", "bytes_code",
    "train_seconds", "mean_lr_scale",
)  # fmt: skip


def tidy(value: object) -> object:
    """The value as JSON has it: ten digits of a number, None for one that is not finite."""
    if isinstance(value, float):
        return float(f"{value:.10g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): tidy(inner) for key, inner in value.items()}
    return [tidy(inner) for inner in value] if isinstance(value, list | tuple) else value


def as_json(value: object) -> str:
    return json.dumps(tidy(value), indent=1) + "\n"


def runs_csv(study: Study) -> str:
    """A row per run and group it is in."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["group", "arm", "arch", "seed", "key", *IN_CSV, "settings"])
    for group in study.groups:
        for arm in group.arms:
            for seed, run in arm.runs.items():
                values = [getattr(run, name) for name in IN_CSV]
                settings = " ".join(f"{name}={value}" for name, value in sorted(run.settings.items()))
                writer.writerow([group.name, arm.name, arm.arch, seed, run.key, *values, settings])
    return out.getvalue()


def arm_summary(arm: Arm, group: Group) -> dict:
    """An arm's numbers; the names of the published study's files where it has them."""
    scores, costs = arm.values("val_bpb"), arm.costs
    sample = sig.describe([*scores.values()], arm.name) if scores else None
    many = sample is not None and sample.n > 1
    rounds = [*arm.values("step_ms").values()]
    speed = sig.describe(rounds, arm.name) if rounds else None
    found = {
        "arch": arm.arch, "settings": arm.settings, "tuned": arm.tuned, "num_seeds": len(scores),
        "num_seeds_planned": len(arm.seeds), "seeds_without_score": arm.failed, "all_losses": scores,
        "loss_mean": sample and sample.mean, "loss_std": sample and sample.deviation,
        "loss_sem": sample.deviation / math.sqrt(sample.n) if many else None,
        "loss_ci95": [sample.low, sample.high] if many else None,
    }  # fmt: skip
    for name in (name for name in IN_CSV if name not in ("val_bpb", "val_loss")):
        found[name] = tables.mean_of(arm, lambda run, name=name: getattr(run, name))
    return found | {
        "bytes_artifact": tables.mean_of(arm, lambda run: run.bytes_code and run.bytes_model + run.bytes_code),
        "ms_median": costs and costs.step_ms, "ratio_to_baseline": costs and costs.ratio, "all_speeds": rounds,
        "speed_mean": speed and speed.mean, "speed_std": speed and speed.deviation,
        "peak_mem_mb": costs and costs.peak_mem_mb, "flops_per_token": costs and costs.flops_per_token,
        "hardware": costs and costs.hardware, "published": arm.published,
    }  # fmt: skip


def summary(study: Study) -> dict:
    groups = {}
    for group in study.groups:
        arms = {arm.name: arm_summary(arm, group) for arm in group.arms}
        about = {"budget": group.budget, "baseline": group.baseline, "missing": group.missing}
        groups[group.name] = about | {"arms": arms}
    return {"title": study.title, "unit": "bits per byte", "ngram_bpb": study.ngram_bpb, "groups": groups}


def pair_tests(pair: Pair) -> dict:
    found = {"arm": pair.arm, "against": pair.against, "seeds": pair.keys, "difference": pair.difference}
    for name, test, p_holm in (("paired", pair.paired, pair.p_holm), ("welch", pair.welch, pair.welch_p_holm)):
        found[name] = test and {"t": test.t, "df": test.df, "p": test.p_two_sided, "p_holm": p_holm,
                                "ci95": [test.low, test.high]}  # fmt: skip
    return found | {
        "d_z": pair.d_z, "hedges_g": pair.hedges_g, "permutation_p": pair.permutation_p,
        "smallest_permutation_p": pair.smallest_p, "dead_knob": pair.dead and not pair.same_runs,
        "same_runs": pair.same_runs, "why_untested": pair.why,
    }  # fmt: skip


def tests(study: Study, findings: list[Finding]) -> dict:
    about = {"difference": "arm - against, bits per byte; effects have its sign", "p": "two-sided",
             "p_holm": "over all pairs of the group; of the claims: over the claims"}  # fmt: skip
    groups = {}
    for group in study.groups:
        dead = [{"arm": pair.arm, "same_as": pair.against, "seeds": pair.keys, "same_runs": pair.same_runs}
                for pair in dead_pairs(group)]  # fmt: skip
        groups[group.name] = {"pairs": [pair_tests(pair) for pair in all_pairs(group)], "dead_knobs": dead}
    return {"about": about, "groups": groups, "claims": [asdict(finding) for finding in findings]}
