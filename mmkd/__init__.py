"""mmkd: distil large vision-language models into small ones."""

import sys

# `python -m mmkd.cli`, which torchrun starts too, has put the working directory in front of
# Python's path: a torch.py in a folder of data would be imported from here on. Other programs keep
# theirs.
if sys.argv[:1] == ["-m"] and "mmkd.cli" in sys.orig_argv and not sys.flags.safe_path:
    del sys.path[0]

__version__: str


def __getattr__(name: str) -> str:
    if name == "__version__":
        from importlib.metadata import version  # takes a tenth of a second

        return version("mmkd")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
