"""The statistics against textbooks, scipy called another way and brute force; the verdict on scores and on records."""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from scipy import stats as scipy_stats

from tools import significance as sig
from tools import stats

pytestmark = pytest.mark.filterwarnings("error")
MARGIN = 0.005 / math.log(2)
# Hours of sleep won with two drugs, by patient (Student 1908); what R prints for them is in its manual's example.
SLEEP = (
    [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0],
    [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4],
)
# Darwin's pairs of maize, differences in eighths of an inch; Fisher (1935) counted the 2^15 arrangements by hand.
MAIZE = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]
OLD = [1.250, 1.240, 1.260]


def draws(seed: int, *sizes: int) -> list[list[float]]:
    rng = np.random.default_rng(seed)
    return [list(map(float, rng.normal(1.2, 0.01 * (i + 1), size))) for i, size in enumerate(sizes)]


def with_moments(n: int, mean: float, deviation: float) -> list[float]:
    """n scores that have exactly this mean and sample deviation."""
    found = np.arange(n) - (n - 1) / 2
    return list(mean + deviation * found / found.std(ddof=1)) if n > 1 else [mean]


def test_t_tests_of_students_sleep_data_are_the_published_ones():
    welch, paired = sig.welch(*SLEEP), sig.paired(*SLEEP)
    assert (welch.t, welch.df, welch.p_two_sided) == pytest.approx((1.8608, 17.776, 0.07939), rel=1e-4)
    assert (welch.low, welch.high) == pytest.approx((-0.2054832, 3.3654832), abs=1e-6)
    assert (paired.t, paired.df, paired.p_two_sided) == pytest.approx((4.0621, 9, 0.002833), rel=2e-4)
    assert (paired.low, paired.high) == pytest.approx((0.7001142, 2.4598858), abs=1e-6)


@pytest.mark.parametrize("margin", [0.0, MARGIN, 0.05])
@pytest.mark.parametrize("sizes", [(2, 2), (3, 3), (2, 7), (9, 4)])
def test_welch_is_scipys_test_of_scores_shifted_by_the_margin(sizes, margin):
    new, old = draws(7, *sizes)
    shifted = [score + margin for score in new]
    expected = scipy_stats.ttest_ind(shifted, old, equal_var=False, alternative="less")
    found = sig.welch(new, old, margin)
    assert (found.p, found.df, found.t) == pytest.approx((expected.pvalue, expected.df, -expected.statistic))
    assert found.p_two_sided == pytest.approx(scipy_stats.ttest_ind(shifted, old, equal_var=False).pvalue)


def test_paired_test_and_interval_are_scipys():
    new, old = draws(3, 5, 5)
    expected = scipy_stats.ttest_rel(old, [score + MARGIN for score in new], alternative="greater")
    assert sig.paired(new, old, MARGIN).p == pytest.approx(expected.pvalue)
    interval = scipy_stats.ttest_rel(old, new).confidence_interval(0.95)
    assert (sig.paired(new, old).low, sig.paired(new, old).high) == pytest.approx(tuple(interval))
    sample = sig.describe(new)
    interval = scipy_stats.ttest_1samp(new, 0).confidence_interval(0.95)
    assert (sample.low, sample.high) == pytest.approx(tuple(interval))
    assert (sample.n, sample.mean, sample.deviation) == pytest.approx((5, np.mean(new), np.std(new, ddof=1)))


def test_holm_rejects_what_the_step_down_procedure_rejects():
    assert sig.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert sig.holm([]) == [] and sig.holm([0.9, 0.8]) == [1.0, 1.0]
    ps = list(map(float, np.random.default_rng(1).uniform(0, 0.05, 9)))
    for alpha in np.linspace(0.001, 0.3, 50):
        rejected = set()
        for rank, i in enumerate(sorted(range(9), key=lambda i: ps[i])):
            if ps[i] > alpha / (9 - rank):
                break
            rejected.add(i)
        assert {i for i, p in enumerate(sig.holm(ps)) if p <= alpha} == rejected


def test_effect_sizes_are_those_of_the_formulas():
    found = sig.effect([1, 2, 3], [4, 5, 6])  # pooled deviation 1, four degrees of freedom: J = sqrt(2 / pi)
    assert (found.d, found.g) == pytest.approx((3, 3 * math.sqrt(2 / math.pi)))
    found = sig.effect([1, 2, 3], [3, 3, 5], pairs=True)  # differences 2, 1, 2; two degrees: J = 1 / sqrt(pi)
    assert found.d == pytest.approx(5 / 3 / math.sqrt(1 / 3)) and found.g == pytest.approx(found.d / math.sqrt(math.pi))
    assert sig.effect([1, 2], [3, 5], pairs=True).g is None
    new, old = draws(2, 30, 30)
    found = sig.effect(new, old)
    assert found.g / found.d == pytest.approx(1 - 3 / (4 * 58 - 1), abs=1e-5)  # Hedges' approximation
    assert found.d == pytest.approx(scipy_stats.ttest_ind(old, new).statistic * math.sqrt(2 / 30))


def test_sign_flips_of_darwins_maize_are_fishers_count():
    found = sig.permutation([0.0] * 15, list(map(float, MAIZE)), pairs=True)
    assert (found.p, found.arrangements) == (863 / 2**15, 2**15)
    assert found.p_two_sided == pytest.approx(2 * 863 / 2**15)


@pytest.mark.parametrize("new, old", [([1.2, 1.21, 1.19], OLD), ([1.25, 1.24], OLD), ([0.1, 0.2, 0.3],) * 2])
def test_permutation_test_counts_every_way_to_deal_the_scores(new, old):
    everything, count, as_good = [round(1000 * score) for score in new + old], 0, 0
    for chosen in itertools.combinations(range(len(everything)), len(new)):  # in whole numbers: ties are exact
        count, as_good = count + 1, as_good + (sum(everything[i] for i in chosen) <= sum(everything[: len(new)]))
    found = sig.permutation(new, old)
    assert (found.arrangements, found.p) == (count, pytest.approx(as_good / count))
    assert found.smallest_p == sig.smallest_p(len(new), len(old)) == pytest.approx(1 / count)


def test_smallest_p_is_reached_by_scores_without_overlap_and_never_undercut():
    for n in (2, 3, 5):
        apart = sig.permutation(with_moments(n, 1, 0.1), with_moments(n, 9, 0.1))
        pairs = sig.permutation(with_moments(n, 1, 0.1), with_moments(n, 9, 0.3), pairs=True)
        assert (apart.p, pairs.p) == (apart.smallest_p, pairs.smallest_p)
    assert sig.smallest_p(3, 3) == 1 / 20 and sig.smallest_p(6) == 1 / 64
    assert all(sig.permutation(*draws(seed, 3, 3)).p >= 1 / 20 for seed in range(20))


@pytest.mark.parametrize("test", [sig.welch, sig.paired, sig.effect, sig.permutation])
def test_tests_refuse_what_they_cannot_decide(test):
    for new, words in (([1.2], "at least 2 needed"), ([1.2, math.nan, 1.3], "score 2 is nan"),
                       ([1.2, math.inf, 1.1], "score 2 is inf"), ([], "at least 2 needed")):
        with pytest.raises(ValueError, match=words):
            test(new, OLD)
        with pytest.raises(ValueError, match=words):
            test(OLD, new)
    if test is not sig.permutation:
        with pytest.raises(ValueError, match="spread"):
            test([0.3] * 3, [0.1 + 0.2] * 3)


def test_pairs_must_be_pairs_and_permutations_few():
    with pytest.raises(ValueError, match="2 new and 3 old scores are no pairs"):
        sig.paired(OLD[:2], OLD)
    with pytest.raises(ValueError, match=r"differ by 0\.1, without any spread"):
        sig.paired([1.0, 1.1, 1.2], [1.1, 1.2, 1.3])
    with pytest.raises(ValueError, match="too many arrangements"):
        sig.permutation([1.0, 2.0] * 999, [1.0, 2.0] * 999, pairs=True)
    with pytest.raises(ValueError, match="nan is no p-value"):
        sig.holm([0.1, math.nan])


def test_one_score_has_no_deviation_and_equal_scores_have_no_width():
    assert sig.describe([1.2]) == sig.Sample(1, 1.2, None, None, None)
    assert sig.describe([1.2] * 3) == sig.Sample(3, pytest.approx(1.2), 0.0, pytest.approx(1.2), pytest.approx(1.2))


def test_dead_knob_is_a_setting_whose_scores_are_another_ones_at_every_shared_seed():
    scores = {"base": {1: 1.23456, 2: 1.3}, "dead": {1: 1.23464, 2: 1.30001}, "alive": {1: 1.23456, 2: 1.3002},
              "fewer seeds": {2: 1.3}, "other seeds": {3: 1.3}}  # fmt: skip
    assert sig.dead_knobs(scores) == [sig.DeadKnob("dead", "base", 2), sig.DeadKnob("fewer seeds", "base", 1)]
    with pytest.raises(ValueError, match="a score 1 is nan"):
        sig.dead_knobs({"a": {1: math.nan}})


CASES = {  # new scores, old scores: verdict, what the reason says
    "clear": ([1.21, 1.22, 1.20], OLD, "record", "p = 0.008"),
    "two seeds": ([1.20, 1.201], OLD, "tie", "too few seeds: 2 new and 3 old, needed are 3 and 2"),
    "one old seed": ([1.20, 1.201, 1.202], [1.25], "tie", "too few seeds: 3 new and 1 old"),
    "0.006 bits": (with_moments(5, 1.194, 1e-5), with_moments(5, 1.2, 1e-5), "tie", "0.0060 is not above the margin"),
    "0.008 bits": (with_moments(5, 1.192, 1e-5), with_moments(5, 1.2, 1e-5), "record", "better by more"),
    "spread": ([1.20, 1.25, 1.22], OLD, "tie", "not significantly"),
    "worse": ([1.30, 1.31, 1.305], OLD, "worse", "worse, p ="),
    "worse by less than the margin": (with_moments(5, 1.201, 1e-5), with_moments(5, 1.2, 1e-5), "worse", "worse"),
    "worse with two seeds": ([1.30, 1.3001], OLD, "worse", "worse, p ="),
    "somewhat worse": ([1.25, 1.26, 1.27], OLD, "tie", "-0.0100 is not above"),
    "no spread": ([1.1] * 3, [1.2] * 3, "tie", "without spread"),
    "no spread in new": ([1.1] * 3, OLD, "record", "better"),
    "one each": ([1.1], [1.2], "tie", "too few seeds"),
}


@pytest.mark.parametrize("case", CASES)
def test_verdict_follows_the_rule(case):
    new, old, verdict, reason = CASES[case]
    found = stats.compare(new, old)
    assert found.verdict == verdict and reason in found.reason
    assert found.gain_nats == pytest.approx((np.mean(old) - np.mean(new)) * math.log(2))
    assert stats.compare(new[::-1], old[::-1]).verdict == verdict


def test_scores_at_the_margin_are_called_a_record_once_in_a_hundred():
    rng = np.random.default_rng(5)
    new, old = rng.normal(1.2 - MARGIN, 0.01, (1500, 3)), rng.normal(1.2, 0.01, (1500, 3))
    rate = np.mean([sig.welch(list(a), list(b), MARGIN).p < 0.01 for a, b in zip(new, old, strict=True)])
    assert 0.002 < rate < 0.015


@pytest.mark.parametrize("n_new, n_old, gain, spread_new, spread_old", [
    (3, 3, 0.03, 0.02, 0.005), (3, 5, 0.03, 0.02, 0.012), (1, 4, 0.045, None, 0.012), (3, 3, 0.04, 0.01, 0.01),
])  # fmt: skip
def test_number_of_seeds_is_the_first_at_which_scipys_test_passes(n_new, n_old, gain, spread_new, spread_old):
    found = stats.compare(with_moments(n_new, 1.2 - gain, spread_new), with_moments(n_old, 1.2, spread_old)).seeds
    spread_new = spread_old if spread_new is None else spread_new

    def passes(n: int, old: int) -> bool:
        sides = (1.2 - gain + MARGIN, spread_new, n, 1.2, spread_old, old)
        return scipy_stats.ttest_ind_from_stats(*sides, equal_var=False, alternative="less").pvalue < 0.01

    assert found.n_new == next(n for n in range(max(3, n_new), 99) if passes(n, n_old))
    assert found.n_each == next(n for n in range(max(3, n_new, n_old), 99) if passes(n, n))
    assert f"{found.n_new} new seeds, {found.n_new - n_new} more" in found.words and "stay as observed" in found.words


def test_no_number_of_seeds_helps_a_gain_under_the_margin_or_against_two_scattered_old_seeds():
    under = stats.compare([1.245, 1.246, 1.244], OLD).seeds
    assert (under.n_new, under.n_each) == (None, None) and under.words.startswith("no number of seeds")
    scattered = stats.compare([1.23, 1.231, 1.232], [1.24, 1.26]).seeds  # one degree of freedom, however many are new
    assert scattered.n_new is None and 3 < scattered.n_each < 100 and "no number of new seeds" in scattered.words
    assert stats.compare([1.1], [1.2]).seeds.words.startswith("unknown")


def add(root: Path, name: str, scores: dict[int, float], track="track_10min_16mb", says=None, **fields) -> Path:
    """Writes a record with a log per seed; `says` is the val_bpb in submission.json, else the logs' mean."""
    folder = root / track / name
    (folder / "logs").mkdir(parents=True)
    for seed, score in scores.items():
        result = {"seed": seed, "run_id": f"run{seed}", "val_bpb": score, "val_loss": 2.0, "dataset": "web_sp1024",
                  "val_bytes": 99}  # fmt: skip
        (folder / f"logs/train_seed{seed}.log").write_text(f"config:{{}}\nresult:{json.dumps(result | fields)}\n")
    said = {"name": name, "val_bpb": says or float(np.mean(list(scores.values()))), "dataset": "web_sp1024"}
    (folder / "submission.json").write_text(json.dumps(said | {"val_bytes": 99} | fields))
    return folder


@pytest.fixture(autouse=True)
def no_file_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """These records are small: they lack what the file rules want, which test_reread is about."""
    for module in ("leaderboard", "rivals"):
        monkeypatch.setattr(f"tools.{module}.reread", lambda record: None)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    add(tmp_path, "2026-01-01_old", dict(zip((1, 2, 3), OLD, strict=True)))
    return tmp_path


def run(capsys, *words: object) -> tuple[int, str]:
    """Returns the exit status and all that was printed."""
    status = stats.main(list(map(str, words)))
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def judge(capsys, root: Path, folder: Path, *words: object) -> tuple[int, str]:
    return run(capsys, folder, "--records", root, *words)


def test_record_beats_the_best_ranked_record_of_its_track_and_text(capsys, root):
    add(root, "2026-01-01_worse", {1: 1.30, 2: 1.31, 3: 1.29})
    add(root, "2026-01-01_failed", {1: 0.5, 2: 0.5, 3: 0.51}, verdict={"status": "fail", "reasons": ["leak"]})
    add(root, "2026-01-01_other_text", {1: 0.5, 2: 0.5, 3: 0.51}, dataset="wiki_sp1024")
    add(root, "2026-01-01_other_track", {1: 0.5, 2: 0.5, 3: 0.51}, track="track_non_record_16mb")
    new = add(root, "2026-01-02_new", {4: 1.21, 5: 1.22, 6: 1.20}, dataset="web_bpe8192")
    status, said = judge(capsys, root, new)
    assert status == 0 and "old: 2026-01-01_old, n 3, mean 1.2500, deviation (n-1) 0.0100" in said
    assert "gain: +0.0400 bits per byte, +0.0277 nats per byte" in said and "paired" not in said
    assert said.splitlines()[-1].startswith("record: better by more than the margin, p = 0.008")


def test_tie_and_worse_end_with_status_one(capsys, root):
    for name, scores, word in (("tie", (1.24, 1.25, 1.23), "tie:"), ("worse", (1.35, 1.36, 1.34), "worse:")):
        status, said = judge(capsys, root, add(root, name, dict(zip((4, 5, 6), scores, strict=True))))
        assert status == 1 and said.splitlines()[-1].startswith(word)


def test_first_on_a_text_needs_three_seeds_and_is_no_rival_to_a_copy_of_itself(capsys, root, tmp_path):
    three = add(root, "2026-01-02_three", {1: 1.2, 2: 1.21, 3: 1.22}, val_bytes=77)
    copy = add(tmp_path / "runs", "2026-01-02_three", {1: 1.2, 2: 1.21, 3: 1.22}, val_bytes=77)
    for folder in (three, copy):
        status, said = judge(capsys, root, folder)
        assert status == 0 and said.splitlines()[-1] == "record: the first on this text"
    status, said = judge(capsys, root, add(root, "2026-01-02_two", {1: 1.2, 2: 1.21}, val_bytes=55))
    assert status == 1 and "the first on this text needs 3, it has 2" in said


def test_same_seeds_also_get_the_paired_test_which_does_not_decide(capsys, root):
    new = add(root, "2026-01-02_new", {1: 1.2399, 2: 1.2300, 3: 1.2501})  # always 0.01 better, within a wide spread
    status, said = judge(capsys, root, new, "--json")
    found, expected = json.loads(said), scipy_stats.ttest_rel(OLD, [1.2399, 1.2300, 1.2501])
    assert status == 1 and found["verdict"] == "tie" and found["paired"][0]["p"] < 1e-4
    assert found["paired"][0]["p_two_sided"] == pytest.approx(expected.pvalue)
    assert "paired by seed" in judge(capsys, root, new)[1]


def test_scores_come_from_the_logs_and_a_record_with_doubts_is_none(capsys, root):
    new = add(root, "2026-01-02_new", {4: 1.21, 5: 1.22, 6: 1.20}, says=1.1)
    status, said = judge(capsys, root, new)
    assert status == 1 and "mean 1.2100" in said and "new: doubt: P17" in said
    assert said.splitlines()[-1].endswith("not ranked until its doubts are settled")


def rows(scores: dict[int, float], *more: dict) -> list[dict]:
    named = [{"run_id": f"run{seed}", "seed": seed, "val_bpb": score, "status": "scored"}
             for seed, score in scores.items()]  # fmt: skip
    return [*named, *more]


def extra(seed: int, val_bpb: float | None, status: str = "repeated") -> dict:
    return {"run_id": "again", "seed": seed, "val_bpb": val_bpb, "status": status}


def test_disclosed_run_without_a_log_can_take_a_record_away(capsys, root):
    scores = {4: 1.21, 5: 1.22, 6: 1.20}
    honest = add(root, "a", scores, all_runs=rows(scores, extra(4, 1.21), extra(7, None, "unfinished"),
                                                     extra(8, 1.9, "interrupted")))  # fmt: skip
    status, said = judge(capsys, root, honest)
    assert status == 0 and "1 completed run(s) missing from the logs" in said and "2 not completed" in said
    chosen = add(root, "b", scores, all_runs=rows(scores, extra(6, 1.30)))
    status, said = judge(capsys, root, chosen, "--against", root / "track_10min_16mb/2026-01-01_old")
    assert status == 1 and "n 3, mean 1.2267" in said  # seed 6 counts once, with its mean of 1.25


def test_disclosed_run_without_a_log_cannot_make_a_record(capsys, root):
    scores = {4: 1.17, 5: 1.175}
    new = add(root, "a", scores, all_runs=rows(scores, *(extra(seed, 1.172) for seed in range(10, 20))))
    status, said = judge(capsys, root, new)
    assert status == 1 and said.splitlines()[-1].startswith("tie: by the runs that have a log alone: too few seeds: 2")


@pytest.mark.parametrize("all_runs", [None, 7, "x", {}, [], [3, None, []], [{"seed": "4", "val_bpb": "NaN"}, {}],
                                      [{"seed": 4, "val_bpb": True, "status": {}}]])  # fmt: skip
def test_malformed_list_of_runs_counts_nothing(capsys, root, all_runs):
    new = add(root, "a", {4: 1.21, 5: 1.22, 6: 1.20}, all_runs=all_runs)
    status, said = judge(capsys, root, new)
    assert status == 0 and "mean 1.2100" in said and "1 completed" not in said


def test_other_text_track_and_itself_are_refused_with_one_sentence(capsys, root):
    new = add(root, "2026-01-02_new", {1: 1.21, 2: 1.22, 3: 1.20})
    wiki = add(root, "2026-01-01_wiki", {1: 1.21, 2: 1.22, 3: 1.20}, dataset="wiki_sp1024")
    slow = add(root, "2026-01-01_slow", {1: 1.21, 2: 1.22, 3: 1.20}, track="track_non_record_16mb")
    for rival, words in ((wiki, "another validation text"), (slow, "another track"), (new, "is the record itself")):
        status, said = run(capsys, new, "--against", rival)
        assert status == 2 and words in said and said.count("\n") == 1


def test_folders_that_cannot_be_compared_are_refused(capsys, root, tmp_path):
    new = add(root, "2026-01-02_new", {1: 1.21})
    assert "is not a folder" in run(capsys, new, "--records", tmp_path / "none")[1]
    assert run(capsys, tmp_path / "none") == (2, f"error: {tmp_path / 'none'} is not a folder; name a record's, "
                                                 "records/<track>/<date>_<name>\n")  # fmt: skip
    assert "not in a track_ folder" in run(capsys, add(tmp_path, "x", {1: 1.2}, track="runs"))[1]
    assert "does not state its dataset" in run(capsys, add(root, "y", {1: 1.2}, dataset="", val_bytes=None))[1]
    (new / "logs/train_seed1.log").write_text("step:9/9 val_loss:2.0 val_bpb:1.2 train_time:5ms\n")
    status, said = judge(capsys, root, new)
    assert status == 2 and "2026-01-02_new has no log with a result line" in said


@pytest.mark.parametrize("scores", ["", "1.2,", "1.2;1.3", "nan", "-1", "1e400", "1.2,1000"])
def test_bare_scores_must_be_bits_per_byte(capsys, scores):
    status, said = run(capsys, f"--scores={scores}", "--against-scores", "1.2,1.3")
    assert status == 2 and said.startswith("error: --scores has") and "1.21,1.22,1.20" in said


@pytest.mark.parametrize("words", [[], ["--scores", "1.2"], ["--scores=1", "--against-scores=1", "--against=r"],
                                   ["--against-scores", "1.3"], ["--scores", "1", "--against-scores", "2", "r"]])
def test_wrong_usage_ends_with_status_two(capsys, words):
    with pytest.raises(SystemExit, match="2"):
        stats.main(words)


def test_command_compares_bare_scores():
    words = [sys.executable, "-W", "error::RuntimeWarning", "-m", "tools.stats", "--scores", "1.21,1.22,1.20"]
    done = subprocess.run([*words, "--against-scores", "1.25,1.24,1.26"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "\nrecord: " in done.stdout and "paired" not in done.stdout
