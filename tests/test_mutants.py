"""The referee's test of itself: for every rule it catches one cheating submission, and honest ones fail nothing."""

import pytest

from tests.mutants import all_mutants, swap
from tools.referee import selftest
from tools.referee.rules import RULES

ALL = all_mutants()
FIRST = {mutant.rule: name for name, mutant in reversed(ALL.items()) if mutant.rule}  # one for every rule
HONEST = [name for name, mutant in ALL.items() if not mutant.rule]


def test_every_rule_about_submissions_has_a_mutant():
    assert set(FIRST) == {rule for rule, about in RULES.items() if about["needs"] != "self-test"}


def test_six_honest_submissions_look_like_cheats():
    assert len(HONEST) >= 6


def test_a_mutant_that_no_longer_fits_the_kit_is_noticed():
    with pytest.raises(AssertionError, match="0 times"):
        swap("a line", "another line", "")


def test_an_unknown_mutant_is_named():
    with pytest.raises(ValueError, match="there is no mutant nobody"):
        list(selftest.run(["nobody"], [0], 1, print))


@pytest.fixture(scope="module")
def rows() -> dict[str, selftest.Row]:
    return {row.name: row for row in selftest.run([*FIRST.values(), *HONEST], [0], 2, lambda line: None, alone=True)}


@pytest.mark.parametrize("rule", FIRST)
def test_self_test_catches_a_cheat_by(rows, rule):
    row = rows[FIRST[rule]]
    assert row.verdict == "caught" and row.example


@pytest.mark.parametrize("name", HONEST)
def test_self_test_passes_the_honest(rows, name):
    assert rows[name].verdict == "passes", rows[name].example


def test_the_table_says_what_was_found(rows):
    table = selftest.table(list(rows.values()))
    assert table.count("caught (1 of 1)") == len(FIRST) and table.count("passes") == len(HONEST)
