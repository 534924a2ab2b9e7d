"""How docstrings and comments begin: with the actor, or with what is returned."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "pyvmm"
BAD_START = re.compile(r"[^\w]*(What|Where|Whether)\b")
SENTENCE_END = re.compile(r"(?<=[.!?])[\"')`]*\s+(?=[\"'(`]*[A-Z])")
PARAGRAPH_END = re.compile(r"\n\s*\n|\n\s*[*-] ")


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of every string that stands alone: those of modules, classes and names too."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Expr(value=ast.Constant(value=str(text))):
                yield node.lineno, text


def comments(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of every comment; lines of comment below one another are one text."""
    lines = source.splitlines()
    start, text, end = 0, "", -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        line, words = token.start[0], token.string.lstrip("# ")
        if line == end + 1 and lines[line - 1].lstrip().startswith("#"):
            text += "\n" + words
        else:
            if text:
                yield start, text
            start, text = line, words
        end = line if lines[line - 1].lstrip().startswith("#") else -1
    if text:
        yield start, text


def sentences(text: str) -> Iterator[str]:
    """The sentences of ``text``, each on one line."""
    for paragraph in PARAGRAPH_END.split(text):
        yield from SENTENCE_END.split(" ".join(paragraph.split()))


def bad_sentences(source: str) -> list[tuple[int, str]]:
    """Line of the text, and the sentence, of each that begins with What, Where or Whether."""
    return [
        (line, sentence)
        for line, text in (*docstrings(source), *comments(source))
        for sentence in sentences(text)
        if BAD_START.match(sentence)
    ]


def test_no_sentence_begins_with_what_where_or_whether() -> None:
    found = [
        f"{path.relative_to(PACKAGE.parent)}:{line}: {sentence}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for line, sentence in bad_sentences(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(("source", "count"), [
    ('"""What it is."""', 1),
    ('"""It is.  Whether it will be, nobody knows."""', 1),
    ('"""It is.\n\n* Where it is.\n"""', 1),
    ('X = 1\n"""``Where``: here."""', 1),
    ("# It is\n# so.  Where it\n# is.", 1),
    ("x = 1  # What it is\n# Where it is", 2),
    ('"""Tell what it is, and where: whether it is."""\nX = "What?  Whether"', 0),
    ('"""Whatever.  Whereas."""', 0),
])
def test_sentences_are_found_where_they_begin(source: str, count: int) -> None:
    assert len(bad_sentences(source)) == count
