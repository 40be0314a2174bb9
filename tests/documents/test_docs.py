"""Documentation: links lead somewhere, recipes load, the reference is what the models say."""

import importlib.util
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

from mmkd.recipe import Recipe, StageConfig, load_recipe
from scripts import reference
from tests.support.pages import FENCE, ROOT, blocks, pages

SITE = ("mkdocs", "material", "mkdocstrings", "latex2mathml", "ziamath", "fontTools")
LINK = re.compile(r"!?\[[^\]]*\]\(([^()\s]+)\)")
STAGE = {"name": "only", "objectives": [{"kind": "ce"}]}
RECIPE = {
    "name": "some",
    "teacher": {"model": "a"},
    "student": {"model": "b"},
    "data": {"train": "c.json"},
    "stages": [STAGE],
}


def prose(page: Path) -> str:
    """A page without its code."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text()))


@cache
def anchors(page: Path) -> set[str]:
    """What a page's headings are linked by, on GitHub and in the site."""
    titles = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.M)
    kept = (re.sub(r"[^\w\s-]", "", title.lower()).strip() for title in titles)
    return {re.sub(r"\s", "-", title) for title in kept}


@pytest.mark.parametrize("page", pages(), ids=lambda p: str(p.relative_to(ROOT)))
def test_links_and_pictures_are_there(page):
    for link in LINK.findall(prose(page)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(ROOT), link
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


def completed(block: dict) -> dict:
    """A recipe that has this block: whole, some of its keys, or some of a stage's."""
    if not block.keys() <= Recipe.model_fields.keys():
        assert block.keys() <= StageConfig.model_fields.keys(), f"no keys of a recipe: {block}"
        block = {"stages": [STAGE | block]}
    whole = RECIPE | block
    return whole | {"stages": [_with_length(stage) for stage in whole["stages"]]}


def _with_length(stage: dict) -> dict:
    return stage if {"steps", "epochs"} & stage.keys() else stage | {"steps": 1}


@pytest.mark.parametrize("page", pages(), ids=lambda p: str(p.relative_to(ROOT)))
def test_recipes_load(page):
    for block in blocks(page, "yaml"):
        if page.name != "extending.md":  # its kinds are of its own code, which a test runs
            load_recipe(completed(yaml.safe_load(block)))


def test_the_quickstart_shows_its_recipe():
    (whole,) = blocks(ROOT / "docs" / "quickstart.md", "yaml")
    assert load_recipe(yaml.safe_load(whole)) == load_recipe(ROOT / "configs" / "quickstart.yaml")


def test_the_reference_is_what_the_models_say():
    text = reference.reference()
    assert reference.OUT.read_text() == text, "run: python -m scripts.reference"
    unsaid = [line for line in text.splitlines() if line.endswith("| |")]
    assert not unsaid, "a key without a description"


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, SITE)),
    reason="what builds the site is not installed: make docs",
)
def test_the_site_builds_and_fetches_nothing(tmp_path):
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    page = (tmp_path / "methods" / "kd.html").read_text()
    written = (ROOT / "docs" / "methods" / "kd.md").read_text()
    for display, mark in (("block", "```math"), ("inline", "$`")):
        assert len(re.findall(rf"<math [^>]*display=\"{display}\"", page)) == written.count(mark)
    assert (tmp_path / "assets" / "math.woff").read_bytes()[:4] == b"wOFF"
    for html in tmp_path.rglob("*.html"):
        text = html.read_text()
        fetched = re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(https?:[^"]+)', text)
        assert not fetched, html
        assert "$<" not in text, f"{html}: an equation within a line was not seen"


def test_an_equation_that_browsers_would_show_wrong():
    site_hooks = pytest.importorskip("scripts.site_hooks")
    with pytest.raises(ValueError, match=r"\\nosuch in an equation"):
        site_hooks.mathml(r"\nosuch{a}", "inline")
    bars = site_hooks.mathml(r"|x|", "inline")
    assert bars.count('<mo stretchy="false" lspace="0" rspace="0">') == 2
