"""Records of the kit on the board: the rules on their files are checked again, whatever verdict they state."""

import json
import shutil
from pathlib import Path

import pytest
from test_leaderboard import add
from test_record import filed_record

from tools.board import page
from tools.leaderboard import read_records, sections, table
from tools.referee.case import Case
from tools.referee.rules import RULES


@pytest.fixture
def filed(data, workshop, tmp_path) -> Path:
    """A record of the kit in a folder of records, free to be spoilt."""
    record = filed_record(data, workshop)
    return Path(shutil.copytree(record, tmp_path / "records" / record.parent.name / record.name))


def board_of(folder: Path) -> str:
    return table(sections(read_records(folder.parent.parent)), folder)


def page_of(folder: Path) -> str:
    return page(sections(read_records(folder.parent.parent)), str)


def change_submission(folder: Path, **changes: object) -> None:
    path = folder / "submission.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_verdict(folder: Path, status: str, **more: object) -> None:
    """Stores the verdict that a judge gives the record as it is."""
    said = {"status": status, "reasons": [], "record_sha256": Case(folder).record_sha256}
    change_submission(folder, verdict=said | more)


def spoil_the_statistics(folder: Path) -> None:
    change_submission(folder, val_bpb_std=0.0)


def cut_the_result(folder: Path) -> None:
    for log in folder.glob("logs/*.log"):
        *lines, last = log.read_text().splitlines()
        result = {key: value for key, value in json.loads(last.removeprefix("result:")).items() if key != "python"}
        log.write_text("\n".join([*lines, "result:" + json.dumps(result)]))


def move_the_logs(folder: Path) -> None:
    for log in list(folder.glob("logs/*.log")):
        log.rename(folder / log.name)


@pytest.mark.parametrize(
    ("spoil", "rule"),
    [(spoil_the_statistics, "P17 statistics"), (cut_the_result, "P16 logs"), (move_the_logs, "P14 layout")],
)
@pytest.mark.parametrize("status", ["pass", "hold", "fail", "unverified"])
def test_record_of_the_kit_that_fails_a_file_rule_is_not_ranked_whatever_it_says(filed, spoil, rule, status):
    spoil(filed)
    change_verdict(filed, status, accepted={rule: "fine" for rule in RULES})
    board = board_of(filed)
    assert board.startswith("### Not ranked") and f"failed verification: {rule}" in board and ", fail: " in board


def test_reasons_of_a_judge_are_kept_beside_those_of_the_files(filed):
    spoil_the_statistics(filed)
    change_verdict(filed, "fail", reasons=["P03 normalised: sums to 277"])
    assert "P03 normalised: sums to 277" in board_of(filed) and "P17 statistics" in board_of(filed)


def test_record_that_changed_since_its_verdict_is_unverified(filed):
    change_verdict(filed, "pass")
    assert board_of(filed).endswith(", pass |")
    change_submission(filed, blurb="Other words.")
    assert board_of(filed).endswith(", unverified (changed since) |")
    words = page_of(filed)
    assert 'class="chip unverified"' in words and ">unverified (changed since)<" in words


def test_record_that_failed_stays_failed_when_it_changes(filed):
    change_verdict(filed, "fail", reasons=["P03 normalised: sums to 277"])
    change_submission(filed, blurb="Other words.")
    assert "failed verification: P03 normalised: sums to 277" in board_of(filed)


def test_verdict_of_older_records_without_a_hash_is_shown_if_the_files_agree(filed):
    change_submission(filed, verdict={"status": "pass", "reasons": []})
    assert board_of(filed).endswith(", pass |")


def test_held_record_is_shown_apart_until_a_judge_accepts_it(filed, monkeypatch):
    monkeypatch.setitem(RULES["P25"]["limit"], "val_bpb", 99.0)
    change_submission(filed, verdict={"status": "pass", "reasons": [], "accepted": {"P25": "says a stranger"}})
    board = board_of(filed)
    assert "### Held for a judge" in board and "P25 plausible" in board and "### Not ranked" not in board
    assert "<h3>Held for a judge</h3>" in page_of(filed)
    change_verdict(filed, "pass", accepted={"P25": "another kind of text"})
    assert "### Held" not in board_of(filed)
    change_submission(filed, blurb="Other words.")
    assert "### Held for a judge" in board_of(filed)


def test_record_held_by_a_judge_is_shown_between_the_ranked_and_the_failed(filed, tmp_path):
    change_verdict(filed, "hold", reasons=["P01 causality: look at target 7"])
    said = json.loads((filed / "submission.json").read_text())
    same_text = {key: said[key] for key in ("dataset", "val_bytes")}
    add(tmp_path, "2026-11-22_good", said["val_bpb"] + 0.01, **same_text, track=filed.parent.name)
    add(tmp_path, "2026-11-22_leak", 0.9, **same_text, verdict={"status": "fail", "reasons": ["P01"]})
    for board, marks in ((board_of(filed), ["| good", "### Held", "look at target 7", "### Not ranked", "[leak]"]),
                         (page_of(filed), [">good<", "<h3>Held", "look at target 7", "<h3>Not ranked", ">leak<"])):
        places = [board.index(mark) for mark in marks]
        assert places == sorted(places)
