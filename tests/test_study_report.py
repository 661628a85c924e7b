"""The report of a study, from a folder of invented results: its files, what it says is missing, its figures."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from invented_study import GATED, MEANS, PARAMS, SEEDS, a_claim, edit, make_study, scores, texts
from matplotlib.figure import Figure
from matplotlib.image import imread
from scipy import stats as scipy_stats

from tools.study import charts, figures, page, results, tables


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_study(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study with its whole report, for tests that only read."""
    folder = tmp_path_factory.mktemp("study")
    make_study(folder)
    page.write_report(folder)
    return folder


def test_summary_has_the_mean_deviation_and_interval_of_every_arm(folder):
    arms = json.loads(texts(folder)["statistics_summary.json"])["groups"]["same shape"]["arms"]
    for name in MEANS:
        own = scores(folder, name)
        low, high = scipy_stats.t.interval(0.95, 4, np.mean(own), scipy_stats.sem(own))
        assert arms[name]["loss_mean"] == pytest.approx(np.mean(own))
        assert arms[name]["loss_std"] == pytest.approx(np.std(own, ddof=1))
        assert arms[name]["loss_ci95"] == pytest.approx([low, high])
        assert (arms[name]["num_seeds"], arms[name]["params"]) == (5, PARAMS[name])


def test_report_says_what_is_missing_and_still_compares_common_seeds(folder):
    (folder / "runs" / "tong_ode_456.json").unlink()
    (folder / "measures" / "m3.json").unlink()
    edit(folder / "runs" / "gpt_42.json", lambda run: run.update(val_bpb=float("nan")))
    found = texts(folder)
    for text in (found["README.md"], found["results.md"]):
        assert "* tong_ode: 4 of 5 seeds" in text and "operations not measured of tong_ode" in text
        assert "* gpt: 4 of 5 seeds, without a finite score: seed 42" in text
    assert "1 of 19 runs do not beat the bigram table" in found["README.md"]
    tests = json.loads(found["significance_tests.json"])["groups"]["same shape"]["pairs"]
    (pair,) = [pair for pair in tests if {pair["arm"], pair["against"]} == {"gpt", "tong_ode"}]
    assert pair["seeds"] == [123, 789, 1011]


def test_unfinished_study_has_the_figures_that_it_has_data_for(folder):
    for arm in list(MEANS)[1:]:
        for seed in SEEDS[1:] if arm in GATED else SEEDS:
            (folder / "runs" / f"{tables.slug(arm)}_{seed}.json").unlink()
    for i in range(1, 4):
        (folder / "measures" / f"m{i}.json").unlink()
    edit(folder / "runs" / "ti_mlp_r_d_50_42.json", lambda run: run.update(val_bpb=None, curve=[[1, 6.9, None]]))
    edit(folder / "runs" / "gpt_42.json", lambda run: run["curve"].append([201, float("nan"), 4.3]))
    names = set(figures.drawn(results.read_study(folder)))
    assert {"statistical_performance", "speed_comparison", "learning_curves", "gate_trajectories"} < names
    assert "significance_tests" not in names


def test_study_without_any_run_makes_a_page_without_figures(folder):
    for path in (*folder.glob("runs/*"), *folder.glob("measures/*")):
        path.unlink()
    edit(folder / "plan.json", lambda plan: plan.update(claims=[a_claim("tong_ode", "gpt", "val_bpb", "lower")]))
    files = page.write_report(folder)
    assert not [path for path in files if path.parent.name == "figures"]
    text = (folder / "README.md").read_text()
    assert "* gpt: 0 of 5 seeds" in text and "1: not run" in text and "No run on this text is done yet" in text
    assert "not measured of any arm" in text


def test_one_run_under_two_names_is_no_dead_knob(folder):
    def share(plan: dict) -> None:
        plan["groups"][0]["arms"][2]["runs"] = copy.copy(plan["groups"][0]["arms"][1]["runs"])

    edit(folder / "plan.json", share)
    text = texts(folder)["README.md"]
    assert "are the same runs under two names (5 seeds)" in text and "Dead knob" not in text


def test_runs_that_do_not_beat_the_bigram_table_are_named(folder):
    assert "All 20 runs beat the bigram table" in texts(folder)["README.md"]
    edit(folder / "plan.json", lambda plan: plan["ngram_bpb"]["WikiText"].update(bigram=max(scores(folder, "gpt"))))
    assert "* gpt of same shape, seed" in texts(folder)["README.md"]


def test_seeds_of_the_plan_are_wanted_of_every_arm(folder):
    def replan(plan: dict) -> None:
        plan.update(seeds=[*SEEDS, 7])
        for group in plan["groups"]:
            group["arms"][0]["runs"]["7"] = "gpt_7"
        plan["groups"][1]["arms"][1].update(runs={})  # not planned yet: its steps are those of a clock

    edit(folder / "plan.json", replan)
    study = results.read_study(folder)
    assert "gpt: 5 of 6 seeds" in study.group("same shape").missing
    assert study.group("same_clock").missing == ["gpt: 5 of 6 seeds", "ti_mlp R&D_50%: 0 of 6 seeds"]


def test_runs_are_held_against_the_count_tables_of_their_own_text(folder):
    edit(folder / "plan.json", lambda plan: plan["ngram_bpb"]["WikiText"].update(bigram=1.0))
    edit(folder / "plan.json", lambda plan: plan["ngram_bpb"].update(another={"bigram": 9.0}))
    edit(folder / "plan.json", lambda plan: plan["groups"][0].update(data="another"))
    text = texts(folder)["README.md"]
    assert "10 of 10 runs do not beat the bigram table" in text
    assert "All 20 runs beat the bigram table" in text and "Text: another." in text


def test_report_is_the_same_bytes_each_time(written, tmp_path):
    make_study(tmp_path)
    code = "import sys, pathlib; from tools.study.page import write_report; write_report(pathlib.Path(sys.argv[1]))"
    env = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)}  # an order of sets that is not this process's
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True, env=env)
    files = [path.relative_to(written) for path in written.rglob("*") if path.is_file()]
    assert len(files) > 40
    assert [str(path) for path in files if (written / path).read_bytes() != (tmp_path / path).read_bytes()] == []


def test_figures_are_drawn_as_png_and_pdf(written):
    wanted = ("statistical_performance", "efficiency_with_error", "speed_comparison", "significance_tests",
              "learning_curves", "all_seeds_overlay", "gate_trajectories", "group_01_same_shape")  # fmt: skip
    for name in wanted:
        image = imread(written / "figures" / f"{name}.png")
        assert min(image.shape[:2]) > 200 and 0.01 < (image[..., :3] < 0.9).any(-1).mean() < 0.9
        pdf = (written / "figures" / f"{name}.pdf").read_bytes()
        assert pdf.startswith(b"%PDF") and len(pdf) > 5000 and b"CreationDate" not in pdf
        assert f"figures/{name}.png" in (written / "README.md").read_text()


def test_efficiency_figure_shows_every_arm(folder):
    group, ax = results.read_study(folder).group("same shape"), Figure().subplots()
    charts.draw_sizes(ax, group, charts.styles(results.read_study(folder)))
    shown = {container.get_label(): container.lines[0].get_xydata()[0] for container in ax.containers}
    assert list(shown) == list(MEANS)
    for arm, (size, score) in shown.items():
        assert score == pytest.approx(np.mean(scores(folder, arm)))
        assert size == pytest.approx(PARAMS[arm] / 1e6, rel=0.12)
        assert ax.get_xlim()[0] < size < ax.get_xlim()[1] and ax.get_ylim()[0] < score < ax.get_ylim()[1]


def test_latex_escapes_what_latex_reads(folder):
    assert tables.escaped(r"a_b & 50% {x} #1 $2 ~ ^ \ |") == (
        r"a\_b \& 50\% \{x\} \#1 \$2 \textasciitilde{} \textasciicircum{} \textbackslash{} \textbar{}"
    )
    assert tables.escaped("[-0.01, -2] e-3") == "[$-$0.01, $-$2] e-3"
    text = texts(folder)["results_table.tex"]
    assert r"ti\_mlp R\&D\_50\%" in text and text.count(r"\begin{table}") == text.count(r"\end{table}") == 4
    for block in text.split(r"\begin{tabular}{")[1:]:
        columns, rows = len(block[: block.index("}")]), [line for line in block.splitlines() if line.endswith(r"\\")]
        assert rows and all(line.replace(r"\&", "").count("&") == columns - 1 for line in rows)


def test_markdown_tables_have_equal_rows_whatever_the_names(folder):
    table = tables.Table(("Arm", "n"), [["a|b", "1"], ["c", "2"]]).markdown().splitlines()
    assert {line.replace(r"\|", "").count("|") for line in table} == {3}


def test_runs_csv_has_a_row_per_run_and_group(folder):
    lines = texts(folder)["runs.csv"].splitlines()
    assert len(lines) == 1 + 20 + 10 and lines[0].startswith("group,arm,arch,seed,key,steps,val_bpb")


def test_published_figures_have_a_column_only_where_there_are_some(folder):
    group = results.read_study(folder).group("same shape")
    table = tables.score_table(group)
    assert table.head[-1] == "Published" and [row[-1] for row in table.rows] == ["–", "2.23 nats", "–", "–"]
    edit(folder / "plan.json", lambda plan: [arm.pop("published") for arm in plan["groups"][0]["arms"]])
    assert "Published" not in tables.score_table(results.read_study(folder).group("same shape")).head


@pytest.mark.parametrize("change, words", [
    (lambda plan: plan["groups"][0].update(baseline="gtp"), 'its baseline "gtp" is none of its arms'),
    (lambda plan: plan.update(claims=[a_claim("gpt", "gtp", "val_bpb", "lower")]), '"gtp", which is none of the arms'),
    (lambda plan: plan.update(claims=[a_claim("gpt", "tong_ode", "bpb", "lower")]), "metric 'bpb' must be one of"),
    (lambda plan: plan.update(claims=[a_claim("gpt", "tong_ode", "params", "ratio")]), "at_least None must be above 0"),
    (lambda plan: plan.pop("groups"), "lacks 'groups'"),
])  # fmt: skip
def test_wrong_plan_is_named_and_nothing_is_written(folder, change, words):
    edit(folder / "plan.json", change)
    with pytest.raises(ValueError, match=words):
        page.write_report(folder)
    assert not (folder / "README.md").exists() and not (folder / "figures").exists()
