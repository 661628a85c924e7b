"""The statistics of a study's report against scipy called directly, and its verdicts on claims, case by case."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from invented_study import GATED, MEANS, SEEDS, a_claim, edit, make_study, scores, texts, verdict
from scipy import stats as scipy_stats

from tools import significance as sig
from tools.study import claims, pairs, results, tables


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_study(tmp_path)
    return tmp_path


def test_tests_of_all_pairs_are_scipys(folder):
    group = results.read_study(folder).group("same shape")
    found = pairs.all_pairs(group)
    assert len(found) == 6
    for pair in found:
        mine, other = scores(folder, pair.arm), scores(folder, pair.against)
        paired, welch = scipy_stats.ttest_rel(mine, other), scipy_stats.ttest_ind(mine, other, equal_var=False)
        assert (pair.paired.t, pair.paired.p_two_sided) == pytest.approx((paired.statistic, paired.pvalue))
        assert (pair.paired.low, pair.paired.high) == pytest.approx(tuple(paired.confidence_interval(0.95)))
        assert (pair.welch.t, pair.welch.p_two_sided) == pytest.approx((welch.statistic, welch.pvalue))
        differences = np.array(mine) - other
        assert pair.d_z == pytest.approx(differences.mean() / differences.std(ddof=1))
        pooled = math.sqrt((np.var(mine, ddof=1) + np.var(other, ddof=1)) / 2)
        assert pair.hedges_g == pytest.approx(differences.mean() / pooled * (1 - 3 / (4 * 8 - 1)), rel=2e-3)
        assert pair.smallest_p == 2 / 2**5 <= pair.permutation_p <= 1
    ps = [pair.paired.p_two_sided for pair in found]
    order = np.argsort(ps)
    by_hand = np.maximum.accumulate([min(1, (6 - rank) * ps[i]) for rank, i in enumerate(order)])
    assert [found[i].p_holm for i in order] == pytest.approx(list(by_hand))


def test_table_corrects_over_the_comparisons_with_the_baseline_alone(folder):
    found = pairs.to_baseline(results.read_study(folder).group("same shape"))
    assert list(found) == list(MEANS)[1:]
    assert [pair.p_holm for pair in found.values()] == pytest.approx(
        sig.holm([scipy_stats.ttest_rel(scores(folder, name), scores(folder, "gpt")).pvalue for name in found])
    )


@pytest.mark.parametrize("expect, expected", [("higher", claims.HOLDS), ("lower", claims.FAILS)])
def test_claim_of_a_clear_difference_is_decided_by_its_direction(folder, expect, expected):
    (found,) = verdict(folder, a_claim("ti_mlp R&D_50%", "gpt", "val_bpb", expect))
    assert (found.verdict, found.n, found.num_wanted) == (expected, 5, 5)
    assert found.low > 0 and found.value == pytest.approx(0.06, abs=0.01)
    (gap,) = verdict(folder, a_claim("ti_mlp R&D_50%", "gpt", "gap", "higher" if expect == "lower" else "lower"))
    assert gap.verdict == (claims.HOLDS if expect == "higher" else claims.FAILS)


def test_claim_within_the_noise_is_not_resolved_and_says_what_the_seeds_could_show(folder):
    (found,) = verdict(folder, a_claim("ti_mlp R&D_50%", "ti_mlp const", "val_bpb", "lower"))
    assert found.verdict == claims.OPEN and found.low < 0 < found.high
    error, critical = (found.high - found.low) / 2 / scipy_stats.t.ppf(0.975, 4), scipy_stats.t.ppf(0.975, 4)
    shift = found.smallest_effect / error
    power = scipy_stats.nct.sf(critical, 4, shift) + scipy_stats.nct.cdf(-critical, 4, shift)
    assert power == pytest.approx(0.8, abs=1e-3)
    assert f"{found.smallest_effect:.4f}" in found.words


def test_many_claims_are_corrected_for_their_number(folder):
    claim = a_claim("tong_ode", "gpt", "val_bpb", "higher")
    (alone,) = verdict(folder, claim)
    num_others = math.ceil(0.05 / alone.p)
    several = verdict(folder, claim, *[a_claim("ti_mlp R&D_50%", "ti_mlp const", "val_bpb", "lower")] * num_others)
    assert alone.verdict == claims.HOLDS and alone.p_holm == alone.p
    assert several[0].p_holm == pytest.approx((1 + num_others) * alone.p) and several[0].verdict == claims.OPEN


@pytest.mark.parametrize("at_least, expected", [(61.0, claims.HOLDS), (62.0, claims.HOLDS), (63.0, claims.FAILS)])
def test_ratio_of_parameters_is_exact(folder, at_least, expected):
    (found,) = verdict(folder, a_claim("ti_mlp R&D_50%", "gpt", "params", "ratio", at_least=at_least))
    assert (found.verdict, found.value, found.low) == (expected, pytest.approx(62), pytest.approx(62))


def test_ratio_is_judged_by_its_interval(folder):
    sizes = {arm: [json.loads((folder / "runs" / f"{tables.slug(arm)}_{seed}.json").read_text())["bytes_model"]
                   for seed in SEEDS] for arm in ("gpt", "ti_mlp R&D_50%")}  # fmt: skip
    logs = np.log(np.array(sizes["gpt"]) / sizes["ti_mlp R&D_50%"])
    low, high = np.exp(scipy_stats.t.interval(0.95, 4, logs.mean(), scipy_stats.sem(logs)))
    middle = math.exp(logs.mean())
    limits = [low * 0.999, middle * 0.9999, middle * 1.0001, high * 1.001]
    found = [verdict(folder, a_claim("ti_mlp R&D_50%", "gpt", "bytes_model", "ratio", at_least=x))[0] for x in limits]
    assert [one.verdict for one in found] == [claims.HOLDS, claims.OPEN, claims.OPEN, claims.FAILS]
    assert (found[0].low, found[0].high) == pytest.approx((low, high))


def test_step_times_are_compared_only_if_they_took_turns(folder):
    faster = a_claim("gpt", "tong_ode", "step_ms", "ratio", at_least=1.5)
    (found,) = verdict(folder, faster)
    assert found.verdict == claims.HOLDS and found.n == 9 and found.value == pytest.approx(1.9, rel=0.03)
    edit(
        folder / "measures" / "m3.json",
        lambda costs: costs.update(step_ms_rounds=[1.1 * x for x in costs["step_ms_rounds"]]),
    )
    (found,) = verdict(folder, faster)
    assert found.verdict == claims.NOT_RUN and "not timed in turns" in found.words


def test_claim_without_runs_is_not_run(folder):
    for seed in SEEDS:
        (folder / "runs" / f"tong_ode_{seed}.json").unlink()
    (found,) = verdict(folder, a_claim("tong_ode", "gpt", "val_bpb", "lower"))
    assert found.verdict == claims.NOT_RUN and "no runs of tong_ode" in found.words


def test_claim_with_one_common_seed_is_not_resolved(folder):
    for seed in SEEDS[1:]:
        (folder / "runs" / f"tong_ode_{seed}.json").unlink()
    (found,) = verdict(folder, a_claim("tong_ode", "gpt", "val_bpb", "higher"))
    assert (found.verdict, found.n, found.low) == (claims.OPEN, 1, None)
    assert "| 1 of 5 | not resolved |" in texts(folder)["README.md"]


@pytest.mark.parametrize(("score", "said"), [(2.9, claims.HOLDS), (2.12, claims.OPEN), (1.3, claims.FAILS)])
def test_an_arm_of_a_single_run_is_tested_against_all_runs_of_the_other(folder, score, said):
    def one_seed(plan: dict) -> None:
        arm = plan["groups"][0]["arms"][3]
        arm.update(runs={"42": arm["runs"]["42"]})

    edit(folder / "plan.json", one_seed)
    edit(folder / "runs" / "tong_ode_42.json", lambda run: run.update(val_bpb=score))
    (found,) = verdict(folder, a_claim("tong_ode", "gpt", "val_bpb", "higher"))
    base = results.read_study(folder).group("same shape").arm("gpt").values("val_bpb")
    assert (found.verdict, found.n, found.num_wanted) == (said, 1, 1)
    assert found.value == pytest.approx(score - np.mean([*base.values()]))
    t = found.value / (np.std([*base.values()], ddof=1) * math.sqrt(1 + 1 / 5))
    assert found.p == pytest.approx(2 * scipy_stats.t.sf(abs(t), 4))


def test_equal_scores_are_a_dead_knob_and_no_finding(folder):
    for seed in SEEDS:
        score, other = 2.16 + seed / 10_000, 2.160001 + seed / 10_000 + seed / 1e9
        edit(folder / "runs" / f"ti_mlp_r_d_50_{seed}.json", lambda run, score=score: run.update(val_bpb=score))
        edit(folder / "runs" / f"ti_mlp_const_{seed}.json", lambda run, score=other: run.update(val_bpb=score))
    claim = a_claim("ti_mlp const", "ti_mlp R&D_50%", "val_bpb", "higher")
    (found,) = verdict(folder, claim)
    assert found.p < 0.05 and found.verdict == claims.OPEN and "dead knob" in found.words
    report, words = texts(folder), "Dead knob, not a finding:** ti_mlp const scores as ti_mlp R&D_50% does"
    assert words in report["results.md"] and words in report["README.md"]
    groups = json.loads(report["significance_tests.json"])["groups"]
    assert [(dead["arm"], dead["same_as"]) for dead in groups["same shape"]["dead_knobs"]] == [GATED[::-1]]
    assert groups["same_clock"]["dead_knobs"] == []


def test_smallest_effect_shrinks_with_seeds_and_grows_with_stricter_levels():
    by_seeds = [pairs.detectable(n - 1, 0.05) / math.sqrt(n) for n in (2, 3, 5, 20)]
    assert by_seeds == sorted(by_seeds, reverse=True) and by_seeds[-1] == pytest.approx(0.66, abs=0.01)
    assert pairs.detectable(1, 0.0005) > 10 * pairs.detectable(1, 0.05) > 100
