"""The verdict of a filed record as its files are now: the board does not believe what a record says of itself."""

import tools.referee.parts  # noqa: F401
from tools.records import Record
from tools.referee.case import RESULT, Case, mistyped
from tools.referee.rules import RULES, judge


def reread(record: Record) -> None:
    """Checks the file rules of one of the kit's own records again and corrects its verdict.

    Another's, whose logs have no whole result line, cannot have passed: a pass that it claims becomes unverified."""
    case = Case(record.path)
    if all(mistyped(log.result, RESULT) for log in case.logs):
        record.verdict = "unverified" if record.verdict == "pass" else record.verdict
        return
    said = case.submission.get("verdict")
    stored = said if isinstance(said, dict) else {}
    unchanged = stored.get("record_sha256", case.record_sha256) == case.record_sha256  # older verdicts have no hash
    accepted = stored.get("accepted") if unchanged and isinstance(stored.get("accepted"), dict) else {}
    found = [judge(case, rule) for rule, about in RULES.items() if about["needs"] == "files"]
    for status, verdict in (("FAIL", "fail"), ("HOLD", "hold")):
        wrong = [finding for finding in found if finding.status == status and finding.rule not in accepted]
        if wrong and record.verdict != "fail":
            record.verdict = verdict
            record.verdict_reasons = [f"{one.rule} {one.title}: {problem}" for one in wrong for problem in one.problems]
    if record.verdict in ("pass", "hold") and not unchanged:
        record.verdict = "unverified"
        record.notes.append("changed since it was verified")
