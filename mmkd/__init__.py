"""mmkd: distil large vision-language models into small ones.

    import mmkd

    mmkd.run("recipe.yaml")                                    # a recipe, as the command runs it
    made = mmkd.distill(student, teacher, records, ["kl"], steps=100)   # models in memory
    print(mmkd.generate(made.student, "What is this?", image, processor=made.processor).text)

`docs/python.md` is the tutorial. Names are imported when they are first used (PEP 562): this module
imports neither torch nor transformers. mmkd reports by Python's `logging`, to the logger `mmkd`;
`mmkd.log_to_console()` prints all of it as the command does.
"""

import sys

# `python -m mmkd.cli`, which torchrun starts too, has put the working directory in front of
# Python's path: a torch.py in a folder of data would be imported from here on. Other programs keep
# theirs.
if sys.argv[:1] == ["-m"] and "mmkd.cli" in sys.orig_argv and not sys.flags.safe_path:
    del sys.path[0]

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmkd import ops
    from mmkd.api.distill import Distilled, distill
    from mmkd.api.models import convert, evaluate, generate
    from mmkd.api.pieces import build_encoder, build_objective
    from mmkd.api.runs import run
    from mmkd.errors import MmkdError
    from mmkd.modeling.capture import capture
    from mmkd.objectives import Objective, ObjectiveConfig, Targets, add_objective, score
    from mmkd.recipe import Conversion, ConversionConfig, Recipe, add_conversion, load_recipe
    from mmkd.runtime.progress import log_to_console
    from mmkd.training.callbacks import Callback

    __version__: str

_MODULES = {
    "mmkd.api.distill": ("Distilled", "distill"),
    "mmkd.api.models": ("convert", "evaluate", "generate"),
    "mmkd.api.pieces": ("build_encoder", "build_objective"),
    "mmkd.api.runs": ("run",),
    "mmkd.errors": ("MmkdError",),
    "mmkd.modeling.capture": ("capture",),
    "mmkd.objectives": ("Objective", "ObjectiveConfig", "Targets", "add_objective", "score"),
    "mmkd.recipe": (
        *("Conversion", "ConversionConfig", "Recipe", "add_conversion", "load_recipe"),
    ),
    "mmkd.runtime.progress": ("log_to_console",),
    "mmkd.training.callbacks": ("Callback",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "__version__":
        from importlib.metadata import version  # takes a tenth of a second

        return version("mmkd")
    if name == "ops":
        return import_module("mmkd.ops")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "Callback",
    "Conversion",
    "ConversionConfig",
    "Distilled",
    "MmkdError",
    "Objective",
    "ObjectiveConfig",
    "Recipe",
    "Targets",
    "__version__",
    "add_conversion",
    "add_objective",
    "build_encoder",
    "build_objective",
    "capture",
    "convert",
    "distill",
    "evaluate",
    "generate",
    "load_recipe",
    "log_to_console",
    "ops",
    "run",
    "score",
]
