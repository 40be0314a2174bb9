"""Check every family and print the page, or write it.

python -m scripts.families [--write docs/families.md]
"""

import argparse
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from mmkd.runtime.progress import console
from scripts.families.checks import verdicts
from scripts.families.table import write
from tests.support.zoo import ZOO

SEEN = ("torch", "transformers", "torchvision", "num2words")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="the page; printed if left out")
    arguments = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, member in ZOO.items():
            if missing := [p for p in member.needs if find_spec(p) is None]:
                raise SystemExit(f"{member.title}: the page wants {', '.join(missing)} installed")
            results[name] = member, verdicts(member, Path(folder) / name)
            words = [found.word for found in results[name][1].values()]
            console.print(f"{member.title}: {words.count('works')} of {len(words)} work")
    page = write(results, ", ".join(f"{name} {version(name)}" for name in SEEN))
    if arguments.write is None:
        print(page)
    else:
        arguments.write.write_text(page)


if __name__ == "__main__":
    main()
