"""mmkd: distil large vision-language models into small ones."""

__version__: str


def __getattr__(name: str) -> str:
    if name == "__version__":
        from importlib.metadata import version  # takes a tenth of a second

        return version("mmkd")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
