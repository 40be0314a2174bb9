"""Docstrings, comments and pages use standard terms: words that were replaced do not come back."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.pages import FENCE, ROOT, pages

GENERATED = {"docs/errors.md", "docs/reference.md"}
REPLACED = {
    r"\bbeside\b": "with, next to, or in addition to",
    r"\bbehind\b": "after, or the plain relation: the code of, the files with",
    r"\b(told|says?|said) otherwise\b": "by default",
    r"\b(is|are) to be\b": "must, or will",
    r"\b(one|a record|records) a (row|line|rank|process)\b": "per",
    r"\bpictures?\b": "image",
}
"""Patterns of words, each with what to write instead."""
SCENES = "scenes"  # texts of a data set, which describe drawn pictures


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Docstrings and comments of a module, with their first lines."""
    source = path.read_text()
    for node in ast.walk(ast.parse(source)):
        value = getattr(node.value, "value", None) if isinstance(node, ast.Expr) else None
        if isinstance(value, str):
            yield node.lineno, value
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def replaced_words(text: str) -> list[str]:
    """What a text says in words that were replaced, without names of code."""
    plain = re.sub(r"`[^`]*`|'[^'\s]*'|\w*_\w*|^\s*[\w, ]+: ", "", text, flags=re.M)
    return [
        f"{found[0]!r}: write {instead}"
        for pattern, instead in REPLACED.items()
        for found in re.finditer(pattern, plain)
    ]


@pytest.mark.parametrize("folder", ["mmkd", "models", "benchmarks", "examples", "scripts"])
def test_modules_use_plain_words(folder):
    modules = [p for p in (ROOT / folder).rglob("*.py") if SCENES not in str(p.relative_to(ROOT))]
    found = [
        f"{path.relative_to(ROOT)}:{line}: {problem}"
        for path in modules
        for line, text in prose(path)
        for problem in replaced_words(text)
    ]
    assert modules
    assert not found, "\n".join(found)


def test_pages_use_plain_words():
    named = {str(page.relative_to(ROOT)): page for page in pages()}
    found = [
        f"{name}: {problem}"
        for name, page in named.items()
        if name not in GENERATED
        for problem in replaced_words(FENCE.sub("", page.read_text()))
    ]
    assert not found, "\n".join(found)
