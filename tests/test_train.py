"""The script, run as a user runs it: clock, log, ranks, signals, and what happens when something goes wrong."""

import dataclasses
import itertools
import json
import math
import os
import re
import signal
import socket
import subprocess
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, environment, result_of, run_script, sys, timed, write_bytes_data, write_shard
from torch.nn.attention import SDPBackend

import train_gpt
from architectures.layers import ModelConfig, causal_attention

CPU = train_gpt.Machine(torch.device("cpu"))


def refusal(monkeypatch, capsys, **settings) -> str:
    """The one sentence with which the script refuses these settings."""
    for name, value in settings.items():
        monkeypatch.setenv(name, str(value))
    assert train_gpt.main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    return printed.err.removeprefix("error: ").strip()


def test_a_run_learns_and_its_result_line_parses(finished):
    result, folder, lines = finished
    losses = [float(line.split("train_loss:")[1].split()[0]) for line in lines if "train_loss:" in line]
    assert losses[-1] < losses[0] - 1
    assert (folder / "model.bin").stat().st_size == result["bytes_model"]
    assert result["valid"] and result["steps"] == 30 and result["val_bpb"] < 8


def test_log_starts_with_the_settings_and_keeps_upstreams_grammar(finished):
    _, _, lines = finished
    config = json.loads(lines[0].removeprefix("config:")) if lines[0].startswith("config:") else None
    assert config["num_layers"] == 2 and config["arch"] == "gpt"
    step = r"step:\d+/30 train_loss:\d+\.\d+ train_time:\d+ms step_avg:\d+\.\d+ms"
    assert sum(bool(re.match(step, line)) for line in lines) == 30
    assert (
        sum(
            bool(re.match(r"step:30/30 val_loss:\S+ val_bpb:\S+ train_time:\d+ms step_avg:\S+ms$", line))
            for line in lines
        )
        == 1
    )
    assert any(
        re.match(r"final_int8_rans_roundtrip_exact val_loss:\d\.\d{8} val_bpb:\d\.\d{8}$", line) for line in lines
    )


def test_gauges_stand_in_the_log_while_what_they_show_is_on(data, tmp_path):
    settings = TINY | dict(ARCH="jepa", DATA_PATH=data, OUT_DIR=tmp_path, RUN_ID="r", JEPA_UNTIL=0.5, JEPA_OFFSETS=8)
    run_script(settings).check_returncode()
    steps = [line for line in (tmp_path / "r/train.log").read_text().splitlines() if "train_loss:" in line]
    gauges = r" nats:\d\.\d{4} jepa_error:\d\.\d{4} jepa_deviation:\d\.\d{4} jepa_dimensions:\d+\.\d{4}$"
    assert [bool(re.search(gauges, line)) for line in steps] == 4 * [True] + 4 * [False]
    assert [line.split()[-1].startswith("lr_scale:") for line in steps] == 4 * [False] + 4 * [True]


def test_phases_follow_each_other_without_gap_or_overlap(finished):
    _, _, lines = finished
    phases = [
        re.match(r"phase:(\w+) begin_seconds:(\S+) end_seconds:(\S+)", line)
        for line in lines
        if line.startswith("phase:")
    ]
    assert [m[1] for m in phases] == ["setup", "warmup", "train", "validate", "export", "score"]
    assert all(a[3] == b[2] for a, b in itertools.pairwise(phases))


def test_score_identity_holds(finished):
    result, _, _ = finished
    assert math.isclose(result["val_bpb"] * math.log(2) * result["val_bytes"], result["nats_sum"], rel_tol=1e-12)
    assert math.isclose(result["val_loss"] * result["val_tokens"], result["nats_sum"], rel_tol=1e-12)


def test_eight_bits_cost_less_than_a_hundredth_of_a_bit_per_byte(finished):
    result, _, _ = finished
    assert abs(result["val_bpb"] - result["pre_quant_val_bpb"]) < 0.01


def torchrun(settings: dict, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", *options, "train_gpt.py"]
    env, pipe = environment(settings), subprocess.PIPE
    return subprocess.Popen(command, env=env, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)


def losses_of(output: str) -> list[float]:
    return [float(x) for x in re.findall(r"train_loss:(\S+)", output)]


@pytest.fixture(scope="module")
def one_process(data, tmp_path_factory) -> tuple[dict, list[float], dict]:
    """(settings, losses, result) of a short fp32 run on one process: clipped, rounded by GPTQ, trained at test time."""
    folder = tmp_path_factory.mktemp("one")
    settings = TINY | dict(DATA_PATH=data, OUT_DIR=folder, ITERATIONS=6, BF16=0, GRAD_CLIP_NORM=0.05)
    settings |= dict(TTT_LR=0.3, TTT_TOKENS=500, GPTQ_TOKENS=500)
    done = run_script(settings)
    return settings, losses_of(done.stdout), result_of(done)


def assert_trained_like(one_process, output: str) -> None:
    _, losses, result = one_process
    found = json.loads(output.splitlines()[-1].removeprefix("result:"))
    assert found["world_size"] == 2 and abs(found["val_bpb"] - result["val_bpb"]) < 2e-3
    np.testing.assert_allclose(losses_of(output), losses, atol=2e-3)


def test_two_processes_train_like_one(one_process, tmp_path):
    both = torchrun(one_process[0] | dict(OUT_DIR=tmp_path), "--standalone", "--nproc_per_node=2")
    output, errors = both.communicate(timeout=120)
    assert both.returncode == 0, errors[-2000:]
    assert_trained_like(one_process, output)


def test_two_nodes_train_like_one_process_and_only_the_first_writes(one_process, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={port}"]
    nodes = [torchrun(one_process[0] | dict(OUT_DIR=tmp_path / str(i)), *options, f"--node_rank={i}") for i in (0, 1)]
    (output, errors), (silence, _) = (node.communicate(timeout=120) for node in nodes)
    assert [node.returncode for node in nodes] == [0, 0], errors[-2000:]
    assert_trained_like(one_process, output)
    assert silence == "" and not (tmp_path / "1").exists()


def test_what_one_rank_refuses_ends_all(one_process, tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r/train.log").write_text("another run's")
    both = torchrun(one_process[0] | dict(OUT_DIR=tmp_path, RUN_ID="r"), "--standalone", "--nproc_per_node=2")
    _, errors = both.communicate(timeout=60)
    assert both.returncode != 0 and "error: RUN_ID=r has a log in" in errors


def test_ctrl_c_under_torchrun_stops_all_ranks_and_keeps_what_there_is(data, tmp_path):
    settings = TINY | dict(DATA_PATH=data, OUT_DIR=tmp_path, RUN_ID="r", ITERATIONS=10**9, MAX_WALLCLOCK_SECONDS=0)
    both = torchrun(settings, "--standalone", "--nproc_per_node=2")
    next(line for line in both.stdout if line.startswith("step:1/"))
    both.send_signal(signal.SIGINT)
    both.communicate(timeout=60)
    last = (tmp_path / "r/train.log").read_text().splitlines()[-1]
    assert json.loads(last.removeprefix("result:"))["interrupted"] and (tmp_path / "r/model.bin").exists()


def test_same_seed_gives_the_same_artifact_and_another_seed_does_not(data, tmp_path):
    settings = TINY | dict(DATA_PATH=data, OUT_DIR=tmp_path, ITERATIONS=3)
    # Two processes that were started differ in more than two forks do, in the seed of the hashes for one.
    digests = [
        result_of(run_script(settings | dict(RUN_ID=i, SEED=seed), start=True))["artifact_sha256"]
        for i, seed in enumerate((1, 1, 2))
    ]
    assert digests[0] == digests[1] != digests[2]


@timed
def test_training_ends_before_the_cap_and_close_to_it(data, tmp_path):
    settings = TINY | dict(
        DATA_PATH=data,
        OUT_DIR=tmp_path,
        RUN_ID="cap",
        ITERATIONS=100_000,
        MAX_WALLCLOCK_SECONDS=3,
        TRAIN_LOG_EVERY=1000,
    )
    done = run_script(settings)
    result = result_of(done)
    begin, end = re.search(r"phase:train begin_seconds:(\S+) end_seconds:(\S+)", done.stdout).groups()
    assert 2 < float(end) - float(begin) <= 3 and result["train_seconds"] <= 3
    assert "stopping_early: wallclock_cap" in done.stdout and result["mean_lr_scale"] > 0.3


@timed
def test_validation_in_mid_run_costs_clock_time_and_is_left_out_where_it_does_not_fit(data, tmp_path):
    settings = TINY | dict(DATA_PATH=data, OUT_DIR=tmp_path, RUN_ID="v", ITERATIONS=100_000, TRAIN_LOG_EVERY=10_000)
    done = run_script(settings | dict(MAX_WALLCLOCK_SECONDS=4, VAL_LOSS_EVERY=20))
    assert result_of(done)["train_seconds"] <= 4
    assert len(re.findall(r"^step:\d+/100000 val_loss", done.stdout, flags=re.M)) >= 2


@timed
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_training_and_keeps_what_there_is(data, tmp_path, number):
    running = start_endless_run(data, tmp_path)
    running.send_signal(number)
    rest, _ = running.communicate(timeout=60)
    result = json.loads(rest.splitlines()[-1].removeprefix("result:"))
    assert running.returncode == 0 and result["interrupted"] and (tmp_path / "endless/model.bin").exists()
    assert "stopping_early: interrupted" in rest


@timed
def test_a_second_signal_leaves_at_once(data, tmp_path):
    # A long step in small operations: Python hears of a signal when the operation under way has ended.
    running = start_endless_run(data, tmp_path, TRAIN_BATCH_TOKENS=2**22, MICRO_BATCH_TOKENS=2**13, WARMUP_STEPS=0)
    start = time.monotonic()
    while running.poll() is None and time.monotonic() < start + 10:
        time.sleep(0.6)
        running.send_signal(signal.SIGINT)
    running.communicate(timeout=1)
    assert running.returncode == 128 + signal.SIGINT and not (tmp_path / "endless/model.bin").exists()


def start_endless_run(data, tmp_path, **settings) -> subprocess.Popen:
    """A run that trains until it is stopped, past its first step."""
    settings = (
        TINY
        | dict(DATA_PATH=data, OUT_DIR=tmp_path, RUN_ID="endless", ITERATIONS=10**9, MAX_WALLCLOCK_SECONDS=0)
        | settings
    )
    command = [sys.executable, str(ROOT / "train_gpt.py")]
    running = subprocess.Popen(
        command, env=environment(settings), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    for line in running.stdout:
        if line.startswith("step:1/" if settings["TRAIN_BATCH_TOKENS"] < 1000 else "phase:warmup"):
            return running
    raise AssertionError("the run ended before its first step")


def test_a_loss_that_is_not_finite_stops_with_the_step_and_a_hint(data, tmp_path):
    done = run_script(TINY | dict(DATA_PATH=data, OUT_DIR=tmp_path, RUN_ID="nan", TIED_EMBED_LR="inf"))
    assert done.returncode == 2 and re.search(r"step:2 train_loss is nan.*MATRIX_LR=0.04", done.stderr)
    assert "step:1/8 train_loss:" in (tmp_path / "nan/train.log").read_text()


def test_an_artifact_over_the_cap_makes_the_run_invalid(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_gpt, "BYTE_CAP", 1000)
    for name, value in (TINY | dict(DATA_PATH=data, OUT_DIR=tmp_path, ITERATIONS=2)).items():
        monkeypatch.setenv(name, str(value))
    assert train_gpt.main([]) == 3
    result = json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix("result:"))
    assert not result["valid"] and "size:" in result["invalid_reasons"][0]


def test_a_quick_score_is_that_of_the_artifact_alone_and_no_record(data, tmp_path):
    settings = TINY | dict(DATA_PATH=data, OUT_DIR=tmp_path, BF16=1)
    quick, slow = (result_of(run_script(settings | dict(RUN_ID=f"q{q}", QUICK_SCORE=q))) for q in (1, 0))
    assert "pre_quant_val_bpb" in slow and "pre_quant_val_bpb" not in quick
    assert quick["val_bpb"] == pytest.approx(slow["val_bpb"], abs=0.01)
    assert quick["val_bpb"] != slow["val_bpb"] and not quick["valid"]


def test_the_race_of_attention_kernels_times_each_and_leaves_out_what_refuses():
    q = torch.randn(2, 2, 512, 32)
    kernels = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH}
    kernels = {name: (backend, None) for name, backend in kernels.items()} | {"none": (SDPBackend.MATH, "FA9")}
    found = train_gpt.race(kernels, lambda: causal_attention(q, q, q))
    assert list(found) == ["flash", "math"] and 0 < found["flash"] < found["math"]


@pytest.mark.parametrize(
    ("raced", "chosen", "first"),
    [
        (dict(flash=[2.0, 2.0], cudnn=[1.5, 1.5]), "cudnn", SDPBackend.CUDNN_ATTENTION),
        (dict(flash=[2.0, 2.0], cudnn=[1.5, math.inf]), "flash", SDPBackend.FLASH_ATTENTION),
        (dict(flash=[math.inf, 1.0], cudnn=[1.0, math.inf]), "PyTorch's choice", None),
    ],
)
def test_all_ranks_prefer_one_attention_kernel_and_keep_the_others(raced, chosen, first, monkeypatch):
    kernels = {"flash": (SDPBackend.FLASH_ATTENTION, None), "cudnn": (SDPBackend.CUDNN_ATTENTION, None)}
    monkeypatch.setattr(train_gpt, "attention_kernels", lambda device: kernels)
    monkeypatch.setattr(train_gpt, "race", lambda *_: {n: ms[0] for n, ms in raced.items() if ms[0] < math.inf})
    machine = train_gpt.Machine(torch.device("cpu"), dtype=torch.bfloat16)
    monkeypatch.setattr(machine, "sum", lambda own: own + torch.tensor([ms[1] for ms in raced.values()]))
    before = torch._C._get_sdp_priority_order()
    said = train_gpt.choose_attention(ModelConfig(num_heads=2, num_kv_heads=1, model_dim=16), machine, 1)
    order = torch._C._get_sdp_priority_order()
    assert said.startswith(chosen) and order == (before if first is None else [int(first), *order[1:]])
    assert torch.backends.cuda.math_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()
    train_gpt.PREFERRED.close()
    assert torch._C._get_sdp_priority_order() == before and torch.backends.cuda.cudnn_sdp_enabled()


def test_a_partial_score_is_marked(data, tmp_path):
    result = result_of(run_script(TINY | dict(DATA_PATH=data, OUT_DIR=tmp_path, VAL_MAX_TOKENS=500)))
    assert result["partial"] and not result["valid"] and result["val_tokens"] == result["val_bytes"] == 500


def test_a_run_never_writes_over_anothers_log(finished, data, monkeypatch, capsys):
    _, folder, lines = finished
    said = refusal(monkeypatch, capsys, **TINY | dict(DATA_PATH=data, OUT_DIR=folder.parent, RUN_ID="a"))
    assert said.startswith("RUN_ID=a has a log") and (folder / "train.log").read_text().splitlines() == lines


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (dict(NUM_LAYRES=3), "NUM_LAYRES is not a setting. Did you mean NUM_LAYERS?"),
        (dict(num_layers=3), "num_layers is not a setting. Did you mean NUM_LAYERS?"),
        (dict(NUM_LAYERS="many"), "NUM_LAYERS='many' must be a whole number"),
        (dict(NUM_LAYERS=0), "NUM_LAYERS=0 must be at least 1"),
        (dict(TIE_EMBEDDINGS="perhaps"), "TIE_EMBEDDINGS='perhaps' must be 0 or 1"),
        (dict(MODEL_DIM=100), "MODEL_DIM=100 must be a multiple of 2 x NUM_HEADS=8"),
        (dict(NUM_HEADS=8, NUM_KV_HEADS=3), "NUM_HEADS=8 must be a multiple of NUM_KV_HEADS=3"),
        (dict(QUANT_BITS=9), "QUANT_BITS=9 must be 4, 5, 6, 7 or 8"),
        (dict(SCHEDULE="moon"), "SCHEDULE=moon must be time or steps"),
        (dict(ARCH="gtp"), "ARCH=gtp is not a file in architectures/. Did you mean ARCH=gpt?"),
        (dict(DATA_PATH="/nowhere"), "DATA_PATH=/nowhere is not a folder; make it with `python data/prepare.py`"),
    ],
)
def test_a_wrong_setting_is_answered_with_one_sentence(monkeypatch, capsys, settings, sentence):
    assert refusal(monkeypatch, capsys, **settings).startswith(sentence)


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (dict(VOCAB_SIZE=100), "VOCAB_SIZE=100 is too small: the tokenizer of topics_bytes has 260"),
        (dict(TRAIN_BATCH_TOKENS=100), "TRAIN_BATCH_TOKENS=100 must be a multiple of TRAIN_SEQ_LEN=32 x 1 ranks = 32"),
        (dict(EVAL_STRIDE=64), "EVAL_STRIDE=64 must be between 1 and EVAL_SEQ_LEN=32"),
        (dict(CUDA_GRAPHS=1), "CUDA_GRAPHS=1 needs CUDA and COMPILE=1, here is cpu; unset CUDA_GRAPHS"),
        (dict(DEVICE="tpu"), "DEVICE=tpu is not here. Available:"),
        (dict(TRAIN_SEQ_LEN=400_000, TRAIN_BATCH_TOKENS=400_000), "no training shard is longer than two windows"),
    ],
)
def test_a_setting_that_does_not_fit_the_data_is_answered_with_one_sentence(
    data, monkeypatch, capsys, settings, sentence
):
    assert refusal(monkeypatch, capsys, **TINY | dict(DATA_PATH=data) | settings).startswith(sentence)


def test_damaged_data_is_named(text, tmp_path, monkeypatch, capsys):
    folder = write_bytes_data(tmp_path / "d", text[:5000], text[5000:6000])
    train, val = folder / "fineweb_train_000000.bin", folder / "fineweb_val_000000.bin"
    settings = TINY | dict(DATA_PATH=folder)
    kept = {path: path.read_bytes() for path in (train, val, folder / "tokenizer.json")}

    def refused(path, content: bytes | None) -> str:
        path.unlink() if content is None else path.write_bytes(content)
        said = refusal(monkeypatch, capsys, **settings)
        path.write_bytes(kept[path])
        return said

    assert "is in manifest.json but not on disk" in refused(train, None)
    assert "its header promises 11026" in refused(train, kept[train][:-2])
    assert "is not a token shard" in refused(train, b"\0" * 2000)
    assert "is not the file that manifest.json describes" in refused(val, kept[val][:-1] + b"\1")
    assert "is not the tokenizer of" in refused(folder / "tokenizer.json", kept[folder / "tokenizer.json"] + b" ")


def test_shards_that_the_manifest_does_not_list_are_not_read(text, tmp_path):
    folder = write_bytes_data(tmp_path / "d", text[:5000], text[5000:6000])
    write_shard(folder / "fineweb_train_000001.bin", np.arange(4, 200))
    assert train_gpt.Dataset(str(folder), None).train_files == [str(folder / "fineweb_train_000000.bin")]


def test_a_tokenizer_that_does_not_fit_is_caught_by_the_byte_ledger(text, tmp_path, monkeypatch, capsys):
    folder = write_bytes_data(tmp_path / "d", text[:5000], text[5000:6000])
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"]["val"]["bytes"] += 1
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "spell 1000 bytes, manifest.json says 1001" in refusal(monkeypatch, capsys, **TINY | dict(DATA_PATH=folder))


def test_upstream_shards_without_a_manifest_need_a_tokenizer(text, tmp_path, monkeypatch, capsys):
    folder = write_bytes_data(tmp_path / "d", text[:5000], text[5000:6000])
    (folder / "manifest.json").unlink()
    settings = TINY | dict(DATA_PATH=folder, OUT_DIR=tmp_path, ITERATIONS=1)
    assert "TOKENIZER_PATH must name the tokenizer" in refusal(monkeypatch, capsys, **settings)
    result = result_of(run_script(settings | dict(TOKENIZER_PATH=folder / "tokenizer.json")))
    assert result["val_bytes"] == 1000 and result["data_sha256"] is None


def loader_of(data, seed: int = 1, rank: int = 0, world: int = 1) -> train_gpt.TokenLoader:
    run, config = (
        train_gpt.RunConfig(seed=seed, train_batch_tokens=256),
        train_gpt.ModelConfig(vocab_size=260, train_seq_len=32),
    )
    machine = dataclasses.replace(CPU, rank=rank, world_size=world)
    return train_gpt.TokenLoader([str(data / "fineweb_train_000000.bin")], run, config, machine)


def test_batches_depend_on_seed_and_step_and_not_on_the_number_of_ranks(data):
    whole = loader_of(data).batch(7)
    for world in (2, 4, 8):
        assert torch.equal(whole, torch.cat([loader_of(data, rank=r, world=world).batch(7) for r in range(world)]))
    assert not torch.equal(whole, loader_of(data, seed=2).batch(7)) and not torch.equal(whole, loader_of(data).batch(8))


def test_an_epoch_shows_every_window_once(tmp_path):
    paths = [str(write_shard(tmp_path / f"{i}.bin", np.arange(330) + 400 * i)) for i in range(3)]
    run, config = train_gpt.RunConfig(train_batch_tokens=32), train_gpt.ModelConfig(vocab_size=2000, train_seq_len=32)
    loader = train_gpt.TokenLoader(paths, run, config, CPU)
    assert loader.num_windows == 27
    shown = {tuple(loader.window(i)) for i in range(27)}
    assert len(shown) == 27 and shown != {tuple(loader.window(i)) for i in range(27, 54)}


def test_loader_thread_hands_over_the_same_batches_and_its_errors(data, tmp_path):
    loader, batches = loader_of(data), iter(loader_of(data))
    assert all(torch.equal(next(batches), loader.batch(step).long()) for step in range(5))
    batches.close()
    path = str(write_shard(tmp_path / "x.bin", np.full(330, 999)))
    run, config = train_gpt.RunConfig(train_batch_tokens=32), train_gpt.ModelConfig(vocab_size=260, train_seq_len=32)
    with pytest.raises(ValueError, match="holds token 999, which VOCAB_SIZE=260 does not reach"):
        next(iter(train_gpt.TokenLoader([path], run, config, CPU)))


@pytest.mark.parametrize("seconds", [0.0, 1.0, 60.0, 600.0])
@pytest.mark.parametrize("iterations", [1, 10, 200, 20_000])
def test_no_run_trains_at_a_starved_rate(seconds, iterations):
    run = train_gpt.RunConfig(iterations=iterations, max_wallclock_seconds=seconds)
    schedule = train_gpt.Schedule(run, 0.37, lag=0)
    elapsed = 0.0
    for step in range(min(iterations, 2000)):
        schedule.lr_scale(step)
        elapsed += 0.37
        schedule.completed(step + 1, elapsed, 0.37)
        if elapsed + 0.37 > run.cap_seconds:
            break
    assert np.mean(schedule.scales) >= 0.3


@pytest.mark.parametrize("least", [0.0, 0.1])
def test_the_warmdown_ends_at_min_lr(least):
    run = train_gpt.RunConfig(iterations=100, max_wallclock_seconds=0, warmdown_max_fraction=0.4, min_lr=least)
    schedule = train_gpt.Schedule(run, 0.0, lag=0)
    scales = [schedule.lr_scale(step) for step in range(100)]
    assert scales[:61] == pytest.approx(61 * [1.0]) and scales[80] == pytest.approx(0.5 + 0.5 * least)
    assert scales[99] == pytest.approx(least + (1 - least) / 40)


@pytest.mark.parametrize("lag", [0, 1])
def test_stopping_leaves_little_time_and_never_oversteps(lag):
    rng, unused = np.random.default_rng(0), []
    for _ in range(300):
        run = train_gpt.RunConfig(max_wallclock_seconds=float(rng.uniform(5, 60)))
        schedule, launch, ends, votes = train_gpt.Schedule(run, 0.5, lag), 0.0, [], []
        while True:
            seconds = 0.5 * float(rng.uniform(0.95, 1.05))
            ends.append(max([launch, *ends[-1:]]) + seconds)
            votes.append(schedule.must_stop(launch, launch if lag else ends[-1] - 0.01))
            known = len(ends) - 1 - lag  # the newest step that the host waits for before it launches another
            if known >= 0:
                schedule.completed(known + 1, ends[known], ends[known] - (ends[known - 1] if known else 0.0))
                launch = max(launch, ends[known])
                if votes[known]:
                    break
        assert ends[-1] <= run.cap_seconds
        unused.append((run.cap_seconds - ends[-1]) / 0.5)
    assert np.mean(unused) < 1.5


def test_help_and_unknown_arguments_are_answered(capsys):
    assert train_gpt.main(["--help"]) == 0 and "score model.bin" in capsys.readouterr().out
    assert train_gpt.main(["--layers", "3"]) == 2 and "settings are environment variables" in capsys.readouterr().err


def test_importing_the_script_starts_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", "import train_gpt"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
    )
    assert (done.returncode, done.stdout, done.stderr, list(tmp_path.iterdir())) == (0, b"", b"", [])
