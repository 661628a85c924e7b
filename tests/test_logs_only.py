"""Upstream's record folders as they are, rebuilt in small: every way in which real ones were wrong has its finding."""

import base64
import bz2
import json
import lzma
import os
import shutil
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from tools.referee import logs_only
from tools.referee.packed import MAX_SOURCE_BYTES, read_script

NAME = "2026-04-08_ScoreFirst_1.08"
SCRIPT = "import os\n\nprint('trains and scores', os.getpid())\n"
BYTES_PER_TOKEN = {"sp1024": 151_080_363 / 62_021_632, "sp8192": 151_078_222 / 40_540_160}


def loss(val_bpb: float, kind: str = "sp1024") -> float:
    """Nats per token that belong to a score on the whole validation text."""
    return val_bpb * 0.6931471805599453 * BYTES_PER_TOKEN[kind]


def stock(seed: int, val_bpb: float, code: int, *, cap: int = 600, stop: int = 599_038, tokens: int = 62_021_632,
          bytes_model: int = 15_800_000, before: str = "", after: str = "", final: str = "") -> str:
    """A log in the grammar of upstream's first script, with a sliding window as its claim."""
    nats, plain = loss(val_bpb), val_bpb + 0.03
    return f"""{before}val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path=data/fineweb_1024_bpe.model
train_loader:dataset:fineweb10B_sp1024 train_shards:80
val_loader:shards pattern=./data/datasets/fineweb10B_sp1024/fineweb_val_*.bin tokens:{tokens}
world_size:8 grad_accum_steps:1
train_batch_tokens:524288 train_seq_len:1024 iterations:20000 warmup_steps:20 max_wallclock_seconds:{cap}.000
seed:{seed}
warmup_step:1/20
step:0/20000 val_loss:6.9357 val_bpb:4.1077 train_time:0ms step_avg:0.02ms
step:200/20000 train_loss:2.7700 train_time:8712ms step_avg:43.56ms
step:13780/20000 val_loss:2.0606 val_bpb:1.2172 train_time:{stop}ms step_avg:43.54ms
stopping_early: wallclock_cap train_time:{stop}ms step:13780/20000
peak memory allocated: 10184 MiB reserved: 10200 MiB
Serialized model: 67224983 bytes
Code size: {code} bytes
Total submission size: 67272625 bytes
{after}Serialized model int8+zlib: {bytes_model} bytes (payload:17178912 raw_torch:17224025 payload_ratio:3.91x)
Total submission size int8+zlib: {bytes_model + code} bytes
final_int8_zlib_roundtrip val_loss:{loss(plain):.4f} val_bpb:{plain:.4f} eval_time:1401ms
final_int8_zlib_roundtrip_exact val_loss:{loss(plain):.8f} val_bpb:{plain:.8f}
""" + (final or f"""final_int8_sliding_window val_loss:{nats:.4f} val_bpb:{val_bpb:.4f} stride:64 eval_time:88541ms
final_int8_sliding_window_exact val_loss:{nats:.8f} val_bpb:{val_bpb:.8f} stride:64
""")


def spaced(seed: int, val_bpb: float, code: int, *, stop: int = 588_042, hessians: float = 11.4,
           evaluation: int = 343_415, compiling: str = "") -> str:
    """A log in the grammar of upstream's later scripts: settings one to a line, blanks, minutes, Hessians, training
    at test time."""
    nats = loss(val_bpb, "sp8192")
    return f"""W0406 05:48:52.138000 4182076 torch/distributed/run.py:803] *****************************************
Hyperparameters:
  datasets_dir: ./data/datasets/fineweb10B_sp8192
  gptq_reserve_seconds: 12.0
  max_wallclock_seconds: 600.0
  seed: {seed}
  world_size: 8
train_shards: 128
val_tokens: 40540160
gptq:reserving 12s, effective=588000ms
0/20000 val_loss: 9.0052 val_bpb: 3.4862
500/20000 train_loss: 3.3106 train_time: 0.8m tok/s: 7721577 looping:False
5068/20000 val_loss: 2.8144 val_bpb: 1.0895
stopping_early: wallclock_cap train_time: {stop}ms step: 5068/20000
diagnostic pre-quantization post-ema val_loss:{loss(val_bpb + 0.006, "sp8192"):.8f} val_bpb:{val_bpb + 0.006:.8f}
Code size: {code} bytes
GPTQ:collecting Hessians from calibration data...
GPTQ:collected 67 Hessians in {hessians}s
Serialized model quantized+brotli: 15880000 bytes
Total submission size quantized+brotli: {15_880_000 + code} bytes
quantized val_loss:{loss(val_bpb + 0.02, "sp8192"):.8f} val_bpb:{val_bpb + 0.02:.8f} eval_time:24381ms
{compiling}ttt_sliding:done val_loss={nats:.6f} val_bpb={val_bpb:.6f} elapsed={evaluation / 1000:.1f}s
legal_ttt_exact val_loss:{nats:.8f} val_bpb:{val_bpb:.8f} eval_time:{evaluation}ms
total_eval_time:{evaluation / 1000:.1f}s
"""


def write(folder: Path, log: Callable[..., str] = stock, *, script: str = SCRIPT, said: dict | None = None,
          seeds: tuple[int, ...] = (1337, 42, 7), **details: object) -> Path:
    """A clean record: three seeds whose mean is claimed; `details` go to the log, `said` into submission.json."""
    folder.mkdir(parents=True, exist_ok=True)
    scores = {seed: 1.1 + index / 1000 for index, seed in enumerate(seeds)}
    (folder / "train_gpt.py").write_text(script, encoding="utf-8")
    (folder / "README.md").write_text("what it is")
    for seed, score in scores.items():
        (folder / f"train_seed{seed}.log").write_text(log(seed, score, len(script.encode()), **details))
    mean, kind = sum(scores.values()) / len(scores), "sp1024" if log is stock else "sp8192"
    claim = {"author": "Ada", "github_id": "ada", "name": "x", "date": folder.name[:10], "val_bpb": mean,
             "val_loss": loss(mean, kind), "val_bpb_std": 0.001, "seeds": list(seeds), "track": "10min_16mb"}
    (folder / "submission.json").write_text(json.dumps(claim | (said or {})))
    return folder


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "track_10min_16mb" / NAME


def statuses(folder: Path) -> dict[str, str]:
    return {finding.rule: finding.status for finding in logs_only.examine(folder)}


def words(folder: Path, rule: str) -> tuple[str, str]:
    finding = next(finding for finding in logs_only.examine(folder) if finding.rule == rule)
    return finding.status, "; ".join(finding.problems)


@pytest.mark.parametrize("log", [stock, spaced])
def test_clean_folder_passes_every_rule(place, log):
    assert set(statuses(write(place, log)).values()) == {"PASS"}
    assert logs_only.report([place])[1] == "pass"


def test_rules_that_need_a_running_submission_do_not_appear(place):
    assert list(statuses(write(place))) == ["P07", "P10", "P11", "P12", "P13", "P14", "P16", "P17", "P25"]


def test_source_code_at_the_start_of_a_log_is_not_the_log(place):
    ruler = "=" * 100
    source = f"import torch\nlog0(f'GPTQ:collected 67 Hessians in 999s val_bpb:{{x}}')\nFORCE_STOP_STEP=5\n{ruler}\n"
    assert set(statuses(write(place, before=f"{source}Running Python 3.12.3\n{ruler}\n")).values()) == {"PASS"}


def test_names_may_hold_spaces_and_letters_of_any_alphabet_but_are_named(tmp_path):
    folder = write(tmp_path / "track_10min_16mb" / "2026-04-08_ternär QAT_ ")
    assert words(folder, "P14") == ("FAIL", f"folder {folder.name.strip()} is not <YYYY-MM-DD>_<name> in letters, "
                                    "digits and . _ + -")


def test_non_record_track_has_no_cap_of_time_and_needs_one_seed(tmp_path):
    folder = tmp_path / "track_non_record_16mb" / NAME
    write(folder, seeds=(1337,), cap=14_400, stop=14_399_000, said={"track": "non-record-16mb", "val_bpb_std": None})
    assert set(statuses(folder).values()) == {"PASS"}


def same_seed(folder: Path) -> None:
    write(folder)
    for path in folder.glob("*.log"):
        path.write_text(path.read_text().replace("seed:42", "seed:1337").replace("seed:7", "seed:1337"))


def same_log(folder: Path) -> None:
    shutil.copy(write(folder) / "train_seed42.log", folder / "train_seed7.log")


def cut(folder: Path) -> None:
    path = write(folder) / "train_seed42.log"
    path.write_text("\n".join(line for line in path.read_text().splitlines() if not line.startswith("final")))


def helpers(folder: Path) -> None:
    (write(folder, script="import ngram_tilt\n" + SCRIPT, bytes_model=15_980_000) / "ngram").mkdir()
    (folder / "ngram_tilt.py").write_text("SOURCE = 'fused_expert_kernel.cpp'\n" + "#" * 8_000)
    (folder / "ngram/fused_expert_kernel.cpp").write_text("//" * 9_000)


def not_named(folder: Path) -> None:
    (write(folder, bytes_model=15_999_000) / "train_gpt_readable.py").write_text("#" * 5_000)


def named_in_words(folder: Path) -> None:
    script = SCRIPT + "# data: prepare_caseops_data.py\nhint = 'run prepare_caseops_data.py first'\n"
    (write(folder, script=script, bytes_model=15_990_000) / "prepare_caseops_data.py").write_text("#" * 12_000)


def command(folder: Path) -> None:
    (write(folder) / "README.md").write_text("SEED=42 FORCE_STOP_STEP=4945 torchrun train_gpt.py")


def model_on_disk(folder: Path) -> None:
    with (write(folder) / "final_model.int6.ptz").open("wb") as file:
        file.truncate(16_100_000)  # no byte of it is written


def exec_of_file(folder: Path) -> None:
    runs = 'exec(open(__file__.replace("train_gpt.py","train_gpt_decode.py")).read())\n'
    (write(folder, script=runs, bytes_model=15_979_649) / "train_gpt_decode.py").write_text("#" * 80_055)


def another_name(folder: Path) -> None:
    (write(folder) / "submission.json").rename(folder / "submission_ternary.json")


def without(*names: str) -> Callable[[Path], None]:
    return lambda folder: [path.unlink() for name in names for path in write(folder).glob(name)]


def built(*args: object, **kwargs: object) -> Callable[[Path], object]:
    return lambda folder: write(folder, *args, **kwargs)


def final(nats: float, val_bpb: float) -> str:
    return f"final_int8_sliding_window_exact val_loss:{nats} val_bpb:{val_bpb} stride:64\n"


AR = "gptq:generated 64 sequences in 240.8s\ngptq:collected hessians for 70 layers (AR self-gen)\ngptq:done in 241.8s\n"
LATER = "gptq:train_data calibrated 66 layers in 11.5s\n"
WARM = "ttt_lora:compile warmup done (161.9s)\n"
BROKEN: dict[str, tuple[Callable[[Path], object], str, str, str]] = {
    "stop after the cap": (built(stop=600_038), "P10", "FAIL", "training stops after 600.038 s, 0.038 s late"),
    "calibration after the stop": (built(after=AR), "P10", "FAIL", "241.8 s of calibration (gptq:done in 241.8s) are "
                                   "240.8 s over"),
    "training data after the stop": (built(after=LATER), "P10", "FAIL", "11.5 s of calibration"),
    "half a second in reserve": (built(spaced, stop=599_560, hessians=3.5), "P10", "FAIL", "are 3.1 s over"),
    "a cap of 900 s": (built(cap=900, stop=601_000), "P10", "FAIL", "its cap is 900 s, the track's 600 s"),
    "no cap": (built(cap=0), "P10", "FAIL", "its cap is 0 s"),
    "a step in place of the cap": (built(after="FORCE_STOP_STEP=4945\n"), "P10", "FAIL", "FORCE_STOP_STEP=4945"),
    "a setting for such a step": (built(script=SCRIPT + "stop = os.environ.get('FORCE_STOP_STEP', 0)\n"), "P10", "HOLD",
                                  "the cap is no setting"),
    "such a step in its command": (command, "P10", "FAIL", "README.md runs it with FORCE_STOP_STEP=4945"),
    "no time": (without("*.log"), "P10", "SKIP", ""),
    "long scoring": (built(spaced, evaluation=688_000), "P11", "FAIL", "688.0 s of ttt_sliding, 88.0 s over"),
    "compiling before the timer": (built(spaced, evaluation=511_264, compiling=WARM), "P11", "FAIL", "161.9 s of "
                                   "compiling before its timer, 73.2 s over"),
    "over the cap": (built(bytes_model=16_024_793), "P12", "FAIL", "the cap is in megabytes, not in MiB"),
    "far over the cap": (built(bytes_model=17_300_000), "P12", "FAIL", "1,300,051 over the cap"),
    "over the cap in words": (built(said={"bytes_total": 16_638_468}), "P12", "FAIL", "16,638,468 bytes are stated"),
    "less in words than in logs": (built(said={"bytes_total": 15_700_000}), "P12", "FAIL", "the largest log says"),
    "a larger script": (built(script=SCRIPT + "#" * 150_000, bytes_model=15_875_551), "P12", "FAIL", "over the cap"),
    "uncounted helpers": (helpers, "P12", "FAIL", "ship (26,"),
    "code that nothing names": (not_named, "P12", "HOLD", "a judge has to see which of them runs"),
    "a preparation of data": (named_in_words, "P12", "HOLD", "files that the script does not name"),
    "a model on disk": (model_on_disk, "P12", "FAIL", "16,100,051 bytes ship"),
    "exec of a file, its size": (exec_of_file, "P12", "FAIL", "16,059,778 bytes ship"),
    "exec of a file": (exec_of_file, "P13", "FAIL", "runs another file, train_gpt_decode.py, as its code"),
    "later Python": (built(script="x = f'{'a'}' if 1 else f'{\n1}'\n"), "P13", "FAIL", "it is no Python"),
    "no README": (without("README.md"), "P14", "FAIL", "README.md is missing"),
    "JSON of another name": (another_name, "P14", "FAIL", "submission.json is missing"),
    "no script": (without("train_gpt.py"), "P14", "FAIL", "train_gpt.py is missing"),
    "another day": (built(said={"date": "2026-04-09T10:00:00Z"}), "P14", "FAIL", "the folder says 2026-04-08"),
    "another track": (built(said={"track": "non_record_16mb"}), "P14", "FAIL", "track is non_record_16mb"),
    "no author": (built(said={"author": None}), "P14", "FAIL", "submission.json has no author"),
    "a score in words": (built(said={"val_bpb": "pending"}), "P14", "FAIL", "val_bpb is pending"),
    "one seed in three logs": (same_seed, "P16", "FAIL", "train_seed7.log is a run of seed 1337"),
    "one log twice": (same_log, "P16", "FAIL", "train_seed42.log and train_seed7.log are the same log"),
    "a log that is cut": (cut, "P16", "FAIL", "ends before its final score line"),
    "one seed": (built(seeds=(1337,)), "P16", "FAIL", "whole logs of 1 seed(s), the track needs 3"),
    "no log": (without("*.log"), "P16", "FAIL", "no log"),
    "the best seed": (built(said={"val_bpb": 1.1}), "P17", "FAIL", "says 1.1000, its best seed; 3 log(s) have mean"),
    "a score of no log": (built(said={"val_bpb": 1.05}), "P17", "FAIL", "says 1.0500; 3 log(s) have mean 1.1010"),
    "the population's deviation": (built(said={"val_bpb_std": 0.000816}), "P17", "FAIL", "the population's"),
    "spaces counted twice": (built(final=final(2.2, 1.0)), "P07", "FAIL", "imply 196,852,262 bytes of text"),
    "another export": (built(tokens=63_779_840), "P07", "FAIL", "63,779,840 tokens and 155,36"),
    "a fifth of the text": (built(tokens=12_404_326), "P07", "FAIL", "12,404,326 tokens"),
    "loss and score of two runs": (built(said={"val_loss": 1.9}), "P07", "FAIL", "val_loss and val_bpb imply"),
    "too good": (built(final=final(loss(0.39), 0.39), said={"val_bpb": 0.39}), "P25", "HOLD", "below 0.95"),
    "a seed that was searched": (built(seeds=(2_884_431_328, 1, 2)), "P25", "HOLD", "seed 2884431328"),
    "no spread": (built(final=final(loss(1.1), 1.1)), "P25", "HOLD", "differ by a deviation of 0"),
    "better by quantisation": (built(before="", after="pre_quant post_ema val_loss:2.0 val_bpb:1.14\n"), "P25", "HOLD",
                               "better after quantisation than before"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_folder_is_found_out_that_has(place, what):
    breaks, rule, status, sentence = BROKEN[what]
    breaks(place)
    found, problems = words(place, rule)
    assert found == status and sentence in problems


def packed(source: str, how: str) -> str:
    raw = source.encode()
    if how == "lines of b85":
        text = base64.b85encode(lzma.compress(raw)).decode()
        rows = '"\n"'.join(text[start:start + 90].replace("\\", "\\\\") for start in range(0, len(text), 90))
        return f'import lzma as L,base64 as B\nexec(L.decompress(B.b85decode("{rows}")))'
    if how == "raw lzma":
        filters = [{"id": lzma.FILTER_LZMA2, "preset": 9}]
        data = base64.b85encode(lzma.compress(raw, lzma.FORMAT_RAW, filters=filters)).decode()
        return f"import lzma,base64\nexec(lzma.decompress(base64.b85decode({data!r}),format=3,filters=[{{'id':33}}]))"
    if how == "bytes":
        return f"import zlib\nexec(zlib.decompress({zlib.compress(raw)!r}))"
    if how == "sum":
        text = base64.b64encode(bz2.compress(raw)).decode()
        half = len(text) // 2
        return f"import bz2,base64\np={text[:half]!r}+{text[half:]!r}\nexec(bz2.decompress(base64.b64decode(p)))"
    text = base64.b64encode(zlib.compress(raw)).decode()
    return f"import zlib,base64\nexec(zlib.decompress(base64.b64decode(''.join([{text[:50]!r},{text[50:]!r}]))))"


WAYS = ("lines of b85", "raw lzma", "bytes", "sum", "join")
LONG = "import os\n" + "".join(f"def function_{i}():\n    return os.getpid() + {i * 7919}\n\n" for i in range(60))


@pytest.mark.parametrize("how", WAYS)
def test_packed_script_is_read_without_running_it(place, how):
    write(place, script=packed(LONG, how))
    assert statuses(place)["P13"] == "PASS"
    assert read_script((place / "train_gpt.py").read_bytes()).layers[-1][1] == LONG


def test_script_that_is_packed_twice_is_read_to_the_last_layer():
    twice = packed(packed(LONG, "bytes"), "lines of b85")
    assert read_script(twice.encode()).layers[-1][1] == LONG


def test_helper_that_only_the_packed_text_names_is_counted(place):
    write(place, script=packed(LONG + "import ngram_tilt\n", "lines of b85"), bytes_model=15_980_000)
    (place / "ngram_tilt.py").write_text("#" * 30_000)
    assert words(place, "P12")[0] == "FAIL"


def test_bomb_is_named_and_does_not_go_off():
    bomb = packed(" " * (MAX_SOURCE_BYTES * 8), "lines of b85")
    began = time.monotonic()
    assert "unpack to more than" in "; ".join(read_script(bomb.encode()).problems)
    assert time.monotonic() - began < 1.0


def test_packing_that_cannot_be_undone_is_named():
    script = f"import brotli,base64\nexec(brotli.decompress(base64.b64decode({'A' * 400!r})))"
    assert "could not be unpacked without running it" in "; ".join(read_script(script.encode()).problems)


def test_unpacking_runs_nothing(tmp_path):
    trap = f"open({str(tmp_path / 'sprung')!r}, 'w')\n" + LONG
    for how in WAYS:
        assert read_script(packed(trap, how).encode()).layers[-1][1] == trap
    assert not list(tmp_path.iterdir())


def test_links_are_named_and_not_followed(place, tmp_path):
    (tmp_path / "secret.txt").write_text(stock(9, 1.0, 10))
    (write(place) / "train_seed9.log").symlink_to(tmp_path / "secret.txt")
    assert words(place, "P12") == ("FAIL", "train_seed9.log is a link, a pipe or a device; it was not read")
    assert "train_seed9" not in logs_only.report([place])[0].replace("train_seed9.log is a link", "")


def test_report_has_one_block_per_folder_and_the_worst_status(tmp_path):
    clean = write(tmp_path / "track_10min_16mb" / NAME)
    broken = write(tmp_path / "track_10min_16mb" / "2026-04-09_b", said={"author": ""})
    text, worst = logs_only.report([clean, broken, tmp_path / "nothing"])
    blocks = text.split("\n\n")
    assert worst == "fail" and len(blocks) == 3
    assert blocks[0].endswith("pass: nothing found; nothing was run")
    assert blocks[1].endswith("fail: P14; nothing was run") and "not a folder" in blocks[2]


def test_ten_large_folders_take_a_second_of_computing(tmp_path):
    folders = [write(tmp_path / "track_10min_16mb" / f"2026-04-08_{i}", script=packed(LONG * 20, "lines of b85"),
                     before="import torch\n" * 3_000 + "=" * 100 + "\n") for i in range(10)]
    began = time.process_time()
    logs_only.report(folders)
    assert time.process_time() - began < 2.0


def test_strange_bytes_in_a_name_are_printed_as_blanks(place):
    write(place)
    os.rename(os.fsencode(place / "train_seed7.log"), os.fsencode(place) + b"/train_\xff\x1b[31m_seed7.log")
    text, _ = logs_only.report([place])
    assert text.isprintable() or not [char for char in text if not char.isprintable() and char != "\n"]
