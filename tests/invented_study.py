"""A study's folder of invented results, for the tests of its report."""

import json
import math
from pathlib import Path

import numpy as np

from tools.study import claims, page, results, tables

SEEDS = (42, 123, 456, 789, 1011)
MEANS = {"gpt": 2.10, "ti_mlp R&D_50%": 2.16, "ti_mlp const": 2.161, "tong_ode": 2.12}
PARAMS = {"gpt": 620_000, "ti_mlp R&D_50%": 10_000, "ti_mlp const": 10_000, "tong_ode": 400_000}
GATED = ("ti_mlp R&D_50%", "ti_mlp const")


def put(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def a_run(key: str, arm: str, seed: int, score: float, rng: np.random.Generator) -> dict:
    steps = np.arange(1, 201)
    losses = score / 2.1 * 3.0 + 2.5 * np.exp(-steps / 25) + rng.normal(0, 0.03, len(steps))
    curve = [[int(step), float(loss), 0.021 * int(step)] for step, loss in zip(steps, losses, strict=True)]
    layers = [[0.4 + 0.1 * layer, 0.9 + 0.05 * layer * rng.normal(1, 0.1), 1.5 + 0.1 * layer] for layer in range(6)]
    return dict(
        key=key, arch=arm.split()[0], seed=seed, settings={"NUM_LAYERS": "6", "SEED": str(seed)}, log=f"logs/{key}.log",
        steps=200, val_bpb=score, val_loss=score * 1.4, pre_quant_val_bpb=score - 0.003, params=PARAMS[arm],
        bytes_model=PARAMS[arm] + int(rng.integers(0, 400)), bytes_code=60_000, train_seconds=4.2, mean_lr_scale=0.7,
        train_bpb=score - 0.1 - 0.02 * (arm == "gpt") + float(rng.normal(0, 0.004)), curve=curve,
        val_curve=[[step, score + 2 * math.exp(-step / 40)] for step in (50, 100, 150, 200)],
        gates={"mlp_in": layers, "mlp_out": layers} if arm in GATED else None,
    )  # fmt: skip


def a_claim(arm: str, against: str, metric: str, expect: str, **more: object) -> dict:
    words = f"{arm} {metric} {expect} {against}"
    return {"claim": words, "published": "9.1 %", "group": "same shape", "arm": arm, "against": against,
            "metric": metric, "expect": expect} | more  # fmt: skip


def make_study(folder: Path) -> None:
    """A finished study of four arms in two groups."""
    rng = np.random.default_rng(5)
    shared = dict(zip(SEEDS, rng.normal(0, 0.02, len(SEEDS)), strict=True))  # what a seed does to every arm
    arms, rounds = [], {}
    base = rng.uniform(18, 24, 9)
    for i, (name, mean) in enumerate(MEANS.items()):
        runs = {}
        for seed in SEEDS:
            key = runs[str(seed)] = f"{tables.slug(name)}_{seed}"
            put(
                folder / "runs" / f"{key}.json",
                a_run(key, name, seed, mean + shared[seed] + rng.normal(0, 0.004), rng),
            )
        rounds[name] = [float(x) for x in base * (1 + 0.3 * i) * rng.normal(1, 0.01, 9)]
        ratio = float(np.median(np.array(rounds[name]) / rounds["gpt"]))
        costs = dict(step_ms=float(np.median(rounds[name])), step_ms_rounds=rounds[name], ratio=ratio)
        costs |= dict(peak_mem_mb=123.4, flops_per_token=1.24e6, hardware="2 cores", torch="2.13.0")
        put(folder / "measures" / f"m{i}.json", costs)
        arms.append({"name": name, "arch": name.split()[0], "settings": {"NUM_LAYERS": 6}, "tuned": {"matrix_lr": 0.02},
                     "runs": runs, "measure": f"m{i}", "published": "2.23 nats" if i == 1 else None})  # fmt: skip
    groups = [
        {"name": "same shape", "question": "What does sharing cost?", "budget": "200 steps", "baseline": "gpt",
         "arms": arms},
        {"name": "same_clock", "question": "And by the clock?", "budget": "the wall-clock of 200 steps of gpt",
         "baseline": "gpt", "arms": arms[:2]},
    ]  # fmt: skip
    put(folder / "plan.json", {
        "title": "Weights over depth", "about": "A study of invented numbers.", "hardware": "2 cores",
        "text": "WikiText", "vocab": 1024, "ngram_bpb": {"WikiText": {"unigram": 3.4, "bigram": 2.5}},
        "groups": groups, "claims": [],
        "tuning": [{"arm": "gpt", "values": {"0.01": 2.2, "0.02": 2.1, "0.04": 2.3}, "chosen": 0.02}],
    })  # fmt: skip


def texts(folder: Path) -> dict[str, str]:
    """The report's files without the figures, which take seconds."""
    return page.texts(results.read_study(folder), set())


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    put(path, content)


def verdict(folder: Path, *wanted: dict) -> list[claims.Finding]:
    edit(folder / "plan.json", lambda plan: plan.update(claims=list(wanted)))
    return claims.judge(results.read_study(folder))


def scores(folder: Path, arm: str) -> list[float]:
    return [json.loads((folder / "runs" / f"{tables.slug(arm)}_{seed}.json").read_text())["val_bpb"] for seed in SEEDS]
