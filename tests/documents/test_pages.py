"""Pages: how they begin, the commands that they name, and the tables that repeat the code."""

import ast
import importlib
import re
import shlex
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from tests.support.pages import FENCE, ROOT, pages
from tests.support.places import DOCS

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SHELL = ("", "bash")
IDENTIFIER = re.compile(r"^::: (\S+)", re.M)


def shell_lines() -> list[tuple[str, list[str]]]:
    """The commands in code blocks, each with its page, split into words."""
    found = []
    for page in pages():
        for kind, text in FENCE.findall(page.read_text()):
            if kind in SHELL:
                joined = text.replace("\\\n", " ").replace("&&", "\n")
                lines = [line.removeprefix("$ ").strip() for line in joined.splitlines()]
                found += [(page.name, line) for line in lines]
    starts = ("mmkd ", "make ", "python -m ", "python examples/")
    return [(p, shlex.split(line, comments=True)) for p, line in found if line.startswith(starts)]


@pytest.mark.parametrize("page", pages(), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_page_begins_with_a_sentence(page):
    title, _, rest = page.read_text().partition("\n")
    assert title.startswith("# ")
    first = rest.strip().split("\n\n")[0]
    assert re.match(r"[A-Z*\[]|`[^`]", first), f"no sentence: {first[:60]!r}"
    assert re.search(r"[.:]$", first), f"no sentence: {first[-60:]!r}"


def test_every_page_is_in_the_navigation_once():
    config = re.sub(r"!!\S+", "", (ROOT / "mkdocs.yml").read_text())
    named = re.findall(r"^ +- [^:]+: (\S+\.md)$", config, re.M)
    there = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    assert len(named) == len(set(named))
    assert set(named) == there


def click_command():
    import typer.main

    from mmkd.cli import cache, calibrate, data, models, release, runs, setup  # noqa: F401
    from mmkd.cli.app import app

    return typer.main.get_command(app)


def test_commands_of_mmkd_exist():
    whole = click_command()
    seen = set()
    for page, words in shell_lines():
        if words[0] != "mmkd":
            continue
        command, rest = whole, words[1:]
        while rest and rest[0] in getattr(command, "commands", {}):
            command, rest = command.commands[rest[0]], rest[1:]
        if "build" in getattr(command, "commands", {}):
            command = command.commands["build"]  # `mmkd cache RECIPE`
        assert command is not whole, f"{page}: {words}"
        known = {name for p in command.params for name in (*p.opts, *p.secondary_opts)}
        options = {word.split("=")[0].rstrip("]") for word in rest if word.startswith("--")}
        options = {word for word in options if word != "--json"} if "--json" in known else options
        assert options <= known | {"--help"}, f"{page}: {words}"
        seen.add(words[1])
    assert {"run", "plan", "eval", "release", "doctor", "chat"} <= seen


def test_targets_modules_and_recipes_of_commands_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for page, words in shell_lines():
        if words[0] == "make":
            named = [word for word in words[1:] if "=" not in word]
            assert set(named) <= targets, f"{page}: {words}"
        if words[:2] == ["python", "-m"] and words[2].split(".")[0] in ("scripts", "benchmarks"):
            assert find_spec(words[2]), f"{page}: {words}"
        for word in words:
            if re.fullmatch(r"(configs|examples|benchmarks)/[\w/]+\.\w+", word):
                assert (ROOT / word).is_file(), f"{page}: {words}"


@pytest.mark.parametrize("page", sorted((DOCS / "api").glob("*.md")), ids=lambda p: p.name)
def test_the_api_pages_name_modules_and_are_listed(page):
    for name in IDENTIFIER.findall(page.read_text()):
        importlib.import_module(name)
    if page.name != "index.md":
        assert f"]({page.name})" in (DOCS / "api" / "index.md").read_text()


def test_the_example_of_the_api_page_runs(tiny_model_dir):
    import torch
    from transformers import AutoModelForImageTextToText

    from mmkd.objectives import Targets

    (code,) = [t for kind, t in FENCE.findall((DOCS / "api" / "index.md").read_text()) if kind]
    ast.parse(code)
    names: dict = {}
    exec(code, names)
    load = AutoModelForImageTextToText.from_pretrained
    torch.manual_seed(0)
    student, teacher = load(tiny_model_dir), load(tiny_model_dir)
    with torch.no_grad():
        teacher.lm_head.weight.mul_(1.5)
    ids = torch.tensor([[5, 6, 7, 8]])
    mask = torch.ones_like(ids)
    response = torch.tensor([[False, False, True, True]])
    targets = Targets(ids, mask.bool(), response, torch.zeros_like(response))
    inputs = {"input_ids": ids, "attention_mask": mask}
    values = names["distillation_loss"](student, teacher, inputs, targets)
    with torch.no_grad():
        p, q = (m(**inputs).logits.log_softmax(-1)[0, 1:3] for m in (teacher, student))
    expected = (p.exp() * (p - q)).sum(-1).mean()
    torch.testing.assert_close(values["kl"], expected, rtol=1e-4, atol=1e-6)
    assert student.lm_head.weight.grad.abs().sum() > 0


def rows(page: Path, heading: str) -> list[list[str]]:
    """The cells of the tables below a heading."""
    part = page.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_the_architecture_page_has_the_packages_of_the_contract():
    (contract,) = [c for c in PROJECT["tool"]["importlinter"]["contracts"] if c["type"] == "layers"]
    named = [
        re.findall(r"`([\w.]+)`", row[0]) for row in rows(DOCS / "architecture.md", "Packages")
    ]
    layers = [set(layer.split(" | ")) for layer in contract["layers"]]
    assert [set(names) for names in named if names] == layers


def test_the_installation_page_has_every_extra():
    page = DOCS / "installation.md"
    named = {n for row in rows(page, "Extras") for n in re.findall(r"`([a-z]+)`", row[0])}
    assert set(PROJECT["project"]["optional-dependencies"]) <= named
    python = rows(page, "Versions")[1]
    assert python[1] == PROJECT["project"]["requires-python"].replace(">=", "≥ ")
    required = {row[0]: row[1] for row in rows(page, "Versions")}
    wanted = PROJECT["project"]["dependencies"]
    wanted += [d for extra in PROJECT["project"]["optional-dependencies"].values() for d in extra]
    for name in ("torch", "transformers", "deepspeed", "mamba-ssm", "causal-conv1d"):
        assert name + required[name].replace("≥ ", ">=") in wanted


def test_the_citation_is_of_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(cited["version"]) == PROJECT["project"]["version"]
    assert cited["license"] == PROJECT["project"]["license"]
    assert cited["version"] in (ROOT / "CHANGELOG.md").read_text()
