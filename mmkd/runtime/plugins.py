"""`--plugin`: Python that a user brings, run before the recipe is read.

Only a command's words name it: a recipe never runs code.
"""

import importlib
import importlib.util
import sys
from pathlib import Path

from mmkd.errors import MmkdError
from mmkd.runtime.files import sha256

_files: dict[str, str] = {}


def load_plugin(name: str) -> None:
    """Run a file, or import a module.

    Args:
        name: path that ends in .py, or a module's name.

    Raises:
        MmkdError: it is not there, or fails.
    """
    where = f"--plugin {name}"
    path = Path(name)
    try:
        if path.suffix != ".py":
            module = importlib.import_module(name)
            file = getattr(module, "__file__", None)
            _files[name] = sha256(Path(file)) if file else "no file"
            return
        if not path.is_file():
            raise MmkdError("no such file", where=where, hint="check the path")
        spec = importlib.util.spec_from_file_location(f"mmkd_plugin_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    except MmkdError:
        raise
    except (Exception, SystemExit) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise MmkdError(
            f"it cannot be loaded ({reason})", where=where, hint="fix it, or leave it out"
        ) from error
    _files[name] = sha256(path)


def plugin_files() -> dict[str, str]:
    """Files and modules that were run, with the checksums of their files."""
    return dict(_files)
