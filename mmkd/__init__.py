"""mmkd: distil large vision-language models into small ones."""

from importlib.metadata import version

__version__ = version("mmkd")
