"""Identity, clocks and sizes of a record of any origin, from its logs and files (P07, P10, P11, P12, P13)."""

import math
import re
from pathlib import Path

from tools.logs import Log
from tools.referee.logs_folder import Folder, found, skipped
from tools.referee.packed import MAX_SOURCE_BYTES
from tools.referee.rules import RULES, Finding, Table
from tools.untrusted import count, number, read_text, text

# Scored tokens of FineWeb's validation text, by tokenizer, and the bytes that merged upstream logs imply for them. They
# differ in their last tokens, for a script leaves out the end that does not fill a window.
FINGERPRINTS = {
    "byte260": (151_130_112, 151_080_111), "sp1024": (62_021_632, 151_080_363), "sp4096": (45_508_608, 151_074_052),
    "caseops": (47_851_520, 151_074_499), "sp8192": (40_540_160, 151_078_222),
}
FINEWEB_BYTES = 151_080_891  # of the whole text
SAME_TEXT = 1e-3  # relative: a window's end that was left out, and four decimals
SAME_RUN = 5e-4  # relative: one way of scoring in two logs, perhaps in four decimals
CODE = re.compile(r"\.(py[cx]?|ipynb|cc?|cpp|cuh?|h|hpp|so|o|a|dll|sh|bash|pl|rs|go|js|lua|jar|wasm|ptx|cubin|mojo)")
NO_CODE = re.compile(r"\.(md|txt|log|[ct]sv|jsonl?|toml|ya?ml|cfg|ini|png|jpe?g|svg|gif|pdf|html|diff|model|vocab)")
MODEL = re.compile(r"model|weights|checkpoint|artifact|quant", re.I)
PREPARES = re.compile(r"prepare|prep_|download|tokeniz|test_|plot|bench")  # before or after a run, unless imported
MEBIBYTES = 16 * 2**20
MAX_HELPERS = 16


def bytes_per_token(val_loss: float | None, val_bpb: float | None) -> float | None:
    """Bytes of text per scored token that a loss in nats per token and a score in bits per byte imply together."""
    return val_loss / math.log(2) / val_bpb if val_loss and val_bpb and val_loss > 0.01 else None


def problems_of_text(name: str, log: Log, expected: tuple[int, int] | None) -> tuple[list[str], list]:
    """(what is wrong with the text that a log was scored on, a row of evidence)."""
    tokens, ratio = log.val_tokens, bytes_per_token(log.val_loss, log.val_bpb)
    size = tokens * ratio if tokens and ratio else None
    row = [name, text(log.dataset), tokens, ratio, round(size) if size else None]
    if log.val_bytes:  # the kit's own logs say it
        if ratio and tokens and not abs(size / log.val_bytes - 1) <= RULES["P07"]["limit"]["relative"]:
            return [f"{name}: its loss and score imply {size:,.0f} bytes of text, it says {log.val_bytes:,}"], row
        return [], row
    if not ratio or not (expected or "fineweb" in log.dataset.lower()):
        return [], row
    if expected and tokens and not abs(tokens / expected[0] - 1) <= SAME_TEXT:
        return [f"{name}: {tokens:,} tokens and {size:,.0f} bytes were scored, with this tokenizer the validation text "
                f"has {expected[0]:,} tokens and {expected[1]:,} bytes"], row
    if size is not None and not abs(size / FINEWEB_BYTES - 1) <= SAME_TEXT:
        true_score = log.val_loss / math.log(2) * tokens / FINEWEB_BYTES
        return [f"{name}: its loss and score imply {size:,.0f} bytes of text, the validation text has "
                f"{FINEWEB_BYTES:,}; with these {log.val_bpb:.4f} would be {true_score:.4f}"], row
    if expected and not abs(ratio * expected[0] / expected[1] - 1) <= SAME_TEXT:
        return [f"{name}: its loss and score imply {ratio:.5f} bytes per token, with this tokenizer the validation "
                f"text has {expected[1] / expected[0]:.5f}"], row
    return [], row


def identity(folder: Folder) -> Finding:
    """The text that was scored, by the bytes that loss, score and tokens imply."""
    problems, rows, known, implied = [], [], False, {}
    for log in folder.logs:
        kind = next((kind for kind in ("byte260", "caseops", *FINGERPRINTS) if kind in log.dataset.lower()), "")
        wrong, row = problems_of_text(text(log.path.name), log, FINGERPRINTS.get(kind))
        problems += wrong
        rows.append(row)
        known = known or bool(row[3] and (kind or log.val_bytes or "fineweb" in log.dataset.lower()))
        if row[3]:
            implied.setdefault((log.score_line, kind), []).append((row[0], log.val_tokens, row[3]))
    for same in implied.values():
        (first, tokens, ratio), *others = same
        problems += [f"{first} and {name} were scored on different texts: {tokens} and {again} tokens, {ratio:.5f} and "
                     f"{other:.5f} bytes per token" for name, again, other in others
                     if again != tokens or not abs(other / ratio - 1) <= SAME_RUN]
    said = bytes_per_token(number(folder.said.get("val_loss")), number(folder.said.get("val_bpb")))
    logged = [row[3] for row in rows if row[3]]
    if said and logged and not any(abs(said / ratio - 1) <= SAME_TEXT for ratio in logged):
        problems.append(f"submission.json: val_loss and val_bpb imply {said:.5f} bytes per token, the logs "
                        f"{logged[0]:.5f}")
    problems += [line.removeprefix("P07 ") for line in folder.record.problems if line.startswith("P07")]
    table = Table("the text that was scored", ["log", "data", "tokens", "bytes per token", "bytes"], rows)
    if not problems and not known:
        return skipped("P07", "no log says what was scored" if not logged else "no known fingerprint of this text")
    return found("P07", f"{len(logged)} log(s) agree on the text", problems, [], [table])


def calibration_seconds(log: Log) -> float:
    """Seconds of work on the weights after the last step; a line that says done has counted the lines before it."""
    done = [seconds for line, seconds in log.calibration.items() if re.search(r"\bdone\b", line)]
    return max([*done, sum(log.calibration.values()) - sum(done)])


def train_clock(folder: Folder) -> Finding:
    """Training as the logs time it, and what they do with the weights after it."""
    cap, problems, holds, rows = RULES["P10"]["limit"]["cap_seconds_10min_16mb"], [], [], []
    for log in folder.logs:
        name, timed = text(log.path.name), [point.seconds for point in log.points if point.seconds is not None]
        stop = number((log.result or {}).get("train_seconds")) or log.stop_seconds or max(timed, default=None)
        after = calibration_seconds(log)
        rows.append([name, log.cap_seconds, stop, after, (stop or 0.0) + after])
        if log.cap_seconds is not None and not 0 < log.cap_seconds <= cap:
            problems.append(f"{name}: its cap is {log.cap_seconds:g} s, the track's {cap:g} s")
        if stop is not None and stop > cap:
            problems.append(f"{name}: training stops after {stop:.3f} s, {stop - cap:.3f} s late")
        if stop is not None and after and stop + after > cap:
            line = text(max(log.calibration, key=log.calibration.get))[:60]
            problems.append(f"{name}: {stop:.3f} s of training and {after:.1f} s of calibration ({line}) are "
                            f"{stop + after - cap:.1f} s over")
        if log.lifted_cap:
            problems.append(f"{name}: {text(log.lifted_cap)} lets it run on past its cap")
    for file in (file for file in folder.record.files if file.name.lower().startswith("readme")):
        if said := re.search(r"\bFORCE_?STOP\w{0,20}=[1-9]\d{0,9}", read_text(file, [], MAX_SOURCE_BYTES)):
            problems.append(f"{folder.named(file)} runs it with {said[0]}, past its cap")
    if found_in := re.search(r"\b\w{0,20}FORCE_?STOP\w{0,20}", folder.code.text):
        holds.append(f"{folder.named(folder.script)} has a setting {found_in[0]}: the cap is no setting")
    table = Table("training time", ["log", "cap, s", "stop, s", "calibration, s", "together, s"], rows)
    slowest = max((row[4] for row in rows), default=0.0)
    if not folder.is_ten_minutes:
        return found("P10", f"{slowest:.1f} s logged; track {folder.track or 'not stated'}, no cap", [], [], [table])
    if not slowest and not problems:
        return skipped("P10", "no log says when training stopped")
    detail = f"{slowest:.3f} of {cap:g} s with calibration, the longest of {len(rows)} log(s)"
    return found("P10", detail, problems, holds, [table])


def eval_clock(folder: Folder) -> Finding:
    """The longest way of scoring of every log, with the compiling that its own timer left out."""
    cap, problems, rows = RULES["P11"]["limit"]["seconds_10min_16mb"], [], []
    for log in folder.logs:
        seconds = log.eval_seconds | {"result": number((log.result or {}).get("score_seconds")) or 0.0}
        line = max(seconds, key=seconds.get)
        both = seconds[line] + log.compile_seconds
        rows += [[text(log.path.name), line, seconds[line], log.compile_seconds, both]] if both else []
        if folder.is_ten_minutes and both > cap:
            late = f" and {log.compile_seconds:.1f} s of compiling before its timer" if log.compile_seconds else ""
            problems.append(f"{text(log.path.name)}: {seconds[line]:.1f} s of {text(line)}{late}, {both - cap:.1f} s "
                            "over")
    table = Table("scoring time", ["log", "line", "timed, s", "compiling, s", "together, s"], rows)
    slowest = max((row[4] for row in rows), default=0.0)
    if not folder.is_ten_minutes:
        return found("P11", f"{slowest:.1f} s logged; track {folder.track or 'not stated'}, no cap", [], [], [table])
    if not rows:
        return skipped("P11", "no log says how long scoring took")
    return found("P11", f"{slowest:.1f} of {cap:g} s, say {len(rows)} log(s)", problems, [], [table])


def wrapper(folder: Folder) -> Finding:
    """What the script says once it is unpacked, without running it."""
    if folder.script is None:
        return skipped("P13", "there is no script")
    code, name = folder.code, folder.named(folder.script)
    table = Table(f"layers of {name}", ["how", "letters", "lines"],
                  [[how, len(source), source.count("\n") + 1] for how, source in code.layers])
    unpacked = f"unpacks to {len(code.layers[-1][1]):,} letters" if len(code.layers) > 1 else "is readable"
    return found("P13", f"{name} {unpacked}", [f"{name}, {problem}" for problem in code.problems], [], [table])


def kinds_of_files(folder: Folder) -> dict[Path, str]:
    """What each file is: script, code, model, other or "" for one that is neither code nor weights."""
    kinds = {}
    for file in folder.record.files:
        suffix, executable = file.suffix.lower(), file.stat().st_mode & 0o111
        if file == folder.script:
            kinds[file] = "script"
        elif CODE.fullmatch(suffix) or (executable and not NO_CODE.fullmatch(suffix)):
            kinds[file] = "code"
        elif suffix and not NO_CODE.fullmatch(suffix) and not file.name.startswith("."):
            kinds[file] = "model" if MODEL.search(file.name) else "other"
    return kinds


def names_in(source: str) -> set[str]:
    """The names of files that a program may open, outside its comments, and of the modules that it imports as files."""
    source = re.sub(r"^[ \t]*#.*", "", source, flags=re.M)
    imported = re.findall(r"^[ \t]*(?:from|import)[ \t]+([^\n]*)", source, re.M)
    modules = {f"{word}.py" for line in imported for word in re.findall(r"\w+", line)}
    words = {word.strip(".") for word in re.findall(r"[\w.+-]{1,255}", source)}
    return modules | {word for word in words if not PREPARES.search(word)}


def reached(folder: Folder, files: list[Path]) -> set[Path]:
    """The files that the script names, or that those name which it names; at most MAX_HELPERS are looked into."""
    seen, waiting = set(), [folder.code.text]
    while waiting and len(seen) < MAX_HELPERS:
        names = names_in(waiting.pop())
        new = [file for file in files if file.name in names and file not in seen]
        seen.update(new)
        waiting += [read_text(file, [], MAX_SOURCE_BYTES) for file in new[:MAX_HELPERS]]
    return seen


def model_bytes(folder: Folder, kinds: dict[Path, str]) -> int | None:
    """The largest model, as logs or submission.json state it or as it lies on disk."""
    on_disk = [file.stat().st_size for file, kind in kinds.items() if kind == "model"]
    logged = [log.bytes_model or (log.bytes_total or 0) - (log.bytes_code or 0) for log in folder.logs]
    stated = [count(value) or 0 for key, value in folder.said.items() if key.startswith("bytes_model")]
    if not any([*on_disk, *logged, *stated]) and folder.record.bytes_total and folder.record.bytes_code:
        stated.append(folder.record.bytes_total - folder.record.bytes_code)
    return max([*on_disk, *logged, *stated], default=0) or None


def size(folder: Folder) -> Finding:
    """What ships, file by file, against the cap and against what logs and submission.json state."""
    cap, kinds, record, problems, holds = RULES["P12"]["limit"]["bytes"], kinds_of_files(folder), folder.record, [], []
    others = [file for file, kind in kinds.items() if kind in ("code", "other")]
    used, model = reached(folder, others), model_bytes(folder, kinds)
    bytes_of = {file: file.stat().st_size for file in kinds}
    code = sum(bytes_of[file] for file in kinds if kinds[file] == "script" or file in used)
    total, unused = code + (model or 0), sum(bytes_of[file] for file in others if file not in used)
    rows = [[folder.named(file), kinds[file], bytes_of[file], "no" if file in others and file not in used else "yes"]
            for file in sorted(kinds, key=bytes_of.get, reverse=True)]
    logged = max([log.bytes_total or 0 for log in folder.logs], default=0)
    largest = max(logged, record.bytes_total or 0)
    if max(total, largest) > cap:
        ships = f"{total:,} bytes ship ({code:,} of code, {model:,} of model)" if total > cap and model else ""
        states = f"{largest:,} bytes are stated" if largest and largest != total else ""
        mebibytes = "; the cap is in megabytes, not in MiB" if max(total, largest) <= MEBIBYTES else ""
        problems.append(f"{' and '.join(filter(None, (ships, states)))}, {max(total, largest) - cap:,} over the cap"
                        f"{mebibytes}")
    elif total + unused > cap:
        holds.append(f"{total + unused:,} bytes with files that the script does not name, {total + unused - cap:,} "
                     "over the cap; a judge has to see which of them runs")
    for log in folder.logs if folder.script else ():
        if log.bytes_code and log.bytes_code != code:
            line = f"{text(log.path.name)}: {log.bytes_code:,} bytes of code in the log, {code:,} on disk"
            (problems if log.bytes_code < code else holds).append(line)
    said = count(folder.said.get("bytes_total"))
    if said and logged > said:
        problems.append(f"submission.json: bytes_total is {said:,}, the largest log says {logged:,}")
    problems += [line.removeprefix("P12 ") for line in record.problems if "a link, a pipe or a device" in line]
    if not (model or largest) and not problems:
        return skipped("P12", f"{code:,} bytes of code; nothing says how large the model is")
    return found("P12", f"{max(total, logged):,} of {cap:,} bytes", problems, holds, [Table(
        "files that are code or data", ["file", "kind", "bytes", "counted"], rows[:200])])
