"""A study: what its file may say, which runs follow from it, that they are done once, and what a step costs."""

import fcntl
import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY, result_of, run_script

from tools.ablate import main as ablate
from tools.costs import forward_flops, make_stepper, peak_megabytes, stored_bytes
from tools.study import runner
from tools.study.design import Design
from tools.study.measure import measure
from tools.study.ngrams import ngram_bpb
from tools.study.plan import Run, load_study
from tools.study.runner import train_bpb

STUDY = """
title = "Two models"
about = "A test."
data = "{data}"
seeds = [1, 2]

[settings]
NUM_LAYERS = 2
MODEL_DIM = 32
NUM_HEADS = 4
NUM_KV_HEADS = 2
TRAIN_SEQ_LEN = 32
TRAIN_BATCH_TOKENS = 256
WARMUP_STEPS = 1
COMPILE = 0
BF16 = 0
DEVICE = "cpu"
QUICK_SCORE = 1
TRAIN_LOG_EVERY = 1

[tune]
seed = 9
settings = {{ITERATIONS = 3, VAL_MAX_TOKENS = 2000}}
grid = [{{MATRIX_LR = 1e-9, TIED_EMBED_LR = 1e-9}}, {{MATRIX_LR = 0.04, TIED_EMBED_LR = 0.05}}]

[arms]
gpt = {{}}
ti_mlp = {{TI_BLOCKS = 1}}

[[group]]
name = "same shape"
question = "Which is better?"
baseline = "gpt"
arms = ["gpt", "ti_mlp"]
budget = {{steps = 4}}
"""
MORE = """
[[group]]
name = "time"
question = "Does time matter?"
baseline = "ti_mlp"
arms = ["ti_mlp"]
vary = {TI_FEAT = ["const", "fourier"]}
budget = {steps = 4}

[[group]]
name = "bytes"
question = "At equal bytes?"
baseline = "gpt"
arms = ["gpt", "ti_mlp"]
budget = {steps = 4, bytes_of = "ti_mlp"}

[[group]]
name = "clock"
question = "In equal time?"
baseline = "gpt"
arms = ["gpt", "ti_mlp"]
budget = {steps = 60, clock_of = "gpt"}
"""


@pytest.fixture
def write(tmp_path, data):
    """Writes a study.toml, with words of it replaced."""

    def written(more: str = "", **changes: str) -> Path:
        content = STUDY.format(data=data) + more
        for old, new in changes.values():
            assert old in content
            content = content.replace(old, new)
        (tmp_path / "study").mkdir(exist_ok=True)
        (tmp_path / "study" / "study.toml").write_text(content)
        return tmp_path / "study" / "study.toml"

    return written


def file_row(design: Design, run, **values) -> None:
    path = design.study.folder / "runs" / f"{run.key}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(dict(key=run.key, hardware="x") | values))


def tune_all(design: Design) -> None:
    for run in design.tuning():
        file_row(design, run, val_bpb=3.0 if run.settings["MATRIX_LR"] == "0.04" else 4.0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("seeds = [1, 2]", "seeds = [1, 1]"), "seeds .1, 1. must be different"),
        (("TI_BLOCKS", "TI_BLOCK"), 'arm "ti_mlp": TI_BLOCK is not a setting. Did you mean TI_BLOCKS'),
        (("gpt = {}", "gqt = {}"), 'arm "gqt": ARCH=gqt is not a file'),
        (('baseline = "gpt"', 'baseline = "mla"'), 'baseline "mla" is none of its arms'),
        (("seed = 9", "seed = 2"), "seed 2 is one of the study's; tune on another"),
        (("budget = {steps = 4}", "budget = {epochs = 4}"), "budget .* must be steps or seconds"),
        (('title = "Two models"', ""), "lacks 'title'"),
        (("[tune]", "[tune"), "is not TOML"),
    ],
)
def test_a_study_that_cannot_be_run_is_refused_in_a_sentence(write, change, said):
    path = write(change=change)
    with pytest.raises(ValueError, match=said):
        load_study(path)


def test_every_arm_runs_at_the_rate_that_did_best_on_the_tuning_seed(write):
    design = Design(load_study(write()))
    assert len(design.tuning()) == 4 and design.runs() == []  # two arms at two points, and no run before them
    tune_all(design)
    runs = design.runs()
    assert [run.seed for run in runs] == [1, 1, 2, 2]
    assert {run.settings["MATRIX_LR"] for run in runs} == {"0.04"} and {r.settings["SEED"] for r in runs} == {"1", "2"}


def test_equal_settings_are_one_run_in_whatever_group_they_stand(write):
    design = Design(load_study(write(MORE)))
    tune_all(design)
    by_name = {group.name: group for group in design.study.groups}
    names = [arm.name for arm in by_name["time"].arms]
    assert names == ["ti_mlp", "ti_mlp TI_FEAT=const", "ti_mlp TI_FEAT=fourier"]
    time, shape = by_name["time"], by_name["same shape"]
    assert design.arm_runs(time, time.arms[0])[1].key == design.arm_runs(shape, shape.arms[1])[1].key
    assert len({run.key for run in design.runs()}) == len(design.runs())


def test_an_arm_can_take_the_rates_of_another_and_is_timed_as_itself(write):
    path = write(
        arms=("[[group]]", 'narrow = {ARCH = "gpt", MODEL_DIM = 16, tuned_as = "gpt"}\n\n[[group]]'),
        group=('arms = ["gpt", "ti_mlp"]', 'arms = ["gpt", "narrow"]'),
        budget=("budget = {steps = 4}", 'budget = {steps = 4, clock_of = "gpt"}'),
    )
    design = Design(load_study(path))
    assert {run.arch for run in design.tuning()} == {"gpt", "ti_mlp"} and len(design.tuning()) == 4
    tune_all(design)
    (group,) = design.study.groups
    assert design.clocks() == {"same shape"} and design.runs() == []
    for arm, ratio in zip(group.arms, (1.0, 0.5), strict=True):
        path = design.measure_path(group, arm)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"ratio": ratio}))
    found = {run.settings["MODEL_DIM"]: run.settings for run in design.runs()}
    assert (found["32"]["ITERATIONS"], found["16"]["ITERATIONS"]) == ("4", "8")
    assert found["32"]["MATRIX_LR"] == found["16"]["MATRIX_LR"]


@pytest.mark.parametrize(("own", "once"), [("MATRIX_LR = 0.01", True), ("MODEL_DIM = 16", False)])
def test_a_second_clock_times_again_only_what_differs_in_more_than_rates(write, own, once):
    clock = MORE[MORE.rindex("[[group]]") :].replace("ti_mlp", "narrow")
    second = clock.replace('"clock"', '"again"').replace('"gpt"\n', f'"narrow"\nsettings = {{{own}}}\n', 1)
    narrow = ("[[group]]", 'narrow = {ARCH = "gpt", MODEL_DIM = 24, tuned_as = "gpt"}\n\n[[group]]')
    design = Design(load_study(write(clock + second, arms=narrow)))
    _, first, again = design.study.groups
    assert [design.timed(first, arm) for arm in first.arms] == [(first, arm) for arm in first.arms]
    assert [design.timed(again, arm)[0].name for arm in again.arms] == ["clock" if once else "again"] * 2
    assert design.clocks() == ({"clock"} if once else {"clock", "again"})


def test_arms_far_from_the_baseline_have_one_seed_and_the_close_ones_more(write):
    seeds = "seeds = {first = 1, close = 2, within = 0.05}"
    more = MORE.replace("budget = {steps = 4}", f"budget = {{steps = 4}}\n{seeds}", 1)
    design = Design(load_study(write(more, seeds=("seeds = [1, 2]", "seeds = [1, 2, 3]"))))
    group = design.study.groups[1]
    arms = group.arms[:2]

    def counts() -> list[int]:
        return [len(design.arm_runs(group, arm)) for arm in arms]

    assert counts() == [0, 0]
    tune_all(design)
    assert [arm.name for arm in arms] == ["ti_mlp", "ti_mlp TI_FEAT=const"] and counts() == [3, 1]
    for far, wanted in ((0.06, [3, 1]), (0.04, [3, 2]), (-0.3, [3, 2])):
        for arm, score in zip(arms, (2.0, 2.0 + far), strict=True):
            file_row(design, design.arm_runs(group, arm)[1], val_bpb=score)
        assert counts() == wanted


CLAIM = """
[[claims]]
claim = "?"
group = "time"
arm = "{}"
against = "{}"
metric = "val_bpb"
expect = "lower"
"""


@pytest.mark.parametrize("names", [("const", "table"), ("table", "const")])
def test_of_the_arms_of_a_claim_one_has_more_seeds_and_where_they_are_close_both(write, names):
    seeds = "seeds = {first = 1, close = 2, within = 0.05}"
    more = MORE.replace("budget = {steps = 4}", f"budget = {{steps = 4}}\n{seeds}", 1)
    more = more.replace('["const", "fourier"]', '["const", "table", "shuffle"]')
    design = Design(load_study(write(more + CLAIM.format(*(f"ti_mlp TI_FEAT={name}" for name in names)))))
    tune_all(design)
    group = design.study.groups[1]
    first = [2, 1] if names[0] == "const" else [1, 2]
    for scores, wanted in (
        ([2.0, 2.5, 2.2, 2.5], [2, *first, 1]),
        ([2.0, 2.5, 2.51, 2.5], [2, 2, 2, 1]),
        ([2.0, 2.5, 2.01, 2.5], [2, 1, 2, 1]),
    ):
        for one, score in zip(group.arms, scores, strict=True):
            file_row(design, design.arm_runs(group, one)[1], val_bpb=score)
        assert [len(design.arm_runs(group, one)) for one in group.arms] == wanted


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('group = "time"', 'group = "tome"', "group 'tome' must be one of"),
        ('arm = "ti_mlp"', 'arm = "gpt"', 'names "gpt", which is none of the arms of group "time"'),
        ('metric = "val_bpb"', 'metric = "bpb"', "metric 'bpb' must be one of"),
        ('metric = "val_bpb"\n', "", "lacks 'metric'"),
    ],
)
def test_a_claim_about_what_is_not_there_is_refused_before_anything_runs(write, old, new, said):
    claim = CLAIM.format("ti_mlp", "ti_mlp TI_FEAT=const")
    assert old in claim
    with pytest.raises(ValueError, match=said):
        load_study(write(MORE + claim.replace(old, new)))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('clock_of = "gpt"', 'clock_of = "ti_ssm"', 'clock_of, names "ti_ssm", which is none of its arms'),
        ('bytes_of = "ti_mlp"', 'bytes_of = "ti_ssm"', 'names the arm "ti_ssm", which .arms. does not define'),
    ],
)
def test_a_budget_that_names_what_is_not_there_is_refused(write, old, new, said):
    assert old in MORE
    with pytest.raises(ValueError, match=said):
        load_study(write(MORE.replace(old, new)))


def test_a_group_of_equal_bytes_narrows_the_larger_model(write):
    design = Design(load_study(write(MORE)))
    tune_all(design)
    group = next(group for group in design.study.groups if group.name == "bytes")
    gpt, ti_mlp = (design.arm_runs(group, arm)[1] for arm in group.arms)
    sizes = [stored_bytes(run.arch, run.settings, 260) for run in (gpt, ti_mlp)]
    assert int(gpt.settings["MODEL_DIM"]) < int(ti_mlp.settings["MODEL_DIM"]) == 32
    wider = stored_bytes("gpt", gpt.settings | {"MODEL_DIM": str(int(gpt.settings["MODEL_DIM"]) + 8)}, 260)
    assert abs(sizes[0] - sizes[1]) <= abs(wider - sizes[1])
    shape = design.study.groups[0]  # its ti_mlp is the same, but the gpt that it takes turns with is not
    assert design.measure_path(group, group.arms[1]) != design.measure_path(shape, shape.arms[1])


def test_a_group_s_own_settings_win_over_what_tuning_found(write):
    design = Design(load_study(write(MORE.replace('"Does time matter?"', '"?"\nsettings = {MATRIX_LR = 0.5}'))))
    tune_all(design)
    first = {group.name: design.arm_runs(group, group.arms[0])[1] for group in design.study.groups[:2]}
    rates = {name: run.settings["MATRIX_LR"] for name, run in first.items()}
    assert rates == {"same shape": "0.04", "time": "0.5"}
    own = MORE.replace('"Does time matter?"', '"?"\nsettings = {TI_FEAT = "table"}')
    group = load_study(write(own)).groups[1]  # what is varied wins over what the group sets
    assert [arm.settings["TI_FEAT"] for arm in group.arms] == ["table", "const", "fourier"]
    varied = [Design(load_study(write(own))).arm_runs(group, arm)[1].settings["TI_FEAT"] for arm in group.arms]
    assert varied == ["table", "const", "fourier"]
    said = [group["arms"][0]["tuned"] for group in design.plan()["groups"][:2]]
    assert said == [{"MATRIX_LR": 0.04, "TIED_EMBED_LR": 0.05}, {"TIED_EMBED_LR": 0.05}]


def test_a_group_of_equal_time_gives_the_faster_model_more_steps(write):
    design = Design(load_study(write(MORE)))
    tune_all(design)
    shape, clock = (next(g for g in design.study.groups if g.name == name) for name in ("same shape", "clock"))
    assert design.arm_runs(clock, clock.arms[0]) == {}  # until the steps are measured
    for arm, ratio in zip(shape.arms, (1.0, 0.75), strict=True):
        path = design.measure_path(shape, arm)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"ratio": ratio}))
    steps = [design.arm_runs(clock, arm)[1].settings["ITERATIONS"] for arm in clock.arms]
    measured = design.plan()["groups"][-1]["arms"][1]["measure"]
    assert steps == ["60", "80"] and measured == design.measure_path(shape, arm).stem


def test_a_study_runs_what_is_missing_and_goes_on_where_it_was(write, capsys, monkeypatch):
    path = write()
    for name, value in dict(NUM_LAYERS="3", QUANT_BITS="4").items():  # the caller's shell changes no run
        monkeypatch.setenv(name, value)
    assert ablate([str(path), "--rounds", "1"]) == 0
    folder = path.parent
    rows = {p.stem: json.loads(p.read_text()) for p in (folder / "runs").glob("*.json")}
    logs = [(folder / row["log"]).read_text() for row in rows.values()]
    assert len(logs) == 8 and all('"num_layers": 2' in log and '"quant_bits": 8' in log for log in logs)
    assert (folder / "README.md").is_file() and (folder / "results_table.tex").is_file()
    costs = {p: p.read_text() for p in (folder / "measures").glob("*.json")}
    assert len(costs) == 2 and all(json.loads(text)["step_ms"] > 0 for text in costs.values())
    lost = next(p for p in costs if p.stem.startswith("ti_mlp"))
    lost.unlink()
    assert sorted(path.stem for path in (folder / "code").iterdir()) == ["gpt", "ti_mlp"]
    assert [row["gates"] is None for row in rows.values()] == [row["arch"] == "gpt" for row in rows.values()]
    (folder / "code" / "gpt.py").write_text((folder / "code" / "gpt.py").read_text() + "# the study's own\n")
    gone = next(key for key, row in rows.items() if (row["seed"], row["arch"]) == (2, "gpt"))
    times = {p: p.stat().st_mtime_ns for p in (folder / "runs").glob("*.json")}
    (folder / "runs" / f"{gone}.json").unlink()
    capsys.readouterr()
    assert ablate([str(path), "--list"]) == 0 and capsys.readouterr().out.count("missing") == 1
    assert ablate([str(path), "--rounds", "1"]) == 0
    changed = [p.stem for p, before in times.items() if p.stat().st_mtime_ns != before]
    again = json.loads((folder / "runs" / f"{gone}.json").read_text())
    assert changed == [gone] and again["val_bpb"] == rows[gone]["val_bpb"]
    assert again["code_sha256"] != rows[gone]["code_sha256"]  # it ran the code of the study, not that of the kit
    assert [p for p, text in costs.items() if p.read_text() != text] == [lost]  # the baseline's is what it was


def test_a_run_that_another_process_has_comes_last_and_is_not_done_twice(tmp_path, monkeypatch):
    runs, did, told = [Run("gpt", seed, "text", {"SEED": str(seed)}) for seed in (1, 2)], [], []
    (tmp_path / f"{runs[0].key}.lock").touch()
    other = (tmp_path / f"{runs[0].key}.lock").open()
    fcntl.flock(other, fcntl.LOCK_EX)

    def do_run(run: Run, folder: Path, *_) -> dict:
        did.append(run.seed)
        runner.result_path(runs[0], folder).write_text("{}")  # the other process ends meanwhile
        other.close()
        return {"val_bpb": 1.0, "steps": 1}

    monkeypatch.setattr(runner, "do_run", do_run)
    assert runner.do_missing(runs, tmp_path, tmp_path, lambda run, said: told.append((run.seed, said))) == []
    assert did == [2] and told == [(2, "1.0000 bits per byte in 1 steps"), (1, "is there")]


def test_a_failed_run_is_told_and_the_others_go_on(write, capsys):
    path = write(change=("settings = {ITERATIONS = 3, VAL", "settings = {ITERATIONS = 3, TRAIN_BATCH_TOKENS = 33, VAL"))
    assert ablate([str(path)]) == 1
    said = capsys.readouterr().err
    assert said.count("TRAIN_BATCH_TOKENS=33 must be a multiple") == 4 and "Traceback" not in said


def test_a_run_that_was_interrupted_is_no_result(write, tmp_path, monkeypatch):
    study = load_study(write(change=("WARMUP_STEPS = 1", "WARMUP_STEPS = 0")))
    run = Run("gpt", 1, study.data, study.arms["gpt"].settings | {"SEED": "1", "ITERATIONS": "1_000_000"})

    class Stopped(subprocess.Popen):
        def communicate(self, *rest, **more):
            log = tmp_path / run.key / "train.log"
            while self.poll() is None and not (log.is_file() and "step:1/" in log.read_text()):
                time.sleep(0.05)
            self.send_signal(signal.SIGTERM)
            return super().communicate(*rest, **more)

    monkeypatch.setattr(subprocess, "Popen", Stopped)
    with pytest.raises(runner.RunFailed, match=r"was interrupted after \d+ steps"):
        runner.do_run(run, study.folder, tmp_path)
    assert not runner.result_path(run, study.folder).exists()


def test_costs_count_a_shared_weight_once_per_use_and_grow_with_the_model():
    settings = {k: str(v) for k, v in TINY.items()} | {"VOCAB_SIZE": "260", "TRAIN_BATCH_TOKENS": "128"}
    shared, gpt = make_stepper("shared", settings | {"TI_BLOCKS": "1"}), make_stepper("gpt", settings)
    D, L, V = 32, 2, 260
    attention = 2 * 2 * 32 * D  # scores and values over 32 positions; the counter does not see the mask
    assert forward_flops(gpt) == forward_flops(shared) == 2 * (L * (3 * D * D + 4 * D * D) + V * D) + L * attention
    wide = make_stepper("gpt", settings | {"MODEL_DIM": "64"})
    assert peak_megabytes(wide) > 1.3 * peak_megabytes(gpt) > 0
    failures: list[str] = []
    arms = {"gpt": settings, "none": settings | {"MLP_MULT": "0"}, "wide": settings | {"MODEL_DIM": "128"}}
    costs = measure({name: ("gpt", own) for name, own in arms.items()}, "gpt", 3, failures.append)
    assert costs["gpt"].ratio == 1 and costs["wide"].ratio > 1.2 and len(costs["wide"].step_ms_rounds) == 3
    assert costs.keys() == {"gpt", "wide"}
    assert [said.split("=")[0] for said in failures] == ["none: ValueError: MLP_MULT"]


def test_the_bigram_table_beats_the_unigram_table_and_both_are_those_of_the_counts(data):
    found = ngram_bpb(data)
    assert 2.0 < found["bigram"] < found["unigram"] < 5.2


def test_the_score_of_the_training_text_is_that_of_the_artifact(data, tmp_path):
    env = TINY | dict(DATA_PATH=data, OUT_DIR=tmp_path, RUN_ID="a", ITERATIONS=3)
    val_bpb = result_of(run_script(env))["val_bpb"]
    assert train_bpb(ROOT / "train_gpt.py", tmp_path / "a", data) == pytest.approx(val_bpb, abs=0.3) and val_bpb < 7
