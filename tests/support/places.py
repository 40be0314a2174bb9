"""Paths of the repository's folders."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
CONFIGS, DOCS, SCRIPTS = ROOT / "configs", ROOT / "docs", ROOT / "scripts"
FIXTURES, SUPPORT = ROOT / "tests" / "fixtures", ROOT / "tests" / "support"
