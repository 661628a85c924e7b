"""The rules as people read them: complete, numbered, and never other than what the referee uses."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

from tools.referee.rules import RULES
from tools.rules import TEXTS, main, words

FAILURES = json.loads((ROOT / "tools/failures.json").read_text(encoding="utf-8"))
PAGE = (ROOT / "records/RULES.md").read_text(encoding="utf-8")


@pytest.fixture
def copies(tmp_path: Path) -> list[str]:
    """Options that name copies of the files, free to be changed."""
    for file in ("tools/rules.json", "tools/failures.json", "records/RULES.md"):
        shutil.copy(ROOT / file, tmp_path)
    return [word for option, file in (("--rules", "rules.json"), ("--failures", "failures.json"), ("--out", "RULES.md"))
            for word in (option, str(tmp_path / file))]


def change(path: Path, edit: Callable[[list], object]) -> None:
    value = json.loads(path.read_text(encoding="utf-8"))
    edit(value)
    path.write_text(json.dumps(value), encoding="utf-8")


def test_page_of_rules_is_up_to_date(capsys):
    assert main(["--check"]) == 0, capsys.readouterr().out


def test_rules_are_numbered_from_one_without_a_gap():
    assert list(RULES) == [f"P{number:02}" for number in range(1, len(RULES) + 1)]


@pytest.mark.parametrize("rule", RULES)
def test_rule_has_every_text_as_a_sentence_of_a_line(rule):
    for key in TEXTS:
        found = RULES[rule][key]
        assert isinstance(found, str) and found == " ".join(found.split()) and len(found) > 2, key
        assert len(found) < 420, f"{key} is too long to be read"


@pytest.mark.parametrize("rule", RULES)
def test_case_of_a_rule_names_where_it_happened(rule):
    assert re.search(r"#\d+", RULES[rule]["case"])


def test_every_failure_is_named_by_a_rule_and_every_named_failure_is_known():
    assert {failure for rule in RULES.values() for failure in rule["failures"]} == set(FAILURES)
    assert list(FAILURES) == [f"R{number:02}" for number in range(1, 27)]


def test_page_shows_every_number_of_every_limit():
    sections = re.split(r"^### ", PAGE, flags=re.M)[1:]
    for rule, section in zip(RULES.values(), sections, strict=True):
        assert section.startswith(f"{rule['id']} {rule['title']}\n")
        assert all(words(value) in section for value in (rule["limit"] or {}).values())


def test_every_label_of_the_page_leads_somewhere():
    targets = dict(re.findall(r"^\[([^\]]+)\]: (\S+)$", PAGE, re.M))
    code = re.sub(r"```.*?```|`[^`]*`", "", PAGE, flags=re.S)
    assert set(re.findall(r"(?<!\[)\[([^\]\[]+)\](?![(:\]])", code)) == set(targets)
    anchors = {"#" + re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-")
               for heading in re.findall(r"^#+ (.*)$", PAGE, re.M)}
    inside = {target for target in [*targets.values(), *re.findall(r"\]\((\S+?)\)", code)] if target.startswith("#")}
    assert inside <= anchors and len(inside) >= len(RULES)


@pytest.mark.parametrize(("value", "expected"), [
    (16_000_000, "16,000,000"), (600.0, "600"), (0.25, "0.25"), (1e-05, "0.00001"), (1e-09, "1e-9"), (0.0, "0"),
])
def test_a_limit_is_written_as_people_write_it(value, expected):
    assert words(value) == expected


CHANGES = {
    "a limit": ("rules.json", lambda rules: rules[0]["limit"].update(nats=0.5), "0.5 nats"),
    "a text": ("rules.json", lambda rules: rules[4].update(why="Because."), "Because."),
    "a failure": ("failures.json", lambda names: names.update(R01="something else"), "something else"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_check_notices_a_change_of(copies, tmp_path, capsys, what):
    file, edit, expected = CHANGES[what]
    assert main([*copies, "--check"]) == 0
    change(tmp_path / file, edit)
    capsys.readouterr()
    assert main([*copies, "--check"]) == 1
    said = capsys.readouterr().out
    assert "out of date" in said and "python -m tools.rules" in said and said.count("\n") == 1
    assert (tmp_path / "RULES.md").read_text(encoding="utf-8") == PAGE
    assert main(copies) == 0 and main([*copies, "--check"]) == 0
    assert expected in (tmp_path / "RULES.md").read_text(encoding="utf-8")


def test_check_notices_an_edit_by_hand(copies, tmp_path):
    (tmp_path / "RULES.md").write_text(PAGE.replace("fail", "pass", 1), encoding="utf-8")
    assert main([*copies, "--check"]) == 1


REFUSED = {
    "P03 has no 'why'": ("rules.json", lambda rules: rules[2].update(why="")),
    "write a {name} for each number": ("rules.json", lambda rules: rules[1]["limit"].update(tokens=3)),
    "names R99": ("rules.json", lambda rules: rules[0]["failures"].append("R99")),
    "no rule of tools/rules.json is against R27": ("failures.json", lambda names: names.update(R27="new")),
    "needs 'luck'": ("rules.json", lambda rules: rules[0].update(needs="luck")),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_incomplete_rules_are_refused_in_one_line(copies, tmp_path, capsys, sentence):
    file, edit = REFUSED[sentence]
    change(tmp_path / file, edit)
    assert main(copies) == 1
    said = capsys.readouterr().out
    assert sentence in said and said.count("\n") == 1
    assert (tmp_path / "RULES.md").read_text(encoding="utf-8") == PAGE
