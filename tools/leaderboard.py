"""Writes the leaderboard from the record folders: the README's table and, if asked, a page with charts.

    python -m tools.leaderboard                        rewrite the table in README.md from records/track_*/*
    python -m tools.leaderboard --check                for CI: write nothing, exit 1 if the table is out of date
    python -m tools.leaderboard --html board.html      also write one self-contained page: board, curves, sizes
    python -m tools.leaderboard --records ~/parameter-golf/records --readme /tmp/board.md      read upstream's records

The table stands between <!-- BEGIN LEADERBOARD --> and <!-- END LEADERBOARD -->. Only scores on the same validation
text are ranked together. The rules of tools.verify that need files alone are checked again for every record. One that
fails, or is held for a judge, or whose claim its own logs do not support, is listed below the table with the reason.
"""

import argparse
import os
import re
import sys
from pathlib import Path
from urllib.parse import quote

from tools.board import Section, is_held, page
from tools.records import Record, read_record
from tools.referee.reread import reread
from tools.untrusted import text

BEGIN, END = "<!-- BEGIN LEADERBOARD -->", "<!-- END LEADERBOARD -->"
TRACKS = {"track_10min_16mb": "10 minutes, 16 MB", "track_non_record_16mb": "Non-record, 16 MB"}
EMPTY = "No records yet: the first one can be yours. `python -m tools.record --help` says how to file it."
HEADER = "| Run | Score | Author | Summary | Date | Info |\n|-----|------:|--------|---------|------|------|"
SUMMARY_LETTERS = 200
SHOWN_DOUBTS = 3


def read_records(folder: Path) -> list[Record]:
    """Returns every record of every track, best score first."""
    paths = [path for path in sorted(folder.glob("track_*/*")) if path.is_dir() and not path.name.startswith(".")]
    found = [read_record(path) for path in paths]
    for record in found:
        reread(record)
    order = lambda record: (record.val_bpb is None, record.val_bpb or 0.0, record.date, str(record.path))  # noqa: E731
    return sorted(found, key=order)


def validation_text(record: Record) -> tuple[bool, str]:
    """Returns the sort key and name of what a record was scored on: the text and its bytes, whatever the tokenizer."""
    name = re.sub(r"_(sp|bpe|byte)\d.*$", "", record.dataset) or "validation text not stated"
    size = f", {record.val_bytes:,} bytes of validation text" if record.val_bytes else ""
    return not name.lower().startswith("fineweb"), name + size


def sections(records: list[Record]) -> list[Section]:
    """Returns the records by validation text, FineWeb first; each section is one ranking per track."""
    found = []
    for key in sorted({validation_text(record) for record in records}):
        members = [record for record in records if validation_text(record) == key]
        tracks = sorted({record.track for record in members}, key=lambda track: [*TRACKS, track].index(track))
        sound = [record for record in members if not record.doubts]
        ranked = {TRACKS.get(track, track): [record for record in sound if record.track == track] for track in tracks}
        found.append(Section(key[1], ranked, [record for record in members if record.doubts]))
    return found


def link(path: Path, start: Path) -> str:
    """Returns the URL of a file, or of its folder if there is no such file, relative to the folder `start`."""
    target = path if path.is_file() else path.parent
    return quote(os.fsencode(os.path.relpath(target, start)).replace(os.sep.encode(), b"/"))


def escape(words: str, limit: int = SUMMARY_LETTERS) -> str:
    """Returns words as they are in a Markdown table: no markup, no HTML, one cell, at most `limit` letters."""
    if len(words) > limit:
        words = words[:limit].rsplit(" ", 1)[0].rstrip(" ,;.:") + " …"
    words = words.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|~]|(?<!\w)_|_(?!\w))", r"\\\1", words)


def score(record: Record) -> str:
    """Returns the mean, the sample standard deviation and the number of seeds."""
    if record.val_bpb is None:
        return "no score"
    spread = f" ± {record.val_bpb_std:.4f}" if record.val_bpb_std is not None and record.num_seeds > 1 else ""
    return f"{record.val_bpb:.4f}{spread} (n={record.num_seeds})"


def row(record: Record, start: Path) -> str:
    info = [f"[README]({link(record.path / 'README.md', start)})", escape(record.hardware, 60), record.verdict]
    cells = [escape(record.name, 100), score(record), escape(record.author, 60), escape(record.blurb), record.date]
    return f"| {' | '.join([*cells, ', '.join(filter(None, info))])} |"


def table(found: list[Section], start: Path) -> str:
    """Returns the Markdown between the markers."""
    blocks = []
    titles = list(dict.fromkeys([*TRACKS.values(), *(title for section in found for title in section.ranked)]))
    for title in titles:
        holding = [section for section in found if section.ranked.get(title)]
        blocks += [f"### {escape(title)}"] if holding else []
        for section in holding:
            rows = [row(record, start) for record in section.ranked[title]]
            blocks += [f"#### {escape(section.title)}", "\n".join([HEADER, *rows])]
    doubted = [record for section in found for record in section.doubted]
    for title, wanted in (("Held for a judge", True), ("Not ranked", False)):
        members = [record for record in doubted if is_held(record) == wanted]
        blocks += [f"### {title}", "\n".join(doubts_line(record, start) for record in members)] if members else []
    return "\n\n".join(blocks or [EMPTY])


def doubts_line(record: Record, start: Path) -> str:
    """Returns a record that is not ranked, and why."""
    more = f"; {len(record.doubts) - SHOWN_DOUBTS} more" if len(record.doubts) > SHOWN_DOUBTS else ""
    why = "; ".join(escape(doubt) for doubt in record.doubts[:SHOWN_DOUBTS]) + more
    where = link(record.path / "README.md", start)
    return f"- [{escape(record.name, 100)}]({where}), {score(record)}, {record.verdict}: {why}"


def insert(readme: str, board: str, name: str) -> str:
    """Returns the README with the board between its markers."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"{name} needs the lines {BEGIN} and {END}, once each and in this order, around the table")
    return f"{readme[:readme.index(BEGIN)]}{BEGIN}\n{board}\n{readme[readme.index(END):]}"


def difference(old: str, new: str) -> str:
    """Returns where and how two texts first differ, on one line."""
    before, after = [*old.splitlines(), "(end)"], [*new.splitlines(), "(end)"]
    line = next((i for i, pair in enumerate(zip(before, after, strict=False)) if pair[0] != pair[1]), 0)
    start = max(0, len(os.path.commonprefix([before[line], after[line]])) - 30)
    return f"line {line + 1} has {before[line][start:start + 60]!r}, should have {after[line][start:start + 60]!r}"


def publish(path: Path, new: str, check: bool) -> bool:
    """Writes or checks one file and prints one line about it; returns whether all is well."""
    old = path.read_bytes().decode("utf-8", "replace") if path.is_file() else ""
    if check and old != new:
        print(f"FAIL {path}: out of date, {difference(old, new)}; run python -m tools.leaderboard")
        return False
    if old != new:
        path.write_bytes(new.encode("utf-8"))
    print(f"ok   {path}: {'written' if old != new else 'up to date'}")
    return True


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=Path("records"), metavar="DIR")
    parser.add_argument("--readme", type=Path, default=Path("README.md"), metavar="FILE")
    parser.add_argument("--html", type=Path, metavar="FILE")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is out of date")
    args = parser.parse_args(argv)
    try:
        if not args.records.is_dir() and args.records != parser.get_default("records"):
            raise ValueError(f"--records {args.records} is not a folder")
        found = sections(read_records(args.records))
        for record in (record for section in found for record in section.doubted):
            print(text(f"note {record.path} is not ranked: {'; '.join(record.doubts)}"))
        readme = args.readme.read_bytes().decode("utf-8")
        outputs = {args.readme: insert(readme, table(found, args.readme.parent), str(args.readme))}
        if args.html:
            outputs[args.html] = page(found, lambda path: link(path, args.html.parent))
        return 0 if all([publish(path, new, args.check) for path, new in outputs.items()]) else 1
    except (ValueError, OSError) as error:
        print(f"FAIL {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
