"""P22: numbers and letters in a script that training did not make. Parameters belong into the model, where they count
and where the run that made them can be repeated.

    python -m tools.referee.constants SCRIPT     the long tables and texts of a script, as JSON
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator

from tools.referee.case import Case, is_plain
from tools.referee.code import MOST_ROWS, answer_about, main
from tools.referee.rules import RULES, Found, Skip, Table, check
from tools.untrusted import text

WORD = re.compile(r"\S{40,}")  # longer than prose has, and than most names
PRECISE_DIGITS = 5  # a number that somebody thought of has fewer
NUMBERS = (int, float, complex)
FIRST = 5  # numbers and words that are shown
MOST = 100  # rows of each kind


def constants_in(root: ast.AST, others: type) -> Iterator[ast.Constant]:
    """The constants of a statement or call that are in no other such node inside it, in reading order."""
    for node in ast.iter_child_nodes(root):
        if isinstance(node, ast.Constant):
            yield node
        elif not isinstance(node, others):
            yield from constants_in(node, others)


def is_docstring(statement: ast.stmt) -> bool:
    """Whether it is a text alone, which no code can use but as __doc__."""
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant) \
        and isinstance(statement.value.value, str)


def letters_of(value: object) -> int:
    """Letters of a text, or of a number too large to be one."""
    if isinstance(value, str | bytes):
        return len(value)
    return value.bit_length() // 4 if type(value) is int and value.bit_length() > 64 else 0


def digits(number: float) -> int:
    """The significant decimal digits of a number."""
    return len(re.sub(r"e.*|\D", "", repr(number)).strip("0"))


def words_of(source: str, constants: list[tuple[int, object]]) -> Iterator[tuple[int, str]]:
    """(line, word) for the words in texts and comments that are too long for prose, but for rulers and addresses."""
    texts = [(line, value if isinstance(value, str) else value.decode("latin-1"))
             for line, value in constants if isinstance(value, str | bytes)]
    texts += [(token.start[0], token.string) for token in tokenize.generate_tokens(io.StringIO(source).readline)
              if token.type == tokenize.COMMENT]
    for line, value in texts:
        for word in WORD.findall(value):
            if len(set(word)) > 8 and "://" not in word:
                yield line, word


def find(source: str) -> dict:
    """Rows (line, kind, size, first values), the largest first, of what could be a table of parameters."""
    rows, constants = [], []
    for root in ast.walk(ast.parse(source)):
        if isinstance(root, ast.stmt | ast.Call):  # a list of calls with few numbers each is no table
            numbers = [node.value for node in constants_in(root, ast.stmt | ast.Call) if type(node.value) in NUMBERS]
            rows.append((root.lineno, "numbers", len(numbers), repr(numbers[:FIRST])[:100]))
        if isinstance(root, ast.stmt):
            own = [(node.lineno, node.value) for node in constants_in(root, ast.stmt)]
            constants += own
            texts = [] if is_docstring(root) else [value for _, value in own if letters_of(value)]
            first = hex(texts[0]) if texts and type(texts[0]) is int else repr(texts[0][:60]) if texts else ""
            rows.append((root.lineno, "letters", sum(map(letters_of, texts)), first[:60]))
    precise = {value: line for line, value in reversed(constants) if type(value) in (float, complex)
               and digits(abs(value)) >= PRECISE_DIGITS}
    words = list(words_of(source, constants))
    together = [(min(precise.values(), default=0), "precise numbers", len(precise), repr([*precise][:FIRST])[:100]),
                (words[0][0] if words else 0, "letters in long words", sum(len(word) for _, word in words),
                 words[0][1][:60] if words else "")]
    rows = sorted(rows, key=lambda row: -row[2])
    return {"rows": [*together, *(row for kind in ("numbers", "letters")
                                  for row in [row for row in rows if row[1] == kind][:MOST])]}


@check("P22")
def constants(case: Case) -> Found:
    limit = RULES["P22"]["limit"]
    if not is_plain(case.script):
        raise Skip("train_gpt.py is missing")
    seen, reason = answer_about("tools.referee.constants", case.script)
    if reason:
        raise Skip(f"train_gpt.py {reason}")  # which P13 fails
    most = {"numbers": limit["floats"], "letters": limit["letters"],
            "precise numbers": limit["floats"], "letters in long words": limit["letters"]}
    where = {"numbers": "in one table", "letters": "in one statement"}
    problems, largest = [], dict.fromkeys(most, 0)
    for line, kind, size, first in seen["rows"]:
        largest[kind] = max(largest[kind], size)
        if size > most[kind]:
            problems.append(f"line {line}: {size:,} {kind} {where.get(kind, 'in all')}, more than {most[kind]:,}, "
                            f"beginning {text(first)}")
    rows = [[line, kind, size, text(first)] for line, kind, size, first in seen["rows"] if size * 10 > most[kind]]
    return Found(f"at most {largest['numbers']} numbers in a table, {largest['letters']:,} letters in a statement; "
                 f"{largest['precise numbers']} precise numbers, {largest['letters in long words']:,} letters in "
                 "long words", problems[:20], [Table("largest constants of the script",
                                                     ["line", "what", "how many", "the first"], rows[:MOST_ROWS])])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], find))
