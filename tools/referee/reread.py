"""The verdict of a filed record as its files are now: the board does not believe what a record says of itself."""

import tools.referee.parts  # noqa: F401  registers the rules
from tools.records import Record
from tools.referee.case import Case
from tools.referee.rules import RULES, Finding, judge

CHANGED = "unverified (changed since)"


def reasons(findings: list[Finding], status: str) -> list[str]:
    """What the rules of this status found, as a verdict keeps it."""
    return [f"{one.rule} {one.title}: {problem}"
            for one in findings if one.status == status for problem in one.problems]


def reread(record: Record) -> None:
    """Checks the file rules of one of the kit's own records again and corrects its verdict.

    Another's, whose logs have no config or result line, cannot have passed: a pass that it claims becomes unverified.
    """
    if not any(log.config or log.result is not None for log in record.logs):
        record.verdict = "unverified" if record.verdict == "pass" else record.verdict
        return
    case = Case(record.path)
    said = case.submission.get("verdict")
    stored = said if isinstance(said, dict) else {}
    known = stored.get("record_sha256", "")
    unchanged = known in ("", case.record_sha256)  # older verdicts have no hash
    accepted = stored.get("accepted") if known == case.record_sha256 else None
    waived = accepted if isinstance(accepted, dict) else {}  # a judge has looked; what fails nobody can accept
    found = [judge(case, rule) for rule, about in RULES.items() if about["needs"] == "files"]
    failed, held = reasons(found, "FAIL"), reasons([one for one in found if one.rule not in waived], "HOLD")
    before, said_before = record.verdict, record.verdict_reasons
    if before in ("pass", "hold") and not unchanged:
        record.verdict, said_before = CHANGED, []
    if failed or (held and before != "fail"):
        record.verdict = "fail" if failed else "hold"
        kept = said_before if before == record.verdict else []
        record.verdict_reasons = list(dict.fromkeys((failed or held) + kept))
