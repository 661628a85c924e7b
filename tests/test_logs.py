"""Training logs in the kit's grammar and in the dialects of others, rebuilt in small."""

import time
from pathlib import Path

import pytest

from tools.logs import Log, read_log

STEPS = (
    "step:0/20000 val_loss:6.9 val_bpb:4.1 train_time:0ms step_avg:0.01ms",
    "step:200/20000 train_loss:2.77 train_time:8712ms step_avg:43.56ms",
    "step:400/20000 val_loss:2.06 val_bpb:1.2172 train_time:17000ms step_avg:43.54ms",
)
ROUNDTRIP = "final_int8_zlib_roundtrip_exact val_loss:2.07269931 val_bpb:1.22436570"


@pytest.fixture
def log_of(tmp_path: Path):
    def read(*lines: str) -> Log:
        (tmp_path / "train.log").write_text("\n".join(lines), encoding="utf-8")
        return read_log(tmp_path / "train.log")

    return read


def test_kit_log_gives_config_phases_points_stop_and_result(log_of):
    log = log_of(
        'config:{"arch": "gpt", "seed": 7, "data_path": "data/datasets/wikitext2_sp1024"}',
        *STEPS,
        "stopping_early: wallclock_cap train_time:599038ms step:400/20000",
        "phase:train begin_seconds:12.345 end_seconds:611.123",
        "Serialized model int8+zstd: 800 bytes",
        "Code size: 200 bytes",
        "Total submission size int8+zstd: 1000 bytes",
        ROUNDTRIP,
        'result:{"seed": 7, "val_loss": 2.0, "val_bpb": 1.2, "valid": true, "val_bytes": 99}',
    )
    assert log.problems == [] and log.config["arch"] == "gpt" and log.seed == 7
    assert log.phases == {"train": (12.345, 611.123)}
    assert [point.step for point in log.steps] == [200] and [point.step for point in log.val_points] == [0, 400]
    assert (log.stop_step, log.stop_seconds) == (400, pytest.approx(599.038))
    assert (log.bytes_model, log.bytes_code, log.bytes_total) == (800, 200, 1000)
    assert (log.val_bpb, log.score_line, log.val_bytes, log.dataset) == (1.2, "result", 99, "wikitext2_sp1024")


@pytest.mark.parametrize(
    ("lines", "val_bpb", "score_line"),
    [
        (
            ["final_int8_zlib_roundtrip val_loss:2.0727 val_bpb:1.2244 eval_time:1401ms", ROUNDTRIP],
            1.2243657,
            "final_int8_zlib_roundtrip",
        ),
        (
            [ROUNDTRIP, "final_int8_zlib_roundtrip val_loss:2.0727 val_bpb:1.2244"],
            1.2243657,
            "final_int8_zlib_roundtrip",
        ),
        (
            ["final_int6_sliding_window_exact val_loss:2.0 val_bpb:1.19 stride:64", ROUNDTRIP],
            1.19,
            "final_int6_sliding_window",
        ),
        (
            ["final_int6_sliding_window stride:64 val_loss:2.0 val_bpb:1.1900 eval_time:9ms"],
            1.19,
            "final_int6_sliding_window",
        ),
        (
            [
                "ttt_sliding:done val_loss=1.9 val_bpb=1.17 elapsed=293.2s",
                "quantized_sliding_window val_loss:2 val_bpb:1.2",
            ],
            1.17,
            "ttt_sliding",
        ),
        (
            ["quantized_ttt_phased val_loss:1.9 val_bpb:1.18 eval_time:455128ms", ROUNDTRIP],
            1.18,
            "quantized_ttt_phased",
        ),
        (["legal_ttt_exact val_loss:1.9 val_bpb:1.16"], 1.16, "legal_ttt"),
        ([ROUNDTRIP, "  sliding val_bpb: 1.21"], 1.21, "sliding"),
        ([ROUNDTRIP, "[rank0]: final_mine val_loss: 2.0 val_bpb: 1.20"], 1.20, "final_mine"),
        (
            [ROUNDTRIP, "diagnostic pre-quantization post-ema val_loss:1.9 val_bpb:1.10"],
            1.2243657,
            "final_int8_zlib_roundtrip",
        ),
        (
            [
                ROUNDTRIP,
                "pre_quant_eval_exact val_loss:1.9 val_bpb:1.10",
                "best_val_bpb:1.0",
                "ttt_chunk 3/9 val_bpb:1.0",
            ],
            1.2243657,
            "final_int8_zlib_roundtrip",
        ),
    ],
)
def test_score_is_the_strongest_final_line(log_of, lines, val_bpb, score_line):
    log = log_of(*STEPS, *lines)
    assert (log.val_bpb, log.score_line, log.problems) == (pytest.approx(val_bpb), score_line, [])


@pytest.mark.parametrize(
    ("lines", "val_bpb", "last"),
    [
        ([], 1.2172, "step 400"),
        (["diagnostic quantized val_loss:2.3 val_bpb:1.23", "ttt: started"], 1.23, "diagnostic_quantized"),
        (["final_int8_zlib_roundtrip_exact val_loss:nan val_bpb:nan"], 1.2172, "step 400"),
    ],
)
def test_log_that_ends_early_says_what_it_was_read_from(log_of, lines, val_bpb, last):
    log = log_of(*STEPS, *lines)
    assert log.val_bpb == val_bpb and log.problems == [f"ends before its final score line; {last} is the last score"]


def test_source_code_before_the_run_is_skipped(log_of):
    source = ["import torch", "seed=11", "# final_roundtrip val_loss:1.0 val_bpb:1.0000", "# " + "=" * 78, "=" * 100]
    log = log_of(*source, "Running Python 3.12", "=" * 100, "seed:5", *STEPS, ROUNDTRIP)
    assert log.seed == 5 and list(log.scores) == ["final_int8_zlib_roundtrip"]


def test_source_code_pasted_after_the_run_does_not_hide_it(log_of):
    log = log_of("seed:5", *STEPS, ROUNDTRIP, "import torch", 'log0(f"val_bpb:{val_bpb:.4f}")', "=" * 100, "done")
    assert (log.seed, log.val_bpb) == (5, pytest.approx(1.2243657))


def test_steps_without_the_word_and_times_in_minutes_are_read(log_of):
    log = log_of(
        "Hyperparameters:",
        "  seed: 42",
        "  train_files: /x/datasets/fineweb10B_sp8192/fineweb_train_*.bin",
        "0/20000 val_loss: 9.0076 val_bpb: 4.1159",
        "500/20000 train_loss: 2.5748 train_time: 4.5m tok/s: 9",
        "stopping_early: wallclock_cap train_time: 599623ms step: 4900/20000",
        "Code size (uncompressed): 142470 bytes",
        "Code size (compressed): 35985 bytes",
        "Total submission size quantized+brotli: 15900000 bytes",
        ROUNDTRIP,
    )
    assert log.steps[0].seconds == 270 and log.val_points[0].seconds is None
    assert (log.seed, log.dataset, log.config["seed"]) == (42, "fineweb10B_sp8192", "42")
    assert (log.stop_step, log.bytes_code, log.bytes_total) == (4900, 35_985, 15_900_000)


def test_raw_state_dict_is_not_the_artifact(log_of):
    log = log_of(*STEPS, "Serialized model: 67 bytes", "Total submission size: 68 bytes", ROUNDTRIP)
    assert log.bytes_total is None and log.bytes_model is None


def test_run_that_was_started_again_counts_once(log_of):
    log = log_of(
        *STEPS,
        "step:401/20000 train_loss:2.6 train_time:9ms",
        "step:1/20000 train_loss:6.9 train_time:5ms",
        *STEPS[1:],
        ROUNDTRIP,
    )
    assert [point.step for point in log.steps] == [1, 200]


def test_hardware_is_read_from_the_driver_table(log_of):
    line = "|   0  NVIDIA H100 80GB HBM3          On  |   00000000:18:00.0 Off |"
    assert log_of("world_size:8 grad_accum_steps:1", line, *STEPS, ROUNDTRIP).hardware == "8x NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize(
    ("result", "problem"),
    [
        ('{"val_bpb": 1.2, "valid": false, "invalid_reasons": ["too big"]}', "the run says it is invalid: too big"),
        ('{"val_bpb": 1.2, "partial": true}', "only part of the validation text was scored"),
        ('{"val_bpb": 1.2, "interrupted": true}', "interrupted"),
        ('{"val_bpb": 1.', "its result line is cut"),
    ],
)
def test_run_that_does_not_count_says_why(log_of, result, problem):
    assert log_of(*STEPS, ROUNDTRIP, "result:" + result).problems[0].startswith(problem)


def test_missing_log_is_a_problem(tmp_path):
    assert read_log(tmp_path / "none.log").problems == ["cannot read none.log: FileNotFoundError"]


def test_clocks_of_calibration_scoring_and_compiling_are_read(log_of):
    log = log_of(
        "gptq:collected 3 Hessians in 99.0s",  # before training goes on: inside its clock
        *STEPS,
        "GPTQ:collected 67 Hessians in 3.5s",
        "gptq:train_data calibrated 66 layers in 11.5s",
        "ttt_lora:compile warmup done (161.9s)",
        "pre_quant_eval_exact val_loss:1.9 val_bpb:1.10 eval_time:9999ms",
        "ttt_sliding:done val_loss=1.9 val_bpb=1.17 elapsed=293.2s",
        "quantized_ttt_phased val_loss:1.9 val_bpb:1.17 eval_time:455128ms",
        "total_eval_time:455.1s",
    )
    assert list(log.calibration.values()) == [3.5, 11.5] and log.compile_seconds == 161.9
    assert log.eval_seconds == pytest.approx(
        {"ttt_sliding": 293.2, "quantized_ttt_phased": 455.128, "total_eval_time": 455.1}
    )
    assert log.diagnostics == {"pre_quant_eval": (1.9, 1.1)}


@pytest.mark.parametrize("line", ["val_tokens: 40540160", "val_loader:shards pattern=x/val_*.bin tokens:40540160"])
def test_scored_tokens_and_cap_are_read(log_of, line):
    log = log_of("train_seq_len:1024 max_wallclock_seconds:600.000", line, *STEPS, ROUNDTRIP)
    assert (log.val_tokens, log.cap_seconds, log.lifted_cap) == (40_540_160, 600.0, "")


@pytest.mark.parametrize(
    ("line", "lifted"),
    [("FORCE_STOP_STEP=4945", "FORCE_STOP_STEP=4945"), ("force_stop_step: 0", ""), ("now: force_stop", "force_stop")],
)
def test_setting_that_lifts_the_cap_is_found_if_it_is_on(log_of, line, lifted):
    assert log_of(line, *STEPS, ROUNDTRIP).lifted_cap == lifted


def test_sizes_may_be_in_megabytes_of_either_kind(log_of):
    log = log_of("Serialized model int8+zlib: 15.5 MiB", "Total submission size int8+zlib: 15.9 MB", *STEPS, ROUNDTRIP)
    assert (log.bytes_model, log.bytes_total) == (16_252_928, 15_900_000)


@pytest.mark.parametrize("word", ["stopping_early ", "gptq in ", "NVIDIA A1 ", "a:1", "step ", "datasets/", "="])
def test_long_lines_of_one_word_take_no_time(log_of, word):
    began = time.process_time()
    log_of(*[word * (100_000 // len(word))] * 5, *[word * (2_000 // len(word))] * 250, *STEPS, ROUNDTRIP)
    assert time.process_time() - began < 2.0
