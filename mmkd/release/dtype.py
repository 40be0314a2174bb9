"""Weights of a release in another dtype than the student's."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from mmkd.errors import CheckpointError
from mmkd.modeling.foreign_models import read_settings
from mmkd.modeling.loading import DTYPES, load_pretrained
from mmkd.modeling.quiet import quiet_libraries
from mmkd.runtime import consent
from mmkd.runtime.files import tensors_in
from mmkd.students.write import SHARD_SIZE

_FLOATS = {"F64", "F32", "F16", "BF16"}
_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class Rounded:
    """A file of weights that will be written in another dtype.

    Attributes:
        source: a safetensors file of the student.
        dtype: float32, bfloat16 or float16.
    """

    source: Path
    dtype: str

    @property
    def size(self) -> int:
        """Bytes of its tensors in that dtype. The few that stay float32 count as that dtype too."""
        item = DTYPES[self.dtype].itemsize
        return sum(
            prod(shape) * (item if dtype in _FLOATS else _BYTES.get(dtype, 1))
            for dtype, shape in tensors_in(self.source).values()
        )


def stored_dtype(student: Path) -> str:
    """The dtype in the config of a student's folder.

    Raises:
        CheckpointError: the config is damaged, or names a dtype that no student has.
    """
    path = student / "config.json"
    config = read_settings(path)
    found = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    if found not in DTYPES:
        raise CheckpointError(
            f"it is damaged (dtype {found!r})", where=str(path), hint=f"write {', '.join(DTYPES)}"
        )
    return found


def write_rounded(student: Path, folder: Path, dtype: str) -> None:
    """Write config and weights in `dtype`, then load them and compare every tensor.

    Parameters that a model class keeps in float32, such as the decay of Mamba layers, stay float32.

    Raises:
        CheckpointError: a weight has no finite value in `dtype`, or what was written differs.
    """
    consent.inherit(folder, str(student))
    model = load_pretrained(str(student), dtype=DTYPES[dtype])
    with quiet_libraries():
        model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    _compare(student, folder, DTYPES[dtype])
    again = load_pretrained(str(folder), dtype="auto").state_dict()
    for name, tensor in model.state_dict().items():
        _require(name, again[name].dtype == tensor.dtype, folder)
        _require(name, torch.equal(again[name], tensor), folder)


def _compare(student: Path, folder: Path, dtype: torch.dtype) -> None:
    """Raise CheckpointError unless the written tensors are the student's, rounded once."""
    written = dict(_tensors(folder))
    for name, tensor in _tensors(student):
        found = written.pop(name, None)
        _require(name, found is not None, folder)
        assert found is not None
        if tensor.is_floating_point() and not found.isfinite().all() and tensor.isfinite().all():
            raise CheckpointError(
                f"{name} has values outside the range of {str(dtype).removeprefix('torch.')}",
                where=str(student),
                hint="release it in bfloat16 or float32",
            )
        kept = found.dtype in (dtype, torch.float32, tensor.dtype)
        _require(name, kept and torch.equal(found, tensor.to(found.dtype)), folder)
    for name in written:
        _require(name, False, folder)


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    with ExitStack() as stack:
        for path in sorted(folder.glob("*.safetensors")):
            file = stack.enter_context(safe_open(path, "pt"))
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)


def _require(name: str, equal: bool, folder: Path) -> None:
    if not equal:
        raise CheckpointError(
            f"{name} is not the student's weight in this dtype",
            where=str(folder),
            hint="leave release.dtype out",
        )
