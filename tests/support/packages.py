"""Packages that are not really installed."""


def write_package(folder, name, code, version="1.0"):
    """An installed package, as Python's import and its metadata see one."""
    for path, text in (
        (folder / name / "__init__.py", code),
        (folder / f"{name}-{version}.dist-info" / "METADATA", f"Name: {name}\nVersion: {version}"),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
