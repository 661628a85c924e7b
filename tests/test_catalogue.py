"""The README's table of architectures is that of their files, and its commands fit the settings that there are."""

import json
import re

import pytest
from conftest import ROOT

import train_gpt
from architectures import names
from tools import catalogue


def test_every_architecture_has_a_row_with_its_paper_and_its_size(tmp_path):
    (tmp_path / "benchmarks").mkdir()
    for day, size in (("2026-01-02", 15_930_000), ("2026-01-01", 1)):
        measured = {"date": day, "rows": [{"what": "gpt", "artifact_bytes": size}]}
        (tmp_path / "benchmarks" / f"artifacts_{size}.json").write_text(json.dumps(measured))
    rows = catalogue.table(tmp_path, tmp_path).splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == names() and all("](https://" in row for row in rows)
    gpt = next(row for row in rows if row.startswith("| `gpt`"))
    assert "| 17,059,912 | 15.9 |" in gpt and "not compared yet" in gpt
    assert "`TI_FEAT=fourier`" in (other := next(row for row in rows if row.startswith("| `ti_mlp`")))
    assert "| not measured |" in other


def test_where_an_architecture_stands_is_read_from_records_and_studies(tmp_path):
    arms = {
        "gpt": {"arch": "gpt", "all_losses": {"1": 2.0, "2": 3.0, "3": 7.0}},
        "wide": {"arch": "ti_mlp", "all_losses": {"1": 2.5, "2": 3.1, "3": 6.9}},
        "mine": {"arch": "ti_mlp", "all_losses": {"1": 1.8, "2": 3.0, "5": 9.0}},
        "shared": {"arch": "shared", "all_losses": {}},
    }
    (tmp_path / "a_study").mkdir()
    groups = {"same shape": {"baseline": "gpt", "arms": arms}}
    (tmp_path / "a_study" / "statistics_summary.json").write_text(json.dumps({"groups": groups}))
    found = "-0.1000 bpb to `gpt` by mine in a_study, same shape (n=2)"
    assert catalogue.standing("ti_mlp", tmp_path, tmp_path) == found
    assert catalogue.standing("shared", tmp_path, tmp_path) == "not compared yet"
    assert "bpb on wikitext2" in catalogue.standing("gpt", tmp_path, catalogue.ROOT / "records")


def test_a_first_line_of_another_form_is_refused_by_name(tmp_path):
    (tmp_path / "mine.py").write_text('"""My idea."""\n')
    with pytest.raises(ValueError, match=r'mine.py: its first line must end in .* it is "My idea."'):
        catalogue.first_line(tmp_path / "mine.py")


def test_a_table_out_of_date_fails_the_check_and_is_left_alone(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{catalogue.BEGIN}\nold\n{catalogue.END}\nafter\n")
    assert catalogue.main(["--check", "--readme", str(readme)]) == 1 and "old" in readme.read_text()
    assert catalogue.main(["--readme", str(readme)]) == 0
    assert catalogue.main(["--check", "--readme", str(readme)]) == 0
    assert readme.read_text().startswith("before\n") and readme.read_text().endswith("\nafter\n")
    readme.write_text("no marks")
    assert catalogue.main(["--readme", str(readme)]) == 1 and "must hold" in capsys.readouterr().err


def test_every_command_of_the_readme_that_trains_has_settings_that_fit():
    page = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = [line for line in page.splitlines() if re.match(r"[A-Z_]+=\S+ .*train_gpt\.py", line)]
    assert len(commands) >= 4
    for line in commands:
        env = dict(re.findall(r"(?:^| )([A-Z][A-Z_]*)=(\S+)", line.split("#")[0]))
        _, run, config = train_gpt.read_settings(env)
        train_gpt.check_batch(run, config.train_seq_len, 8 if "nproc_per_node=8" in line else 1)
