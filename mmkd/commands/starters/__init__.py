"""`mmkd init`: a commented recipe of a published method, for a pair of models of the user's.

The stages of the templates in this folder are those of `configs/`; a test compares them.
"""

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from mmkd.errors import MmkdError, nearest
from mmkd.runtime.files import from_here, write_text
from mmkd.runtime.formats import parse_yaml

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
PLAIN = re.compile(r"[\w./~-]+", re.ASCII)


@dataclass(frozen=True)
class Method:
    """A method, and what it is given.

    Attributes:
        summary: one line.
        one_model: the student is made of the teacher's own model, if no other is named.
        pairs: the last stage needs preference pairs in addition to the data.
        makes: the teacher makes the data, from a folder of images.
    """

    summary: str
    one_model: bool = False
    pairs: bool = False
    makes: bool = False


METHODS = {
    "kd": Method("cross-entropy and KL to the teacher's distributions, after a connector stage"),
    "unlabelled": Method(
        "a folder of images without text: the teacher makes the data, then three stages", makes=True
    ),
    "llava_kd": Method(
        "LLaVA-KD: KL and relations of image tokens; pre-training, fine-tuning, distilled again"
    ),
    "llava_mod": Method(
        "LLaVA-MoD: dense to dense, dense to sparse experts, then preferences", pairs=True
    ),
    "sparse": Method("LLaVA-MoD's third stage alone: a chat model becomes sparse experts"),
    "matvlm": Method(
        "MaTVLM: a quarter of the layers becomes Mamba-2, seeded from attention", one_model=True
    ),
    "mmmamba": Method(
        "mmMamba: all layers become Mamba-2, taught layer by layer, then end to end", one_model=True
    ),
    "preference": Method("LLaVA-MoD's last stage alone: preference pairs, teacher as reference"),
}

SCENES = "scenes"
"""The starter whose teacher is shipped and whose data are drawn."""

HUB = "models from the Hub or folders, benchmarks from the Hub unless --offline"


def summaries() -> dict[str, str]:
    """{starter: one line}, what it needs from the Hub included."""
    lines = {SCENES: "the shipped scene teacher, on images that mmkd draws (needs no Hub)"}
    return lines | {name: f"{method.summary} (Hub)" for name, method in METHODS.items()}


@dataclass(frozen=True)
class Choices:
    """What the user names; paths and Hub ids as a recipe takes them."""

    teacher: str | None = None
    student: str | None = None
    data: str | None = None
    images: str | None = None
    pairs: str | None = None
    held_out: str | None = None
    offline: bool = False


def write_starter(method: str, choices: Choices, out: Path) -> None:
    """Write the method's recipe.

    Raises:
        MmkdError: there is no such method, a choice is missing, a model's folder does not exist, or
            the file is there already.
    """
    text = starter(method, choices, out)
    for key, model in (("teacher", choices.teacher), ("student", choices.student)):
        if model is not None:
            _check_model(f"--{key} {model}", model)
    if out.exists():
        raise MmkdError("it is there already", where=str(out), hint="name another file with --out")
    write_text(out, text)


def missing_files(choices: Choices) -> list[str]:
    """The data, images and pairs of the choices that do not exist (yet)."""
    given = (choices.data, choices.images, choices.pairs, choices.held_out)
    return [path for path in given if path and not path.startswith("hub:") and not _is_there(path)]


def _is_there(path: str) -> bool:
    if any(c in path for c in "*?[{"):  # a pattern of files
        return True
    return Path(path).exists()


def _check_model(where: str, model: str) -> None:
    """Check that a model is a folder with a config, or a possible Hub id; no Hub is asked."""
    folder = Path(model)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise MmkdError("the folder holds no model", where=where, hint="it needs a config.json")
    if not folder.is_dir() and (folder.exists() or not HUB_ID.fullmatch(model)):
        raise MmkdError(
            "no such model folder, and no Hub id", where=where, hint="check the path, or name an id"
        )


def starter(method: str, choices: Choices, out: Path) -> str:
    """The recipe's text; `out` is the file that its commands name."""
    known = METHODS.get(method)
    if known is None and method != SCENES:
        raise MmkdError(f"no method {method!r}", hint=nearest(method, [SCENES, *METHODS]))
    given = _scenes(choices) if known is None else _complete(method, known, choices)
    environment = Environment(
        loader=PackageLoader(__name__, "."),
        autoescape=False,  # it is YAML
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    text = environment.get_template(f"{method}.yaml").render(
        name=method.replace("_", "-"),
        out=shlex.quote(str(out)),
        **{k: _scalar(v) if isinstance(v, str) else v for k, v in given.items()},
    )
    from mmkd.recipe import load_recipe  # takes a moment, which a list of methods can do without

    load_recipe(parse_yaml(text))
    return text


def _scenes(choices: Choices) -> dict[str, Any]:
    """Where the scene teacher and the scenes are; `data` is the folder that they are built in."""
    for key in ("student", "images", "pairs", "held_out"):
        if getattr(choices, key) is not None:
            name = f"--{key.replace('_', '-')}"
            raise MmkdError(f"{SCENES} takes no {name}", hint="leave it out")
    teacher = choices.teacher or _shipped_teacher()
    if not Path(teacher).is_dir():
        raise MmkdError("no such model folder", where=teacher, hint="give --teacher FOLDER")
    folder = Path(choices.data or "data/scenes")
    return {
        "teacher": teacher,
        "folder": shlex.quote(str(folder)),
        "train": str(folder / "train.parquet"),
        "validation": str(folder / "validation.parquet"),
        "tasks": str(folder / "tasks"),
    }


def _shipped_teacher() -> str:
    """The folder of the scene teacher that the repository brings."""
    folder = Path(__file__).parents[3] / "assets" / "scenes_teacher"
    if not folder.is_dir():
        raise MmkdError(
            "the scene teacher comes with mmkd's repository, not with the package",
            hint="clone the repository and give --teacher assets/scenes_teacher",
        )
    return from_here(folder)


def _complete(name: str, method: Method, choices: Choices) -> dict[str, Any]:
    given = dict(vars(choices))
    if given["held_out"] is not None and not choices.offline:
        raise MmkdError("--held-out is for --offline", hint="leave it out, or give --offline")
    if method.one_model:
        given["student"] = given["student"] or given["teacher"]
    for key, takes in (("pairs", method.pairs), ("data", not method.makes)):
        if given[key] is not None and not takes:
            raise MmkdError(f"{name} takes no --{key}", hint="leave it out")
    needed = ["teacher", "student", "images" if method.makes else "data"]
    needed += ["pairs"] * method.pairs
    lost = [f"--{key}" for key in needed if given[key] is None]
    if lost:
        words = "".join(f" --{key} {key.upper()}" for key in needed)
        raise MmkdError(f"{name} needs {', '.join(lost)}", hint=f"mmkd init {name}{words}")
    for key in ("teacher", "student") if choices.offline else ():
        if not Path(given[key]).is_dir():
            raise MmkdError(
                f"--offline takes folders, and there is no folder {given[key]}",
                where=f"--{key}",
                hint="give a model's folder, or leave --offline out",
            )
    return given


def _scalar(text: str) -> str:
    """A string as YAML reads it back."""
    plain = PLAIN.fullmatch(text) and parse_yaml(text) == text
    return text if plain else json.dumps(text)
