"""The referee's page: every rule has its place, all evidence is there, and strangers' words stay words."""

import math
import re
from html.parser import HTMLParser

import pytest

from tools.referee.report import page
from tools.referee.rules import RULES, Finding, Table

EVIL = '<script>alert("x")</script>'
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Balanced(HTMLParser):
    """Notes the tags, their ids, and whether each is closed in its turn."""

    def __init__(self):
        super().__init__()
        self.stack, self.tags, self.ids, self.wrong = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        self.stack += [] if tag in VOID else [tag]

    def handle_endtag(self, tag):
        if not self.stack or self.stack.pop() != tag:
            self.wrong.append(tag)


def findings(status: str = "PASS", words: str = "fine", **more: object) -> list[Finding]:
    rows = [[words, 1234567, 0.123456789, None, True]] * 3
    table = Table(words, ["what", "position", "nats moved", "nothing", words], more.pop("rows", rows))
    problems = [words] if status in ("FAIL", "HOLD") else []
    return [Finding(rule, about["title"], status, words, problems, [table], words, **more)
            for rule, about in RULES.items() if about["needs"] != "self-test"]


def about(words: str = "fine", status: str = "pass") -> dict:
    return {"record": words, "name": words, "author": words, "val_bpb": 1.25, "status": status, "reasons": [words],
            "date": "2026-11-25", "verified_with": {words: words}}


def parsed(html: str) -> Balanced:
    parser = Balanced()
    parser.feed(html)
    assert not parser.wrong and not parser.stack
    return parser


@pytest.mark.parametrize("status", ["PASS", "FAIL", "HOLD", "SKIP"])
def test_page_has_a_place_for_every_rule(status):
    found = parsed(page(about(), findings(status)))
    assert set(found.ids) == {rule for rule, about in RULES.items() if about["needs"] != "self-test"}


def test_page_shows_the_evidence():
    html = page(about(), findings())
    assert "1,234,567" in html and "0.123457" in html and "nats moved" in html and "1.250000 bits per byte" in html


def test_page_keeps_strangers_words_as_words():
    html = page(about(EVIL), findings("FAIL", EVIL))
    assert EVIL not in html and "&lt;script&gt;" in html
    assert "script" not in parsed(html).tags


def test_page_prints_what_is_no_number():
    rows = [["a", math.nan, math.inf, -math.inf, 10**30]]
    html = page(about(), findings(rows=rows))
    assert "nan" in html and "inf" in html
    parsed(html)


def test_page_folds_long_tables():
    rows = [[str(i), i, 0.5, None, False] for i in range(100)]
    assert "100 rows" in page(about(), findings(rows=rows))


def test_page_opens_what_failed_and_puts_it_first():
    mixed = findings()
    mixed[5] = findings("FAIL")[5]
    html = page(about(status="fail"), mixed)
    assert html.count("<details open>") == 1
    assert html.index(f'id="{mixed[5].rule}"') < html.index(f'id="{mixed[0].rule}"')


def test_page_is_the_same_from_printed_findings():
    found = findings("HOLD")
    assert page(about(), found) == page(about(), [finding.as_json() for finding in found])


def test_page_does_without_a_score():
    assert "no score claimed" in page(about() | {"val_bpb": "x", "name": None}, findings())


def test_page_reads_what_verify_prints_as_json():
    found = [finding.as_json() for finding in findings()]
    printed = {"record": "records/track_x/2026-11-25_tiny", "status": "unverified", "reasons": ["P06 no data"],
               "verified_with": "tools.verify, 9 of 24 rules", "record_sha256": "abc123", "referee_sha256": "def456"}
    html = page(printed | {"findings": found}, found)
    parsed(html)
    assert "<h1>2026-11-25_tiny</h1>" in html and "no score claimed" not in html
    assert all(words in html for words in ("tools.verify, 9 of 24 rules", "abc123", "def456", "P06 no data"))


def test_page_leaves_words_alone_that_look_like_its_marks():
    html = page(about("{{body}} {{title}}"), findings())
    assert len(parsed(html).ids) == len(set(parsed(html).ids)) and "{{body}} {{title}}" in html


@pytest.mark.parametrize("score", [pytest.param(10**400, id="huge"), math.inf, math.nan, None, [], {}, "1e999", True])
def test_page_stands_any_score(score):
    assert "no score claimed" in page(about() | {"val_bpb": score}, findings())


def test_page_does_not_group_the_digits_of_a_seed():
    table = Table("runs", ["seed", "bytes"], [[1337, 1337]])
    html = page(about(), [Finding("P16", "logs", "PASS", evidence=[table])])
    assert '<td class="num">1337</td><td class="num">1,337</td>' in html


def test_page_states_the_limits_of_the_rules():
    html = page(about(), findings())
    assert "16,000,000" in html and not re.search(r"Limit\.</b>[^<]*[{}]", html)
