"""A pull request that files a record: what it may change, what the referee says, and the workflow that runs this."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from test_record import filed_record

from tools.leaderboard import BEGIN, END
from tools.submitted import main

TRACK = "records/track_non_record_16mb"
OLD, NEW = f"{TRACK}/2026-01-01_old", f"{TRACK}/2026-02-02_new"
README = f"# Kit\n{BEGIN}\nempty\n{END}\nthe rest\n"


def git(*words: str) -> str:
    return subprocess.run(["git", *words], check=True, capture_output=True, text=True).stdout


def write(path: str, words: str = "words") -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(words)


def commit() -> None:
    git("add", "--all")
    git("commit", "--quiet", "--message", "changes")


@pytest.fixture(autouse=True)
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder is a repository with one record on main and a branch that has added nothing yet."""
    for name in [name for name in os.environ if name.startswith("GIT")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    root = tmp_path / "repository"
    root.mkdir()
    monkeypatch.chdir(root)
    git("init", "--quiet", "--initial-branch", "main")
    git("config", "user.name", "Ada")
    git("config", "user.email", "ada@example.org")
    write("README.md", README)
    write("tools/verify.py", "raise SystemExit('the branch has its own tools')")
    write(f"{OLD}/README.md")
    write("records/RULES.md")
    commit()
    git("checkout", "--quiet", "-b", "branch")
    return root


def submitted(*options: str) -> int:
    return main(["--base", "main", *options])


def test_branch_without_a_record_passes_and_says_so(capsys):
    write("architectures/idea.py")
    write("records/RULES.md", "other words")
    write("records/studies/one/README.md")
    commit()
    assert submitted() == 0
    assert "no record in this pull request" in capsys.readouterr().out


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "two records": (lambda: (write(f"{NEW}/README.md"), write(f"{NEW}er/README.md")),
                    f"adds 2 records: {NEW}, {NEW}er; file one at a time"),
    "a change of another's record": (lambda: write(f"{OLD}/README.md", "mine"), f"changes {OLD}/README.md, which bel"),
    "a deletion": (lambda: os.remove(f"{OLD}/README.md"), f"deletes {OLD}/README.md, which belongs"),
    "a file in another's record": (lambda: write(f"{OLD}/logs/more.log"), f"adds {OLD}/logs/more.log, which belongs"),
    "a record that moves": (lambda: git("mv", OLD, NEW), f"deletes {OLD}/README.md, which belongs"),
    "a record without a track": (lambda: write("records/2026-02-02_new/README.md"), "lies in no records/<track>/"),
    "a record in a track of its own": (lambda: write("records/track_fast/2026-02-02_new/README.md"), "tracks are"),
    "a file beside the records": (lambda: write(f"{TRACK}/README.md"), f"adds {TRACK}/README.md, which lies in no"),
    "a link as a record": (lambda: os.symlink("2026-01-01_old", NEW), f"adds {NEW}, which lies in no"),
    "a track that becomes a link": (lambda: (shutil.rmtree(TRACK), os.symlink("/tmp", TRACK)), "adds no new folder"),
    "a verdict that it brings": (lambda: write(f"{NEW}/submission.json", '{"verdict": {"status": "pass"}}'),
                                 "brings a verdict of its own"),
    "a name of control characters": (lambda: write(f"{TRACK}/a\nFAIL \x1b[2J\tb\udcff"), "which lies in no"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_pull_request_is_refused_for(what, capsys):
    spoil, sentence = REFUSED[what]
    spoil()
    commit()
    assert submitted() == 1
    lines = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert any(line.startswith("FAIL  the pull request ") and sentence in line for line in lines)
    assert lines[-1].startswith("FAIL: ") and all(line.isprintable() for line in lines)


def test_files_outside_are_refused_beside_one_record_but_for_the_board(capsys):
    write(f"{NEW}/README.md")
    write("README.md", README.replace("empty", "| a | row |"))
    write("tools/verify.py", "print('pass')")
    os.symlink("/etc/passwd", f"{NEW}/weights.txt")
    commit()
    assert submitted() == 1
    out = capsys.readouterr().out
    assert "FAIL  the pull request changes tools/verify.py, which is outside the record's folder" in out
    assert f"adds {NEW}/weights.txt, which is a link" in out
    assert "README.md outside" not in out
    write("README.md", README.replace("rest", "best"))
    commit()
    assert submitted() == 1
    assert "changes README.md outside the leaderboard's table" in capsys.readouterr().out


def test_long_lists_of_files_are_cut_short(capsys):
    for number in range(100):
        write(f"{TRACK}/{number}")
    commit()
    assert submitted() == 1
    out = capsys.readouterr().out
    assert "and 80 more of this kind" in out and out.count("FAIL  the pull request adds ") == 21


def test_record_that_is_not_one_fails_by_its_rules_and_nothing_of_a_stranger_is_markup(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    (tmp_path / "summary.md").write_text("before\n")
    write(f"{NEW}/<img src=x> | `a`.exe")
    commit()
    assert submitted() == 1
    summary = (tmp_path / "summary.md").read_text()
    assert summary.startswith("before\n## Record check: FAIL\n") and "FAIL  P14 layout" in capsys.readouterr().out
    assert "<img" not in summary and re.search(r"^\| \*\*FAIL\*\* \| P12 size \| .*&lt;img", summary, re.M)
    assert all(line.replace("\\|", "").count("|") == 5 for line in summary.splitlines() if line.startswith("|"))


def test_honest_record_passes_by_the_kits_own_referee(data, workshop, tmp_path, monkeypatch, capsys):
    filed = filed_record(data, workshop)
    shutil.copytree(filed, f"{TRACK}/{filed.name}")
    commit()
    git("checkout", "--quiet", "main")
    write("later.txt")
    commit()
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    status = main(["--base", "main", "--head", "branch", "--html", str(tmp_path / "report.html")])
    summary = (tmp_path / "summary.md").read_text()
    assert status == 0, summary
    rows = re.findall(r"^\| \**(\w+)\** \| (P\d\d) ", summary, re.M)
    assert {"P12", "P14", "P17"} <= {rule for found, rule in rows if found == "PASS"}
    assert "FAIL" not in summary and filed.name in summary
    assert ("This is not a verdict" in summary) == any(found == "SKIP" for found, _ in rows)
    assert filed.name in (tmp_path / "report.html").read_text()
    assert git("worktree", "list").count("\n") == 1 and git("status", "--porcelain") == ""


def test_wrong_usage_is_told_in_one_sentence(capsys, tmp_path, monkeypatch):
    assert submitted("--head", "no-such-branch") == 2
    assert "no-such-branch is no commit" in capsys.readouterr().err
    assert main(["--base=--output=x"]) == 2 and not Path("x").exists()
    git("checkout", "--quiet", "--orphan", "other")
    write("other")
    commit()
    assert submitted() == 2
    assert "have no common commit" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert submitted() == 2
    assert "not a git repository" in capsys.readouterr().err


def workflow() -> dict:
    return yaml.safe_load((ROOT / ".github/workflows/record.yml").read_text())


def test_workflow_has_no_rights_and_runs_for_pull_requests_on_records():
    found = workflow()
    assert found[True] == {"pull_request": {"paths": ["records/**"]}}  # YAML reads `on` as true
    assert found["permissions"] == {"contents": "read"}
    assert "secrets" not in json.dumps(found)
    for step in found["jobs"]["check"]["steps"]:
        assert "${{" not in step.get("run", ""), "a branch's name in a shell command could be a command"
    assert set(re.findall(r"\${{ (.*?) }}", json.dumps(found))) == {
        f"github.event.pull_request.{field}" for field in ("number", "base.sha", "head.sha")}


def test_workflow_judges_by_the_tools_of_the_base(tmp_path):
    commands = [step["run"] for step in workflow()["jobs"]["check"]["steps"] if "run" in step]
    commands = [command for command in commands if not re.search(r"\b(pip|apt-get)\b", command)]
    assert any("python -m tools.submitted " in command for command in commands)
    base = git("rev-parse", "main").strip()
    write("records/notes.txt")
    commit()
    environment = os.environ | {"BASE": base, "HEAD": git("rev-parse", "branch").strip(), "PYTHONPATH": str(ROOT)}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{environment['PATH']}"}
    shutil.rmtree("tools")  # the workflow's own checkout has the kit's tools; here they come from PYTHONPATH
    git("rm", "-r", "--quiet", "--cached", "tools")
    commit()
    done = subprocess.run(["bash", "-e", "-c", "\n".join(commands)], env=environment, capture_output=True, text=True)
    assert git("rev-parse", "HEAD").strip() == base
    assert done.returncode == 1 and "adds records/notes.txt, which lies in no" in done.stdout, done.stderr


@pytest.mark.parametrize("form", ["dispute.yml", "rule.yml"])
def test_issue_form_asks_for_what_a_judge_needs(form):
    found = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE" / form).read_text())
    assert found["name"] and found["description"]
    assert {"rule"} <= {field["id"] for field in found["body"] if field.get("validations", {}).get("required")}


def test_pull_request_template_asks_for_what_the_referee_cannot_see():
    words = (ROOT / ".github/pull_request_template.md").read_text()
    assert all(word in words for word in ("python -m tools.verify FOLDER --pre", "Every run", "records/RULES.md"))
