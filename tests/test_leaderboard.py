"""The board from small record folders: order, format, grouping, markers, and nothing that a stranger wrote is alive."""

import json
import os
import random
import re
import string
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from tools.leaderboard import BEGIN, EMPTY, END, main
from tools.plots import LABEL_GAP, spread, ticks

VOID = {"meta", "input", "link", "br", "img"}
EVIL = '"><script>alert(1)</script><img src=x onerror=alert(2)> | `x` [a](javascript:b) ' + END + " {{sections}}"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "README.md").write_text(f"# Kit\n\n{BEGIN}\nold\n{END}\nthe rest\n")
    (tmp_path / "records").mkdir()
    return tmp_path


def add(root: Path, folder: str, val_bpb: float, seeds=(1, 2, 3), track="track_10min_16mb", log="", **fields) -> Path:
    """Writes a record of upstream's kind whose seeds score 0.001 apart around val_bpb; `fields` go into its JSON."""
    path = root / "records" / track / folder
    (path / "logs").mkdir(parents=True)
    (path / "README.md").write_text("words")
    for index, seed in enumerate(seeds):
        score = val_bpb + (index - (len(seeds) - 1) / 2) * 0.001
        steps = [f"step:{step}/99 train_loss:{3 - step / 99:.3f} train_time:{step * 1000}ms" for step in range(1, 99)]
        words = log or "\n".join([*steps, f"final_int8_zlib_roundtrip_exact val_loss:2.0 val_bpb:{score:.8f}"])
        (path / "logs" / f"train_seed{seed}.log").write_text(words)
    submission = {
        "name": folder[11:],
        "author": "Ada",
        "blurb": "words",
        "val_bpb": val_bpb,
        "val_bytes": 1000,
        "dataset": "fineweb_sp1024",
        "hardware": "8x H100",
        "bytes_total": 15_000_000,
        "verdict": {"status": "pass"},
        **fields,
    }
    (path / "submission.json").write_text(json.dumps(submission))
    return path


def run(root: Path, *options: str) -> tuple[int, str]:
    """Returns the exit status and the README."""
    status = main(["--records", str(root / "records"), "--readme", str(root / "README.md"), *options])
    return status, (root / "README.md").read_text(encoding="utf-8")


def html(root: Path) -> str:
    assert run(root, "--html", str(root / "board.html"))[0] == 0
    return (root / "board.html").read_text(encoding="utf-8")


def rows(readme: str) -> list[list[str]]:
    """Returns the cells of every record's row."""
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in readme.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line] for line in lines if line[0] != " Run "]


def test_best_score_comes_first_with_mean_deviation_and_number_of_seeds(root):
    add(root, "2026-11-22_slow", 1.25)
    add(root, "2026-11-23_fast", 1.19996, seeds=(1,))
    status, readme = run(root)
    assert status == 0 and "| Run | Score | Author | Summary | Date | Info |" in readme
    assert [row[:2] for row in rows(readme)] == [["fast", "1.2000 (n=1)"], ["slow", "1.2500 ± 0.0010 (n=3)"]]


def test_row_shows_the_hardware_the_verdict_and_a_link_that_leads_to_the_record(root):
    add(root, "2026-11-22_a", 1.2, verdict=None)
    info = rows(run(root)[1])[0][5]
    assert info == "[README](records/track_10min_16mb/2026-11-22_a/README.md), 8x H100, unverified"


def test_link_to_a_folder_with_spaces_is_encoded(root):
    path = add(root, "2026-11-22_a (b) ä", 1.2)
    (path / "README.md").unlink()
    assert "(records/track_10min_16mb/2026-11-22_a%20%28b%29%20%C3%A4)" in rows(run(root)[1])[0][5]


def test_ten_minute_table_comes_before_non_record_table(root):
    add(root, "2026-11-22_free", 1.0, track="track_non_record_16mb")
    add(root, "2026-11-22_fast", 1.2)
    readme = run(root)[1]
    places = [readme.index(words) for words in ("### 10 minutes", "| fast", "### Non-record", "| free")]
    assert places == sorted(places)


def test_scores_on_other_validation_texts_stand_in_other_tables(root):
    add(root, "2026-11-22_web", 1.2)
    add(root, "2026-11-22_wiki", 1.1, dataset="wikitext2_sp1024", val_bytes=77)
    add(root, "2026-11-22_part", 1.0, val_bytes=999)
    add(root, "2026-11-22_unsaid", 0.9, dataset="", val_bytes=None)
    readme = run(root)[1]
    assert readme.count("| Run |") == 4
    titles = re.findall(r"#### (.*)", readme)
    assert titles == [
        "fineweb, 1,000 bytes of validation text",
        "fineweb, 999 bytes of validation text",
        "validation text not stated",
        "wikitext2, 77 bytes of validation text",
    ]


def test_tokenizers_compete_in_one_table(root):
    add(root, "2026-11-22_a", 1.2)
    add(root, "2026-11-22_b", 1.1, dataset="fineweb_byte260")
    readme = run(root)[1]
    assert readme.count("| Run |") == 1 and [row[0] for row in rows(readme)] == ["b", "a"]


def test_failed_and_doubtful_records_are_listed_below_with_the_reason(root):
    add(root, "2026-11-22_good", 1.3)
    add(root, "2026-11-22_leak", 0.9, verdict={"status": "fail", "reasons": ["R1 sums to 277"]})
    add(root, "2026-11-22_big", 1.1, bytes_total=16_000_002)
    readme = run(root)[1]
    assert [row[0] for row in rows(readme)] == ["good"]
    below = readme[readme.index("### Not ranked") :]
    assert "[leak](" in below and "failed verification: R1 sums to 277" in below and "2 over the cap" in below


def test_no_records_is_a_friendly_sentence(root):
    assert run(root)[1] == f"# Kit\n\n{BEGIN}\n{EMPTY}\n{END}\nthe rest\n"
    assert "No records yet" in html(root)


def test_folders_that_are_no_records_are_left_out(root):
    add(root, "a", 1.2, track="studies")
    (root / "records" / "track_10min_16mb").mkdir()
    (root / "records" / "track_10min_16mb" / "README.md").write_text("about this track")
    assert EMPTY in run(root)[1]


def test_text_around_the_markers_is_untouched(root):
    add(root, "2026-11-22_a", 1.2)
    readme = run(root)[1]
    assert readme.startswith(f"# Kit\n\n{BEGIN}\n### ") and readme.endswith(f"\n{END}\nthe rest\n")


@pytest.mark.parametrize("readme", ["# no markers", BEGIN, f"{END}\n{BEGIN}", f"{BEGIN}{BEGIN}{END}"])
def test_missing_markers_are_named(root, capsys, readme):
    (root / "README.md").write_text(readme)
    assert run(root) == (1, readme)
    said = capsys.readouterr().out
    assert said.startswith("FAIL ") and BEGIN in said and END in said


def test_missing_files_are_one_line_and_not_a_traceback(root, capsys):
    assert main(["--records", str(root / "none"), "--readme", str(root / "README.md")]) == 1
    assert main(["--records", str(root / "records"), "--readme", str(root / "none.md")]) == 1
    assert [line[:5] for line in capsys.readouterr().out.splitlines()] == ["FAIL ", "FAIL "]


def test_check_passes_what_was_written_and_writes_nothing(root, capsys):
    add(root, "2026-11-22_a", 1.2)
    page = ["--html", str(root / "board.html")]
    assert run(root, *page)[0] == 0 and run(root, "--check", *page)[0] == 0
    add(root, "2026-11-22_b", 1.1)
    before = (root / "README.md").read_text()
    capsys.readouterr()
    assert run(root, "--check", *page) == (1, before)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and "README.md: out of date, line 10 has '| a | 1.2000" in said[0]
    assert "should have '| b | 1.1000" in said[0] and "board.html: out of date" in said[1]


def test_markdown_of_a_stranger_stays_in_its_cell(root):
    add(root, "2026-11-22_a", 1.2, name=EVIL, author=EVIL, blurb=EVIL * 3, hardware=EVIL)
    readme = run(root)[1]
    assert len(rows(readme)) == 1 and len(rows(readme)[0]) == 6
    assert "<script" not in readme and readme.count(END) == 1 and run(root, "--check")[0] == 0
    assert "[a](javascript" not in readme


class Page(HTMLParser):
    """Collects what could run or load, and whether every tag is closed."""

    def __init__(self, words: str):
        super().__init__()
        self.open, self.tags, self.links = [], [], []
        self.feed(words)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("href", "src") or name.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_html_of_a_stranger_is_inert(root):
    everywhere = dict.fromkeys(("name", "author", "blurb", "hardware", "date", "arch"), EVIL)
    add(root, "2026-11-22_a", 1.2, github_id='x" onclick="y', **everywhere)
    add(root, "2026-11-22_b", 1.3, name=EVIL, dataset=EVIL, verdict={"status": "fail", "reasons": [EVIL]})
    page = Page(html(root))
    assert page.open == [] and page.tags.count("script") == 1 and "img" not in page.tags
    assert page.links == [f"records/track_10min_16mb/2026-11-22_{name}/README.md" for name in "ab"]


def test_page_loads_nothing_and_draws_curves_band_score_and_cap(root):
    add(root, "2026-11-22_a", 1.2)
    add(root, "2026-11-22_b", 1.3, dataset="wikitext2_sp1024")
    page = html(root)
    assert not re.search(r"url\(|@import|src=|<link|fetch\(", page)
    plots = [ElementTree.fromstring(found) for found in re.findall(r'<svg class="plot.*?</svg>', page, re.S)]
    assert len(plots) == 12  # two texts; time, steps and size; wide and narrow
    curves = [plot for plot in plots if plot.find("g/polyline") is not None]
    assert len(curves) == 8 and all(len(plot.find("g/polyline").get("points").split()) > 20 for plot in curves)
    assert all(plot.find("g/polygon") is not None and plot.find("g/title") is not None for plot in curves)
    assert sum(plot.find("line[@class='cap']") is not None for plot in plots) == 4


def test_noise_never_raises(root):
    for seed in range(40):
        generator = random.Random(seed)
        words = "".join(generator.choices(string.printable + "é\u202e\U0001f600", k=30))
        wild = {
            "name": words,
            "val_bytes": generator.choice([1, -1, 1e300, "x", []]),
            "hardware": [words],
            "bytes_total": generator.choice([0, 1, 15e6, 1e14, None]),
            "verdict": {"reasons": words},
        }
        step, loss = generator.randrange(9 ** generator.randrange(12)), generator.uniform(-1, 1) * 10**seed
        milliseconds, val_loss = generator.choice([-5, 0, 1, 10**9]), generator.choice([1e-9, 2.0])
        log = f"step:{step}/9 train_loss:{loss} train_time:{milliseconds}ms\nfinal_x val_loss:{val_loss} val_bpb:1.2"
        add(root, f"2026-11-22_{seed}", generator.choice([1e-9, 1.2, 99.0]), log=log, **wild)
    bad = os.fsencode(root / "records" / "track_10min_16mb") + b"/2026-11-22_\xff\xfe"
    os.makedirs(bad)
    html(root)
    assert run(root, "--check")[0] == 0


def test_labels_keep_their_distance_and_their_order():
    wanted = [100.0, 101.0, 5.0, 399.0, 400.0]
    placed = spread(wanted, 14, 400)
    order = sorted(range(5), key=wanted.__getitem__)
    gaps = [placed[after] - placed[before] for before, after in pairwise(order)]
    assert min(gaps) >= LABEL_GAP - 1e-9 and min(placed) >= 14 and max(placed) <= 400


@pytest.mark.parametrize(("low", "high"), [(0, 1), (1.13, 1.27), (0, 16e6), (3.1e-5, 3.2e-5)])
def test_ticks_are_round_and_inside(low, high):
    found = ticks(low, high, 6)
    assert 3 <= len(found) <= 12 and low <= found[0] and found[-1] <= high * (1 + 1e-9)


def test_upstreams_record_cannot_say_that_it_passed(root):
    add(root, "2026-11-22_a", 1.2)
    assert run(root)[1].count(", unverified |") == 1
