"""Record folders of every shape that was seen in the wild, rebuilt in small: read, compared, never an exception."""

import json
import os
import random
from pathlib import Path

import pytest

from tools.records import Record, read_record

NAME = "2026-11-22_first_try"


def stock_log(val_bpb: float, seed: int = 1337, bytes_total: int = 15_000_000) -> str:
    """Returns a log in upstream's grammar."""
    return "\n".join(
        [
            "val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path=./data/tokenizers/some.model",
            "train_loader:dataset:fineweb10B_sp1024 train_shards:80",
            f"seed:{seed}",
            "world_size:8 grad_accum_steps:1",
            "warmup_step:1/20",
            "step:0/20000 val_loss:6.9000 val_bpb:4.1000 train_time:0ms step_avg:0.01ms",
            "step:200/20000 train_loss:2.7700 train_time:8712ms step_avg:43.56ms",
            "step:400/20000 train_loss:2.5000 train_time:17000ms step_avg:42.50ms",
            "step:13780/20000 val_loss:2.0606 val_bpb:1.2172 train_time:599038ms step_avg:43.54ms",
            "stopping_early: wallclock_cap train_time:599038ms step:13780/20000",
            "Serialized model: 67000000 bytes",
            "Code size: 47642 bytes",
            "Total submission size: 67047642 bytes",
            f"Total submission size int8+zlib: {bytes_total} bytes",
            f"final_int8_zlib_roundtrip val_loss:2.0727 val_bpb:{val_bpb:.4f} eval_time:1401ms",
            f"final_int8_zlib_roundtrip_exact val_loss:2.07269931 val_bpb:{val_bpb:.8f}",
            "",
        ]
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "track_10min_16mb" / NAME
    path.mkdir(parents=True)
    return path


def read(folder: Path, submission: object = None, **logs: str) -> Record:
    """Returns the record after writing submission.json (a string is written as it is) and a file <name>.log per log."""
    if submission is not None:
        words = submission if isinstance(submission, str) else json.dumps(submission)
        (folder / "submission.json").write_text(words, encoding="utf-8")
    for name, words in logs.items():
        (folder / f"{name}.log").write_text(words, encoding="utf-8")
    return read_record(folder)


def test_kit_record_is_read_without_a_problem(folder):
    results = {}
    for seed, val_bpb in ((1337, 1.20), (42, 1.22), (7, 1.24)):
        name = f"logs/train_seed{seed}.log"
        results[str(seed)] = {"val_bpb": val_bpb, "val_loss": 2.0, "bytes_total": 900_000, "log": name}
        (folder / "logs").mkdir(exist_ok=True)
        result = {"seed": seed, "val_bpb": val_bpb, "val_loss": 2.0, "dataset": "w_sp1024", "val_bytes": 99}
        (folder / name).write_text(
            f'config:{{"seed": {seed}}}\nstep:1/2 train_loss:3.0 train_time:5ms step_avg:5ms\n'
            f"phase:train begin_seconds:1.5 end_seconds:2.5\nresult:{json.dumps(result)}\n"
        )
    record = read(
        folder,
        {
            "author": "Ada",
            "github_id": "ada",
            "name": "First",
            "blurb": "words",
            "date": "2026-11-22",
            "arch": "gpt",
            "val_bpb": 1.22,
            "val_loss": 2.0,
            "val_bpb_std": 0.02,
            "seeds": [1337, 42, 7],
            "seed_results": results,
            "bytes_code": 50_000,
            "bytes_total": 900_000,
            "dataset": "w_sp1024",
            "val_bytes": 99,
            "hardware": "2x CPU",
            "verdict": {"status": "pass", "reasons": []},
        },
    )
    assert record.problems == [] and record.notes == [] and record.doubts == []
    assert (record.val_bpb, record.num_seeds, record.verdict, record.arch) == (1.22, 3, "pass", "gpt")
    assert record.val_bpb_std == pytest.approx(0.02)
    assert record.curves["42"][0].train_loss == 3.0 and record.curves["42"][0].seconds == 0.005
    assert (record.dataset, record.val_bytes, record.bytes_total) == ("w_sp1024", 99, 900_000)


@pytest.mark.parametrize(
    ("submission", "num_seeds"),
    [
        ({"val_bpb": 1.25}, 1),
        ({"val_bpb": "1.25"}, 1),
        ({"mean_val_bpb": 1.25, "p_value": "< 0.01"}, 1),
        ({"best_10min_val_bpb": 1.25, "best_10min_step": 4}, 1),
        ({"sliding_val_bpb": 1.25, "pre_quant_val_bpb": 1.2, "leaderboard_best_bpb_then": 1.1, "baseline_bpb": 1.3}, 1),
        ({"results": {"val_bpb": 1.25}}, 1),
        ({"val_bpb": 1.25, "seeds": [1, 2, 3]}, 3),
        ({"val_bpb": 1.25, "seeds": {"1": {"val_bpb": 1.24}, "2": {"val_bpb": 1.26}}}, 2),
        ({"val_bpb": 1.25, "seeds": [1, 2], "seed_results": {"1": {"val_bpb": "1.24"}, "2": {"val_bpb": "1.26"}}}, 2),
        ({"val_bpb": 1.25, "seed_results": {"seed_1": 1.24, "seed_2": 1.26}}, 2),
        ({"val_bpb": 1.25, "seed_results": {"final": {"1": {"sliding_bpb": 1.24}, "2": {"sliding_bpb": 1.26}}}}, 2),
        ({"val_bpb": 1.25, "runs": [{"seed": 1, "val_bpb": 1.24}, {"seed": 2, "val_bpb": 1.26}]}, 2),
    ],
)
def test_score_and_seeds_are_found_in_every_shape(folder, submission, num_seeds):
    record = read(folder, submission)
    assert record.val_bpb == 1.25 and record.num_seeds == num_seeds
    assert record.problems == ["P16 no log"]


@pytest.mark.parametrize("placeholder", [0.0, "pending", None, "NaN", -1, 1e400, True, [1.2]])
def test_placeholder_is_no_score(folder, placeholder):
    record = read(folder, {"name": "soon", "val_bpb": placeholder})
    assert record.val_bpb is None and "no score in submission.json" in record.problems


@pytest.mark.parametrize(
    "submission",
    [
        pytest.param('{"val_bpb": 1.2', id="cut"),
        pytest.param("[1, 2]", id="list"),
        pytest.param("", id="empty"),
        pytest.param("[" * 100_000, id="deep"),
        pytest.param('{"val_bpb": ' + "9" * 5000 + "}", id="long number"),
    ],
)
def test_invalid_json_leaves_the_score_to_the_logs(folder, submission):
    record = read(folder, submission, train=stock_log(1.2244))
    assert record.val_bpb == 1.2244 and len(record.problems) == 2
    assert "submission.json is not a JSON object" in record.problems[0]
    assert "1.2244 is from its logs" in record.problems[1]


def test_missing_submission_leaves_the_score_to_the_logs(folder):
    record = read(folder, train=stock_log(1.2244))
    assert record.val_bpb == 1.2244 and record.problems[0] == "no submission.json"
    assert record.name == "first_try" and record.date == "2026-11-22" and record.dataset == "fineweb10B_sp1024"


def test_file_of_another_name_is_used_if_it_has_the_score(folder):
    (folder / "config.json").write_text('{"num_layers": 9}')
    (folder / "submission_ternary.json").write_text('{"val_bpb": 1.25}')
    record = read(folder, train=stock_log(1.25))
    assert record.val_bpb == 1.25 and record.notes == ["read from submission_ternary.json"] and not record.problems


def test_byte_order_marks_are_no_obstacle(folder):
    (folder / "submission.json").write_bytes(b"\xef\xbb\xbf" + b'{"val_bpb": 1.25}')
    (folder / "train.log").write_bytes(stock_log(1.25).encode("utf-16"))
    assert read(folder).problems == []


@pytest.mark.parametrize("date", ["2026-11-23", "2026-11-23T08:00:35", "2026-11-23T08:00:35Z"])
def test_every_date_format_is_a_day(folder, date):
    assert read(folder, {"date": date}).date == "2026-11-23"


def test_folder_name_may_hold_spaces_and_letters_of_any_alphabet(tmp_path):
    folder = tmp_path / "track_non_record_16mb" / "2026-11-22_ternär  QAT_"
    folder.mkdir(parents=True)
    assert read(folder, train=stock_log(1.3)).name == "ternär QAT_"


def test_words_cannot_hold_control_or_bidirectional_characters(folder):
    record = read(folder, '{"name": "a\\u202eb\\u0007\\nc\\ud800", "author": {"first": "Ada"}, "val_bpb": 1.25}')
    assert record.name == "a b c" and record.author == "first Ada"


def test_best_seed_reported_as_the_mean_is_a_problem(folder):
    record = read(folder, {"val_bpb": 1.2000}, **{f"train_seed{s}": stock_log(1.2 + s / 100, s) for s in (0, 1, 2)})
    assert record.problems == ["P17 submission.json says 1.2000, its best seed; 3 log(s) have mean 1.2100"]


def test_rounded_mean_agrees_with_the_logs(folder):
    record = read(folder, {"val_bpb": 1.21}, a=stock_log(1.20996, 1), b=stock_log(1.21008, 2))
    assert record.problems == [] and record.val_bpb_std == pytest.approx(0.00012 / 2**0.5)


def test_stated_mean_and_stated_seeds_must_agree(folder):
    record = read(folder, {"val_bpb": 1.2, "mean_sliding_bpb": 1.21, "seeds": {"1": 1.2, "2": 1.22}})
    assert "P17 submission.json says 1.2000, but mean_sliding_bpb is 1.2100" in record.problems
    assert "P17 submission.json says 1.2000, but the mean of its seeds is 1.2100" in record.problems


def test_claim_may_rest_on_any_one_final_line(folder):
    lines = stock_log(1.23) + "legal_ttt_exact val_loss:2.4 val_bpb:1.33600000\n"  # the adaptation made it worse
    record = read(folder, {"val_bpb": 1.23}, train=lines)
    assert record.problems == [] and record.seeds["1337"].val_bpb == 1.23


def test_result_line_of_a_kit_log_outranks_every_other_line(folder):
    record = read(folder, {"val_bpb": 1.2}, train=stock_log(1.2) + 'result:{"seed": 1, "val_bpb": 1.3}')
    assert record.problems == ["P17 submission.json says 1.2000; 1 log(s) have mean 1.3000"]


@pytest.mark.parametrize("key", ["results", "name", "seeds", "verdict"])
def test_nesting_of_any_depth_is_harmless(folder, key):
    for depth in (10, 100, *range(300, 1000, 25)):
        nested = f'{{"{key}": ' * depth + "1" + "}" * depth
        assert read(folder, f'{{"val_bpb": 1.2, "{key}": {nested}}}').problems


def test_problems_of_the_evidence_are_named(folder):
    record = read(
        folder,
        {"val_bpb": 1.2, "seeds": [1, 2, 3], "bytes_total": 16_000_001},
        train_seed1=stock_log(1.2, 1),
        train_seed2=stock_log(1.2, 1),
        train_seed3=stock_log(1.3, 1)[:700],
    )
    assert [problem[:3] for problem in record.problems] == ["P16", "P16", "P16", "P12", "P17", "P17"]
    words = ("are the same log", "train_seed3.log is a run of seed 1", "ends before its final score line",
             "1 over the cap", "says 1.2000, its best seed; 2 log(s) have mean", "3 seeds are listed, 2 log(s)")
    assert all(word in problem for word, problem in zip(words, record.problems, strict=True))


def test_logs_of_other_experiments_do_not_count(folder):
    record = read(folder, {"val_bpb": 1.2}, train=stock_log(1.2, 1), log_ablation_base=stock_log(1.5, 2))
    assert record.problems == [] and list(record.seeds) == ["1"]


def test_population_deviation_is_noted_and_replaced(folder):
    seeds = {"1": {"val_bpb": 1.2}, "2": {"val_bpb": 1.22}}
    record = read(folder, {"val_bpb": 1.21, "val_bpb_std": 0.01, "seed_results": seeds})
    assert record.val_bpb_std == pytest.approx(0.01 * 2**0.5) and "population" in record.notes[0]


@pytest.mark.parametrize("verdict", [None, "great", {"status": "PASSED?"}, {"status": {}}, {"reasons": 7}, 7, []])
def test_unknown_verdict_is_unverified(folder, verdict):
    assert read(folder, {"val_bpb": 1.2, "verdict": verdict}).verdict == "unverified"


@pytest.mark.parametrize(("status", "words"), [("fail", "failed verification"), ("hold", "held for a judge")])
def test_failed_or_held_verdict_is_a_doubt_with_its_reasons(folder, status, words):
    verdict = {"status": status, "reasons": ["P03 sums to 2"]}
    record = read(folder, {"val_bpb": 1.2, "verdict": verdict}, train=stock_log(1.2))
    assert record.verdict == status and record.doubts == [f"{words}: P03 sums to 2"]


def test_runs_that_all_print_one_seed_are_told_apart_by_their_names(folder):
    record = read(folder, {"val_bpb": 1.21}, **{f"train_seed_{s}": stock_log(1.2 + s / 100, 1) for s in (0, 1, 2)})
    assert record.problems == [f"P16 train_seed_{s}.log is a run of seed 1" for s in (0, 2)]
    assert {seed: round(result.val_bpb, 4) for seed, result in record.seeds.items()} == {"0": 1.2, "1": 1.21, "2": 1.22}


def test_links_pipes_and_devices_are_named_and_not_read(folder, tmp_path):
    (tmp_path / "elsewhere.log").write_text(stock_log(1.1))
    (folder / "train.log").symlink_to(tmp_path / "elsewhere.log")
    (folder / "zero.log").symlink_to("/dev/zero")
    os.mkfifo(folder / "submission.json")
    record = read_record(folder)
    assert record.val_bpb is None and sum("a link, a pipe or a device" in found for found in record.problems) == 3


def noise(generator: random.Random) -> bytes:
    """Returns random bytes, or a cut and bit-flipped log or submission."""
    if generator.random() < 0.2:
        return generator.randbytes(generator.randrange(400))
    deep = {"seeds": {"1": {"seeds": [None, {"seed": "x"}, [[]]]}, "\ud800": 1e308}, "verdict": [1], "val_bpb": -1e999}
    text = generator.choice(
        [
            stock_log(generator.choice([1.2, 0.0, 99.9])),
            json.dumps(deep),
            json.dumps({"result": {"val_bpb": "1e9"}}),
            json.dumps({"val_bpb": 1.2, "bytes_total": 10**300, "seeds": 5, "name": {}, "blurb": [[{}]], "date": 7}),
            'config:{"seed": [1]}\nresult:{"val_bpb": {}, "seed": 1e30, "val_bytes": -4, "hardware": []}',
            "step:999999999999/1 train_loss:1e300 train_time:-1e300ms\nfinal val_loss:1e-300 val_bpb:1.1",
        ]
    )
    raw = bytearray(text.encode())[: generator.randrange(len(text) + 1)]
    for _ in range(generator.randrange(4) if raw else 0):
        raw[generator.randrange(len(raw))] = generator.randrange(256)
    return bytes(raw)


@pytest.mark.parametrize("seed", range(200))
def test_noise_never_raises(folder, seed):
    generator = random.Random(seed)
    names = ("submission.json", "x.json", "train.log", "train_seed42.log", "b.txt")
    for name in generator.sample(names, generator.randrange(1, 5)):
        (folder / name).write_bytes(noise(generator))
    record = read_record(folder)
    assert record.problems and (record.val_bpb is None or 0 < record.val_bpb < 100)
