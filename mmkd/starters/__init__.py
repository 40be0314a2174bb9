"""`mmkd init`: a commented recipe of a published method, for a pair of models of the user's.

The stages of the templates beside this file are those of `configs/`; a test compares them.
"""

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from mmkd.errors import MmkdError, nearest
from mmkd.files import write_text

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
PLAIN = re.compile(r"[\w./~-]+", re.ASCII)


@dataclass(frozen=True)
class Method:
    """A method, and what it is given.

    Attributes:
        summary: one line.
        one_model: the student is made of the teacher's own model, if no other is named.
        pairs: the last stage needs preference pairs beside the data.
    """

    summary: str
    one_model: bool = False
    pairs: bool = False


METHODS = {
    "kd": Method("cross-entropy and KL to the teacher's distributions, after a connector stage"),
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


@dataclass(frozen=True)
class Choices:
    """What the user names; paths and Hub ids as a recipe takes them."""

    teacher: str | None = None
    student: str | None = None
    data: str | None = None
    images: str | None = None
    pairs: str | None = None


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
        raise MmkdError("it is there already", where=str(out), mend="name another file with --out")
    write_text(out, text)


def missing_files(choices: Choices) -> list[str]:
    """The data, pictures and pairs of the choices that are not there, or not yet."""
    given = (choices.data, choices.images, choices.pairs)
    return [path for path in given if path and not path.startswith("hub:") and not _is_there(path)]


def _is_there(path: str) -> bool:
    if any(c in path for c in "*?[{"):  # a pattern of files
        return True
    return Path(path).exists()


def _check_model(where: str, model: str) -> None:
    """A model is a folder with a config, or it can be an id on the Hub, which is not asked here."""
    folder = Path(model)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise MmkdError("the folder holds no model", where=where, mend="it needs a config.json")
    if not folder.is_dir() and (folder.exists() or not HUB_ID.fullmatch(model)):
        raise MmkdError(
            "no such model folder, and no Hub id", where=where, mend="check the path, or name an id"
        )


def starter(method: str, choices: Choices, out: Path) -> str:
    """The recipe's text; `out` is the file that its commands name."""
    known = METHODS.get(method)
    if known is None:
        raise MmkdError(f"no method {method!r}", mend=nearest(method, list(METHODS)))
    given = _complete(method, known, choices)
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
        **{key: None if value is None else _scalar(value) for key, value in given.items()},
    )
    from mmkd.recipe import load_recipe  # takes a moment, which a list of methods can do without

    load_recipe(yaml.safe_load(text))
    return text


def _complete(name: str, method: Method, choices: Choices) -> dict[str, str | None]:
    given = dict(vars(choices))
    if method.one_model:
        given["student"] = given["student"] or given["teacher"]
    if given["pairs"] is not None and not method.pairs:
        raise MmkdError(f"{name} takes no --pairs", mend="leave it out")
    needed = ["teacher", "student", "data"] + ["pairs"] * method.pairs
    lost = [f"--{key}" for key in needed if given[key] is None]
    if lost:
        words = "".join(f" --{key} {key.upper()}" for key in needed)
        raise MmkdError(f"{name} needs {', '.join(lost)}", mend=f"mmkd init {name}{words}")
    return given


def _scalar(text: str) -> str:
    """A string as YAML reads it back."""
    plain = PLAIN.fullmatch(text) and yaml.safe_load(text) == text
    return text if plain else json.dumps(text)
