"""The benchmark measures what it says: the same model, the same step, and logs read as they were written."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from architectures import load_architecture
from data import prepare, tokenizers
from tools import bench, costs, plain_step
from tools.logs import read_log
from tools.plain_step import (
    Choices,
    PlainStep,
    build,
    compare,
    interleave,
    kit_stepper,
    measure_step,
    newton_schulz,
    table,
)
from train_gpt import Machine, RunConfig, read_settings

SHAPE = dict(
    NUM_LAYERS="2", MODEL_DIM="16", NUM_HEADS="2", NUM_KV_HEADS="1", VOCAB_SIZE="64", TRAIN_SEQ_LEN="16",
    TRAIN_BATCH_TOKENS="64", DEVICE="cpu",
)  # fmt: skip
FAKE = """import os, time
print("warmup_step:1/1")
start = time.perf_counter()
for step in range(1, int(os.environ["ITERATIONS"]) + 1):
    time.sleep(0.02)
    if step <= 10 or step % int(os.environ["TRAIN_LOG_EVERY"]) == 0:
        ms = 1000 * (time.perf_counter() - start)
        LINE
"""
UPSTREAM = 'print(f"step:{step}/40 train_loss:{5 - step / 40:.4f} train_time:{ms:.0f}ms step_avg:{ms / step:.2f}ms")'
CAPPED = """phase:warmup begin_seconds:2.000 end_seconds:3.000
step:1/10000000 train_loss:6.0000 train_time:100ms step_avg:100.00ms
stopping_early: wallclock_cap train_time:{ms:.0f}ms step:{steps}/10000000
phase:train begin_seconds:3.000 end_seconds:{end:.3f}
"""


@pytest.fixture(autouse=True)
def short_laps(monkeypatch):
    monkeypatch.setattr("tools.plain_step.LAP_SECONDS", 0.01)


def capped_run(folder: Path, seconds: float, steps: int) -> tuple:
    """A log of a capped run and its timed lines, in which 3 s of set-up come first."""
    path = folder / "output.txt"
    path.write_text(CAPPED.format(ms=1000 * seconds, steps=steps, end=3 + seconds))
    return read_log(path), [(10.0, "phase:warmup begin"), (10.5 + seconds, "stopping_early: wallclock_cap")]


def both_steps(**settings: str) -> tuple:
    """(plain model, its step, kit model, its step, a batch), in fp32 from one set of weights."""
    arch, run, config = read_settings(SHAPE | settings)
    Model, _ = load_architecture(arch)
    machine = Machine(torch.device("cpu"))
    batch = torch.randint(config.vocab_size, (4, 17), generator=torch.Generator().manual_seed(1))
    plain, ours = (build(Model, config, run, machine) for _ in range(2))
    return plain, PlainStep(plain, run), ours, kit_stepper(ours, run, machine, 1, [batch]), batch


@pytest.mark.parametrize("settings", [{}, dict(MUON_ROW_NORM="1", MUON_WD="0.5", EMBED_WD="0.5", GRAD_CLIP_NORM="0.1")])
def test_the_plain_step_and_the_kit_have_one_loss_and_leave_the_same_weights(settings):
    plain, step, ours, stepper, batch = both_steps(**settings)
    before = plain.blocks[0].mlp.up.weight.clone()
    assert stepper.take(1) == pytest.approx(step(batch, 0).item(), abs=1e-5)
    for (name, a), b in zip(plain.named_parameters(), ours.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5), name
    assert not torch.allclose(plain.blocks[0].mlp.up.weight, before, atol=1e-3)


def test_micro_batches_leave_the_loss_of_the_plain_step_as_it_is():
    plain, _, _, stepper, batch = both_steps()
    step = PlainStep(plain, RunConfig(), micro_batches=4)
    assert step(batch, 0).item() == pytest.approx(stepper.take(1), abs=1e-5)


def test_the_plain_step_is_the_same_compiled_and_in_bf16_nearly():
    _, step, other, _, batch = both_steps()
    other.compute_dtype = torch.bfloat16
    compiled = PlainStep(other, RunConfig(), micro_batches=2, compiled=True)
    with torch.compiler.set_stance("force_eager"):  # what is compiled is not the question, and takes a minute
        losses = [(step(batch, number).item(), compiled(batch, number).item()) for number in range(4)]
    assert losses[-1][0] < losses[0][0] - 0.2 and all(b == pytest.approx(a, rel=5e-3) for a, b in losses)
    assert all(p.dtype == torch.float32 for p in other.parameters())


@pytest.mark.parametrize("shape", [(8, 24), (24, 8)])
def test_newton_schulz_brings_singular_values_near_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(newton_schulz(matrix, 5))
    assert values.min() > 0.5 and values.max() < 1.5


def test_laps_are_taken_in_turns():
    order = []
    interleave({name: lambda name=name: order.append(name) or 1.0 for name in "ab"}, 2)
    assert order == ["a", "b", "a", "b"]


def test_speed_is_paired_so_that_a_slow_spell_of_the_machine_does_not_count():
    rows = compare({"plain": [2.0, 20.0, 2.0], "kit": [1.0, 10.0, 1.0]}, "plain")
    assert [row["speed"] for row in rows] == [1.0, 2.0]
    assert rows[1]["min_ms"] == 1000 and rows[1]["n"] == 3


def test_step_measures_every_choice_and_says_which_is_the_kits():
    found = measure_step(*read_settings(SHAPE | {"COMPILE": "0", "BF16": "0"}), rounds=2)
    names = [row["what"] for row in found["rows"]]
    more = [f"kit{what}" for what in (", memory handed back", " in 2 micro-batches", " in 4 micro-batches")]
    assert names == ["plain", "batched Muon (kit)", *more]
    assert all(len(found["raw_seconds_per_step"][name]) == 2 for name in names)


def test_a_choice_that_is_the_kits_is_one_row_and_the_kit_without_it_another():
    machine = Machine(torch.device("cpu"), dtype=torch.bfloat16, compile=True)
    counts = {(False, False): 4, (False, True): 2, (True, False): 2, (True, True): 1}
    found = plain_step.variants(RunConfig(), machine, counts, 8)
    kit = found["batched Muon + bf16 + compile (kit)"]
    assert kit.bf16 and kit.compile and not found["batched Muon"].bf16 and found["plain"].plain
    assert found["upstream's"] == Choices(True, True, True, micro_batches=8, prepare=plain_step.as_it_is)
    assert [found[name].micro_batches for name in ("plain", "batched Muon", "batched Muon + bf16")] == [4, 4, 2]
    assert kit.micro_batches == 1 and found["kit in 4 micro-batches"] == dataclasses.replace(kit, micro_batches=4)
    assert "upstream's" not in plain_step.variants(RunConfig(bf16=False), machine, counts, 8)
    assert "upstream's" not in plain_step.variants(RunConfig(), machine, counts, 4)
    assert found["kit, PyTorch's attention"].prepare is plain_step.with_pytorch_s_attention
    assert [name for name in found if name.endswith("(kit)")] == ["batched Muon + bf16 + compile (kit)"]
    assert len(set(found.values())) == len(found)


def test_only_a_machine_with_cuda_is_asked_for_cuda_graphs():
    counts = {(bf16, compiled): 1 for bf16 in (False, True) for compiled in (False, True)}
    for device, there in (("cpu", False), ("cuda", True)):
        machine = Machine(torch.device(device), dtype=torch.bfloat16, compile=True)
        assert ("kit in 2 micro-batches, CUDA graphs" in plain_step.variants(RunConfig(), machine, counts, 8)) == there


def test_a_step_with_other_losses_is_another_step():
    plain_step.check_losses([7.0, 6.001], [7.0, 6.0], bf16=False)
    plain_step.check_losses([7.01, 6.02], [7.0, 6.0], bf16=True)
    for bf16 in (False, True):
        with pytest.raises(ValueError, match="another step: losses"):
            plain_step.check_losses([7.0, 6.2], [7.0, 6.0], bf16)


def test_a_step_that_fails_is_a_row_with_its_error_and_costs_the_others_nothing(monkeypatch):
    broken = dict(plain=Choices(plain=True), kit=Choices(), other=Choices(micro_batches=0))
    monkeypatch.setattr(plain_step, "variants", lambda *_: broken)
    found = measure_step(*read_settings(SHAPE | {"COMPILE": "0", "BF16": "0"}), rounds=2)
    assert not found["ok"] and [row["what"] for row in found["rows"]] == ["plain", "kit", "other"]
    assert "'other' ended" in found["rows"][2]["error"] and found["rows"][1]["n"] == 2


def test_a_lap_that_fails_costs_its_own_row_alone(monkeypatch):
    class Elsewhere(plain_step.Elsewhere):
        def lap(self, steps: int) -> float:
            if self.name == "other":
                raise ValueError("no room any more")
            return super().lap(steps)

    monkeypatch.setattr(plain_step, "Elsewhere", Elsewhere)
    monkeypatch.setattr(plain_step, "variants", lambda *_: dict(plain=Choices(plain=True), other=Choices()))
    found = measure_step(*read_settings(SHAPE | {"COMPILE": "0", "BF16": "0"}), rounds=2)
    assert not found["ok"] and [row.get("error") for row in found["rows"]] == [None, "no room any more"]


def test_a_process_that_ends_is_named():
    elsewhere = plain_step.Elsewhere("kit", "no_such_architecture", RunConfig(), None, Choices())
    with pytest.raises(ValueError, match="the process of the step 'kit' ended"):
        elsewhere.answer()
    with pytest.raises(ValueError, match="the process of the step 'kit' ended"):
        elsewhere.lap(1)
    elsewhere.close()


def test_lengths_set_every_length_beside_the_one_before(tmp_path, monkeypatch):
    for name, value in (SHAPE | {"COMPILE": "0", "BF16": "0", "SSM_PATTERN": "m"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(bench, "LENGTHS", (8, 64, 128))
    options = ["--arch", "mamba", "--rounds", "3", "--name", "of Mamba", "--out", str(tmp_path)]
    assert bench.main(["lengths", *options]) == 0
    found = json.loads(next(tmp_path.glob("lengths_of_mamba_*.json")).read_text())
    shorter, longer = (found["raw_seconds_per_step"][name] for name in ("64", "128"))
    assert [row["what"] for row in found["rows"]] == ["8", "64", "128"] and found["settings"]["ssm_pattern"] == "m"
    assert found["rows"][2]["over_the_one_before"] == sorted(b / a for a, b in zip(shorter, longer, strict=True))[1]


def test_archs_sets_every_architecture_beside_gpt(tmp_path, monkeypatch):
    for name, value in (SHAPE | {"COMPILE": "0", "BF16": "0"}).items():
        monkeypatch.setenv(name, value)
    assert bench.main(["--archs", "gpt,gqt", "--rounds", "1", "--out", str(tmp_path)]) == 1
    rows = json.loads(next(tmp_path.glob("archs_*.json")).read_text())["rows"]
    plain, *_ = both_steps()
    assert rows[0]["params"] == sum(p.numel() for p in plain.parameters())
    assert rows[0]["artifact_bytes"] > rows[0]["params"] and rows[0]["mflop_per_token"] > 0 and rows[0]["peak_mb"] > 0
    assert "ARCH=gqt is not a file" in rows[1]["error"]


def test_a_submission_over_the_cap_is_clipped_until_it_fits_and_one_under_it_is_not(monkeypatch):
    env = SHAPE | {"MODEL_DIM": "128", "NUM_LAYERS": "2"}
    plain, *_ = costs.measure_artifacts(env, ["gpt"])["rows"]
    assert plain["clip"] is None and plain["artifact_bytes"] > 0.9 * plain["stored_bytes"]
    assert plain["micro_batches"] == 1 and plain["kept_gb"] == pytest.approx(524_288 * plain["kept_kb"] / 1e6)
    cap = plain["artifact_bytes"] - plain["stored_bytes"] // 10
    monkeypatch.setattr(costs, "BYTE_CAP", cap)
    found = costs.measure_artifacts(env, ["gpt"])
    assert found["ok"] and found["rows"][0]["artifact_bytes"] <= cap and found["rows"][0]["clip"] > 1
    monkeypatch.setattr(costs, "BYTE_CAP", 1)
    assert not costs.measure_artifacts(env, ["gpt"])["ok"]


def test_a_capped_run_is_measured_in_unused_steps(tmp_path):
    row = bench.cap_row(10.0, *capped_run(tmp_path, seconds=9.9, steps=99))
    assert row["train_seconds"] == pytest.approx(9.9) and row["outside_seconds"] == pytest.approx(10.4)
    assert row["step_seconds"] == pytest.approx(0.1) and row["unused_steps"] == pytest.approx(1.0)


@pytest.mark.parametrize(("seconds", "ok"), [(9.9, True), (10.05, False), (9.8, False)])
def test_the_cap_verdict_fails_late_and_wasteful_runs(tmp_path, seconds, ok):
    found = bench.cap_verdict([bench.cap_row(10.0, *capped_run(tmp_path, seconds, steps=99))])
    assert found["ok"] is ok and any(note.startswith("FAIL") for note in found["notes"]) is not ok


def test_a_series_of_capped_runs_goes_on_where_it_ended(tmp_path, monkeypatch):
    ran = []

    def run_script(script, env, folder):
        ran.append(float(env["MAX_WALLCLOCK_SECONDS"]))
        return capped_run(folder, ran[-1] - 0.1, steps=50)

    monkeypatch.setattr(bench, "run_script", run_script)
    saved = []
    env = {"DATA_PATH": "somewhere/words"}
    found = bench.measure_cap(env, [5.0, 6.0], {}, saved.append)
    assert len(saved) == 2 and found["settings"]["DATA_PATH"] == "words"
    again = bench.measure_cap(env, [5.0, 5.5, 6.0], json.loads(json.dumps(found)), saved.append)
    assert ran == [5.0, 6.0, 5.5] and [row["cap"] for row in again["rows"]] == [5.0, 5.5, 6.0]
    with pytest.raises(ValueError, match="other settings"):
        bench.measure_cap(env | {"NUM_LAYERS": "3"}, [5.0], found, saved.append)


@pytest.mark.parametrize("line", [UPSTREAM, UPSTREAM.replace(":{", ": {")])
def test_another_script_is_timed_by_its_own_lines(tmp_path, monkeypatch, line):
    script = tmp_path / "other.py"
    script.write_text(FAKE.replace("LINE", line))
    monkeypatch.setattr(bench, "TRAIN", script)
    env = dict(PATH="", ITERATIONS="40", TRAIN_LOG_EVERY="5", TRAIN_BATCH_TOKENS="1000")
    theirs, ours = bench.measure_against(script, env, rounds=1)["rows"]
    assert 20 <= theirs["min_ms"] < 60 and ours["train_loss"] == 4.0
    assert theirs["tokens_per_second"] == pytest.approx(1e6 / theirs["median_ms"])


def test_a_script_that_logs_to_a_file_is_read_there(tmp_path):
    script = tmp_path / "other.py"
    line = "step:1/1 train_loss:2.5 train_time:7ms"
    script.write_text(f"import os\nos.mkdir('logs')\nopen('logs/a.txt', 'w').write('{line}')")
    log, _ = bench.run_script(script, {}, tmp_path)
    assert log.steps[0].train_loss == 2.5


def test_the_first_steps_of_a_run_do_not_count(tmp_path):
    times = [(1, 9000), (5, 9100), (10, 9200), (20, 9300), (30, 9500), (40, 9700)]
    lines = [f"step:{step}/40 train_loss:3.0 train_time:{ms}ms" for step, ms in times]
    (tmp_path / "log.txt").write_text("\n".join(lines))
    assert bench.settled_seconds(read_log(tmp_path / "log.txt")) == pytest.approx([0.02, 0.02])


def test_a_script_that_fails_is_quoted(tmp_path, capsys):
    script = tmp_path / "other.py"
    script.write_text("print('loading')\nraise SystemExit('CUDA is required')")
    assert bench.main(["--against", str(script), "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "other.py ended with status 1" in said and "    CUDA is required" in said


def test_startup_makes_the_failures_that_it_times(tmp_path):
    cases = bench.startup_cases(tmp_path)
    arguments, changes = cases["missing shard"]
    with pytest.raises(ValueError, match="but not on disk"):
        bench.run_script(Path(arguments[0]), changes, tmp_path)


def test_prepare_trains_its_tokenizer_on_the_documents_that_it_measures(tmp_path, monkeypatch):
    used = []
    monkeypatch.setattr(tokenizers, "train_tokenizer", lambda documents, size: str(documents).encode())
    speed = {"speedup": 2.0}
    monkeypatch.setattr(prepare, "benchmark", lambda texts, path: used.append((texts, path.read_bytes())) or speed)
    (tmp_path / "documents.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    found = bench.measure_prepare(tmp_path / "documents.jsonl", 2)
    assert [raw for _, raw in used[0][0]] == [b"one", b"two"] and used[0][1] == str(used[0][0]).encode()
    assert len(found["rows"]) == 2 and "2.00" in found["notes"][0]


def test_a_table_lines_up_words_left_and_numbers_right():
    lines = table([dict(what="a", n=1), dict(what="long", n=1234), dict(what="none")]).split("\n")
    assert lines == ["what      n", "a         1", "long  1,234", "none"]
