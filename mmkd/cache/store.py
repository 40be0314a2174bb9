"""A cache's folder.

manifest.json                 what was stored, how, and every shard's checksum; written last
settings.json                 the same without shards, while the cache is built
rows-RANK-NUMBER.safetensors  rows [n, words], the records' keys [m, 16] and ends [m]; where hidden
                              states are kept, hidden [h, H] float16 and hidden_ends [m]
rows-RANK-NUMBER.json         its size, checksum and counts
head.safetensors              with hidden states: a head of the same inner products as the teacher's
"""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmkd.cache.codec import RowCodec
from mmkd.errors import CheckpointError, DataError
from mmkd.runtime.files import sha256, write_json, writing
from mmkd.runtime.shapes import Manifest, Shape, Shard, read_if

SHARD_ROWS = 2**18
SHARD_BYTES = 2**30
HEAD = "head.safetensors"
MANIFEST, SETTINGS = "manifest.json", "settings.json"
FORMAT = 2
REBUILD = "build it with `mmkd cache RECIPE`"


class StoreWriter:
    """Writes to a cache's folder from one of several processes; existing rows are kept.

    Args:
        folder: of the cache.
        settings: what is stored and how; the same on every process.
        rank: of this process.

    Raises:
        CheckpointError: the folder holds another cache.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], rank: int):
        self.folder, self.rank = folder, rank
        self.settings = {"format": FORMAT, **settings}
        if (folder / SETTINGS).exists() and read_if(Shape, folder / SETTINGS) != self.settings:
            raise CheckpointError(
                "the folder holds another teacher's, data's or recipe's rows",
                where=str(folder),
                hint="name a new folder in teacher.cache, or delete this one",
            )
        if rank == 0:
            write_json(folder / SETTINGS, self.settings)
        self.codec = RowCodec(settings["vocabulary"], settings["k"])
        self.stored = {key for shard in _shards(folder) for key in _keys(folder / shard["file"])}
        self._rows: list[np.ndarray] = []
        self._hidden: list[Tensor] = []
        self._keys: list[bytes] = []
        taken = [int(p.stem.split("-")[2]) for p in folder.glob(f"rows-{rank}-*.json")]
        self._number = max(taken, default=-1) + 1

    def add(self, key: bytes, rows: np.ndarray, hidden: Tensor | None = None) -> None:
        """A record's rows, [n, words] uint64, and hidden states, [h, H] float16."""
        self._keys.append(key)
        self._rows.append(rows)
        if hidden is not None:
            self._hidden.append(hidden)
        size = sum(h.numel() * h.element_size() for h in self._hidden)
        if sum(map(len, self._rows)) >= SHARD_ROWS or size >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what has been added as a shard."""
        if not self._keys:
            return
        path = self.folder / f"rows-{self.rank}-{self._number}.safetensors"
        rows = np.concatenate(self._rows)
        ends = np.cumsum([len(r) for r in self._rows])
        tensors = {
            "rows": torch.from_numpy(rows.view(np.int64)),
            "ends": torch.from_numpy(ends),
            "keys": torch.frombuffer(bytearray(b"".join(self._keys)), dtype=torch.uint8).view(
                len(self._keys), -1
            ),
        }
        if self._hidden:
            tensors["hidden"] = torch.cat(self._hidden)
            tensors["hidden_ends"] = torch.tensor([len(h) for h in self._hidden]).cumsum(0)
        with writing(path) as partial:
            save_file(tensors, partial)
        facts = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        counts = {"records": len(ends), "rows": len(rows)}
        write_json(path.with_suffix(".json"), {"file": path.name, **facts, **counts})
        self._rows, self._keys, self._hidden = [], [], []
        self._number += 1

    def keep_head(self, weight: Tensor, bias: Tensor | None) -> None:
        """A head of the same inner products as the teacher's, [D, H] and [D]."""
        parts = {"weight": weight} | ({} if bias is None else {"bias": bias})
        path = self.folder / HEAD
        with writing(path) as partial:
            save_file({k: v.contiguous() for k, v in parts.items()}, partial)

    def finish(self, **facts: Any) -> None:
        """Mark the cache as complete, after all processes have flushed.

        Args:
            facts: further entries of the manifest, which are not compared.
        """
        shards = _shards(self.folder)
        write_json(self.folder / MANIFEST, {**self.settings, **facts, "shards": shards})


def drop_damaged(folder: Path) -> list[str]:
    """Delete shards that are missing, cut or changed, for a writer to make them again; returns
    their names. One process calls it, before there are writers."""
    dropped = []
    for path in folder.glob("rows-*.json"):
        shard = read_if(Shard, path)
        if shard is None or shard["file"] != path.with_suffix(".safetensors").name:
            path.unlink()
            dropped.append(path.name)
    for shard in _shards(folder):
        path = folder / shard["file"]
        if not path.is_file() or sha256(path) != shard["sha256"]:
            path.unlink(missing_ok=True)
            path.with_suffix(".json").unlink()
            dropped.append(path.name)
    return dropped


class Store:
    """Reads a complete cache.

    Raises:
        CheckpointError: it does not exist, is incomplete, or a shard is missing.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        path = folder / MANIFEST
        if not path.is_file():
            begun = "begun and not complete" if (folder / SETTINGS).exists() else "not there"
            raise CheckpointError(
                f"the teacher's cache is {begun}", where=str(folder), hint=REBUILD
            )
        kind = (read_if(Shape, path) or {}).get("format", FORMAT)
        if kind != FORMAT:
            raise CheckpointError(f"format {kind} is not known", where=str(path), hint=REBUILD)
        if (manifest := read_if(Manifest, path)) is None:
            raise CheckpointError("it cannot be read", where=str(path), hint=REBUILD)
        self.manifest, shards = manifest, manifest["shards"]
        for shard in shards:
            file = folder / shard["file"]
            if not file.is_file() or file.stat().st_size != shard["bytes"]:
                raise CheckpointError("it is missing or cut", where=str(file), hint=REBUILD)
        if self.hidden is not None and not (folder / HEAD).is_file():
            raise CheckpointError("it is missing", where=str(folder / HEAD), hint=REBUILD)
        self.codec = RowCodec(self.manifest["vocabulary"], self.manifest["k"])
        self._open: dict[tuple[int, str], np.ndarray] = {}
        self._sound: set[int] = set()

    @cached_property
    def _places(self) -> dict[bytes, tuple[int, slice, slice]]:
        """Shard, rows and hidden states of each record."""
        found: dict[bytes, tuple[int, slice, slice]] = {}
        for number, shard in enumerate(self.manifest["shards"]):
            with safe_open(self.folder / shard["file"], "pt") as file:
                ends = file.get_tensor("ends").tolist()
                hidden = ends if self.hidden is None else file.get_tensor("hidden_ends").tolist()
            keys = _keys(self.folder / shard["file"])
            for key, rows, states in zip(keys, _slices(ends), _slices(hidden), strict=True):
                found[key] = number, rows, states
        return found

    @property
    def hidden(self) -> dict[str, Any] | None:
        """Regions and width of the hidden states that are kept, if any are."""
        return self.manifest["hidden"]

    @cached_property
    def head(self) -> tuple[Tensor, Tensor | None]:
        """A head of the same inner products as the teacher's, [D, H] and [D] or None."""
        try:
            found = load_file(self.folder / HEAD)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                "it is missing or cut", where=str(self.folder / HEAD), hint=REBUILD
            ) from error
        return found["weight"], found.get("bias")

    def __len__(self) -> int:
        return sum(shard["records"] for shard in self.manifest["shards"])

    @property
    def rows(self) -> int:
        return sum(shard["rows"] for shard in self.manifest["shards"])

    @property
    def size(self) -> int:
        """Bytes of all shards."""
        return sum(shard["bytes"] for shard in self.manifest["shards"])

    @property
    def keys(self) -> list[bytes]:
        return list(self._places)

    def get(self, key: bytes, where: str) -> np.ndarray:
        """A record's rows, [n, words] uint64.

        Raises:
            DataError: the record is not stored; `where` is its position in the data.
        """
        number, rows, _ = self._place(key, where)
        return self._shard(number, "rows", np.uint64)[rows]

    def get_hidden(self, key: bytes, where: str) -> Tensor:
        """A record's hidden states, [h, H] float16; raises as `get`."""
        number, _, states = self._place(key, where)
        found = self._shard(number, "hidden", np.float16)[states]
        return torch.from_numpy(np.array(found))

    def _place(self, key: bytes, where: str) -> tuple[int, slice, slice]:
        place = self._places.get(key)
        if place is None:
            for number in range(len(self.manifest["shards"])):  # its key may be what is damaged
                self._check(number)
            raise DataError(
                f"its words and images are not in the teacher's cache {self.folder}",
                where=where,
                hint="the data has changed since: build the cache again",
            )
        return place

    def _shard(self, number: int, name: str, dtype: Any) -> np.ndarray:
        """A tensor of a shard, mapped."""
        if (number, name) not in self._open:
            path = self._check(number)
            self._open[number, name] = _mapped(path, name, dtype)
        return self._open[number, name]

    def _check(self, number: int) -> Path:
        """A shard's file, whose checksum is looked at once."""
        shard = self.manifest["shards"][number]
        path = self.folder / shard["file"]
        if number not in self._sound and sha256(path) != shard["sha256"]:
            raise CheckpointError("damaged (checksum)", where=str(path), hint=REBUILD)
        self._sound.add(number)
        return path


def _slices(ends: list[int]) -> list[slice]:
    return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _mapped(path: Path, name: str, dtype: Any) -> np.ndarray:
    """A tensor of a shard without reading it; safetensors says where it lies."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))[name]
    shape = tuple(header["shape"])
    if 0 in shape:  # nothing can be mapped
        return np.empty(shape, dtype)
    start = 8 + size + header["data_offsets"][0]
    return np.memmap(path, dtype=dtype, mode="r", offset=start, shape=shape)


def _keys(path: Path) -> list[bytes]:
    with safe_open(path, "pt") as file:
        return [bytes(row) for row in file.get_tensor("keys").numpy()]


def _shards(folder: Path) -> list[dict[str, Any]]:
    """Facts of all complete shards, by name. Facts that name the file of another are left out."""
    read = {path: read_if(Shard, path) for path in sorted(folder.glob("rows-*.json"))}
    return [
        shard
        for path, shard in read.items()
        if shard is not None and shard["file"] == path.with_suffix(".safetensors").name
    ]
