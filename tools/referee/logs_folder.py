"""A record folder of any origin as the rules of tools.referee.logs_only see it, each of its files read once."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from tools.logs import Log
from tools.records import MAX_JSON_BYTES, Record, read_record
from tools.referee.packed import Script, read_script
from tools.referee.rules import RULES, Finding, Table
from tools.untrusted import load_json, read_bytes, read_text, text

NOT_THE_SCRIPT = re.compile(r"decode|readable|translate|unpack|minif|prepare|prep_|download|tokeniz|test_|plot|bench")


@dataclass
class Folder:
    """A record folder after reading."""

    path: Path
    record: Record
    said: dict  # submission.json, or {}
    track: str  # 10min_16mb, another, or "" if nothing says it
    script: Path | None = None
    code: Script = field(default_factory=Script)

    @property
    def logs(self) -> list[Log]:
        return self.record.logs

    @property
    def is_ten_minutes(self) -> bool:
        return "10min" in self.track

    def named(self, file: Path) -> str:
        return text(file.relative_to(self.path).as_posix())


def read_folder(path: Path) -> Folder:
    """Returns what the rules look at, each file read once."""
    path = Path(path).absolute()
    record = read_record(path)
    own = next((file for file in record.files if file == path / "submission.json"), None)
    value, _ = load_json(read_text(own, [], MAX_JSON_BYTES)) if own else (None, "")
    said = value if isinstance(value, dict) else {}
    track = path.parent.name.removeprefix("track_") if path.parent.name.startswith("track_") else ""
    folder = Folder(path, record, said, track or text(said.get("track")))
    scripts = [file for file in record.files if file.suffix == ".py" and file.parent == path]
    scripts.sort(key=lambda file: (file.name != "train_gpt.py", bool(NOT_THE_SCRIPT.search(file.name)),
                                   not file.name.startswith("train"), file.name))
    folder.script = next(iter(scripts), None)
    if folder.script:
        folder.code = read_script(read_bytes(folder.script, []))
    return folder


def found(rule: str, detail: str, problems: list[str], holds: list[str] | None = None,
          evidence: list[Table] | None = None) -> Finding:
    """Returns a finding: FAIL if there are problems, else HOLD if a person must look, else PASS."""
    open_ones = [*problems, *(holds or [])]
    status = "FAIL" if problems else "HOLD" if holds else "PASS"
    shown = [table for table in evidence or [] if table.rows]
    return Finding(rule, RULES[rule]["title"], status, detail, open_ones[:30], shown,
                   RULES[rule]["fix"] if open_ones else "")


def skipped(rule: str, why: str) -> Finding:
    return Finding(rule, RULES[rule]["title"], "SKIP", why)
