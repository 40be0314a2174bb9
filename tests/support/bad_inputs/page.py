"""docs/errors.md: what mmkd says to each bad input."""

from itertools import groupby

from tests.support.bad_inputs.table import CASES, Case

KINDS = {
    "recipe": "Recipes",
    "stage": "Stages",
    "evaluation": "Evaluations",
    "file": "Data files",
    "data": "Records",
    "image": "Pictures",
    "held_out": "Held-out records",
    "model": "Models",
    "vocabulary": "Tokenizers and processors",
    "run": "Runs that go on",
    "cache": "A teacher's cache",
    "hub": "The Hub",
    "command": "Other commands",
}
TEXT = """# What mmkd says to bad input

Exit status 2 and one line on stderr:

```
mmkd: WHERE: WHAT IS WRONG -- WHAT MENDS IT
```

Nothing on disk is new or changed then, but for a release whose upload failed: its folder is whole,
and the same command sends it.

`tests/cli/test_bad_input.py` runs all {count} below and compares them with this page, which
`python -m scripts.errors` writes. What stands in parentheses is often a library's own sentence and
changes with its version. Commands and options that do not exist (`mmkd runn`) get status 2 and the
usage, on several lines.
"""


def in_order() -> list[Case]:
    """All cases, kind by kind."""
    return sorted(CASES, key=lambda case: list(KINDS).index(case.kind))


def page(messages: dict[str, str]) -> str:
    """The page, from the message of each case by its name."""
    parts = [TEXT.format(count=len(CASES))]
    for kind, cases in groupby(in_order(), key=lambda case: case.kind):
        parts.append(f"\n## {KINDS[kind]}\n\n| the user | mmkd |\n|---|---|\n")
        parts += [row(case, messages[case.name]) + "\n" for case in cases]
    return "".join(parts)


def row(case: Case, message: str) -> str:
    """A case's line of the page."""
    return f"| {case.did} | {_code(message)} |"


def _code(text: str) -> str:
    code = f"`` {text} ``" if "`" in text else f"`{text}`"
    return code.replace("|", "\\|")
