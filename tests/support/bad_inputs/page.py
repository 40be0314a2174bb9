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
    "make": "Data that models make",
    "model": "Models",
    "vocabulary": "Tokenizers and processors",
    "run": "Runs that go on",
    "cache": "A teacher's cache",
    "hub": "The Hub",
    "command": "Other commands",
}
TEXT = """# Error messages

Look up here what a message of mmkd means and what caused it. Bad input ends with exit
status 2 and one line on stderr:

```
mmkd: WHERE: WHAT IS WRONG -- WHAT TO DO
```

Nothing on the disk has changed. There is one exception: if the upload of a release fails, its
complete folder stays on the disk, and the same command uploads it.

`tests/cli/test_bad_input.py` runs all {count} below and compares them with this page, which
`python -m scripts.errors` writes. Text in parentheses often comes from a library and changes with
its version. For commands and options that do not exist (`mmkd runn`), mmkd prints the usage on
several lines, with status 2.
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
