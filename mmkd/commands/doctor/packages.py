"""The packages that mmkd's metadata requires, and which of them are installed."""

import importlib
import importlib.metadata
import platform
import re
from dataclasses import dataclass
from importlib.util import find_spec

from mmkd.commands.doctor.isolated import Finding
from mmkd.errors import one_line

MODULES = {"pillow": "PIL"}
# Imported lazily by its package: what else it needs shows only there.
DEEPER = {"transformers": "AutoModelForImageTextToText"}
REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)\s*(?:\[[^]]*\])?\s*([^;]*)")
RELEASE = re.compile(r"2\.(\d+)\.(\d+)(?:\+(cpu|cu\d+|rocm[\d.]+|xpu))?")
WHEELS = "https://download.pytorch.org/whl"
FIRST = 15  # torchvision 0.15 was built for torch 2.0, and both have counted on together
FAMILIES = 17
"""Number of families in docs/families.md."""
WANT_TORCHVISION = (
    "LLaVA-OneVision",
    "Qwen2-VL",
    "Qwen2.5-VL",
    "Qwen3-VL",
    "SmolVLM2",
    "InternVL",
    "Pixtral",
    "Mistral Small 3",
    "Qwen3.5 (hybrid)",
    "LFM2-VL (hybrid)",
    "LFM3-VL (hybrid)",
    "Nemotron Omni (hybrid)",
)
"""Families whose processors transformers does not load without torchvision."""
EXTRA = re.compile(r"extra\s*==\s*['\"]([^'\"]+)['\"]")


@dataclass(frozen=True)
class Wanted:
    """A package and the versions of it that will do, such as `>=2.9`."""

    name: str
    versions: str

    @property
    def module(self) -> str:
        return MODULES.get(self.name, self.name.replace("-", "_"))

    def __str__(self) -> str:
        return self.name + self.versions


def requirements(extra: str | None = None) -> list[Wanted]:
    """Of mmkd itself, or of one of its extras."""
    found = []
    for line in importlib.metadata.requires("mmkd") or []:
        marker, match = EXTRA.search(line), REQUIREMENT.match(line)
        if match and (marker.group(1) if marker else None) == extra:
            found.append(Wanted(match.group(1), match.group(2).strip()))
    return found


def python() -> list[Finding]:
    from packaging.specifiers import SpecifierSet

    wanted = importlib.metadata.metadata("mmkd")["Requires-Python"]
    version = platform.python_version()
    if not SpecifierSet(wanted).contains(version, prereleases=True):
        return [Finding("broken", f"{version}, not {wanted}")]
    return [Finding("ok", version)]


def mmkd() -> list[Finding]:
    return [Finding("ok", importlib.metadata.version("mmkd"))]


def package(wanted: Wanted) -> list[Finding]:
    """It is there, of a version that will do, and can be imported."""
    problem = _problem(wanted)
    if problem is not None:
        return [problem]
    try:
        module = importlib.import_module(wanted.module)
        if wanted.name in DEEPER:
            getattr(module, DEEPER[wanted.name])
    except Exception as error:
        again = f"pip install --force-reinstall '{wanted}'"
        return [Finding("broken", one_line(error), again)]
    return [Finding("ok", importlib.metadata.version(wanted.name))]


def unmet(extra: str) -> list[str]:
    """What is missing or of another version of an extra's packages."""
    problems = {wanted.name: _problem(wanted) for wanted in requirements(extra)}
    return [f"{name}: {p.state}, {p.detail}" for name, p in problems.items() if p is not None]


def _problem(wanted: Wanted) -> Finding | None:
    from packaging.specifiers import SpecifierSet

    try:
        version = importlib.metadata.version(wanted.name)
    except importlib.metadata.PackageNotFoundError:
        return Finding("missing", f"mmkd wants {wanted}")
    if not SpecifierSet(wanted.versions).contains(version, prereleases=True):
        return Finding("broken", f"{version}, and mmkd wants {wanted}")
    return None


def torchvision() -> list[Finding]:
    """Many processors of transformers need it, and all of them break if it is built for another
    torch."""
    if find_spec("torchvision") is None:
        return [Finding("missing", without_torchvision(), fitting_torchvision(), needed=False)]
    try:
        module = importlib.import_module("torchvision")
    except Exception as error:
        again = fitting_torchvision("--force-reinstall ")
        return [Finding("broken", f"{one_line(error)}; built for another torch?", again)]
    return [Finding("ok", module.__version__)]


def without_torchvision() -> str:
    """The families that cannot be used without torchvision, in a sentence."""
    return (
        f"without torchvision, {len(WANT_TORCHVISION)} of {FAMILIES} families cannot load their "
        "processors: " + ", ".join(name.removesuffix(" (hybrid)") for name in WANT_TORCHVISION)
    )


def fitting_torchvision(how: str = "") -> str:
    """The command that installs the torchvision build for the installed torch, without changing
    torch. PyPI's build is for one kind of GPU and breaks together with a torch for CPUs."""
    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return "pip install torchvision, after torch"
    found = RELEASE.fullmatch(torch)
    if found is None:
        return f"install the torchvision that is built for torch {torch}"
    minor, patch, build = found.groups()
    index = f" --index-url {WHEELS}/{build}" if build else ""
    return f"pip install {how}--no-deps torchvision==0.{int(minor) + FIRST}.{patch}{index}"
