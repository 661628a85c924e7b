"""The page of benchmarks is made of the JSON files beside it."""

import json

from tools import benchmarks


def test_the_page_shows_every_row_and_where_it_was_measured(tmp_path, capsys):
    found = dict(part="step", date="2026-01-02", machine=dict(hardware="2 cores of X", threads=2), torch="2.13.0")
    found |= dict(settings=dict(arch="gpt"), raw=[1], notes=["ok   fine"])
    found |= dict(rows=[dict(what="plain", median_ms=2.0, laps=[1, 2]), dict(what="kit", median_ms=1.0)])
    (tmp_path / "step_x.json").write_text(json.dumps(found))
    assert benchmarks.main(["--check", "--folder", str(tmp_path)]) == 1 and "out of date" in capsys.readouterr().err
    assert benchmarks.main(["--folder", str(tmp_path)]) == 0
    page = (tmp_path / "README.md").read_text()
    assert "2 cores of X, 2 threads, torch 2.13.0, 2026-01-02" in page and "Settings: arch=gpt" in page
    assert "what   median_ms\nplain      2.000\nkit        1.000\nok   fine" in page
    assert benchmarks.main(["--check", "--folder", str(tmp_path)]) == 0


def test_the_repository_s_page_is_up_to_date_and_reads_every_file():
    page = (benchmarks.FOLDER / "README.md").read_text()
    assert page == benchmarks.page(benchmarks.FOLDER)
    assert all(f"({path.name})" in page for path in benchmarks.FOLDER.glob("*.json"))
