"""Scene records in parts: some for a reference model, a pool of the others, and half of the pool.

python -m scripts.scenes_parts data/scenes/train.parquet data/scenes_parts --reference 2000

    data/scenes_parts/reference.parquet    the first records
    data/scenes_parts/pool.parquet         all others
    data/scenes_parts/half.parquet         half of the pool, chosen at random
"""

import argparse
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mmkd.runtime.files import writing
from mmkd.runtime.progress import console


def write_parts(train: Path, folder: Path, reference: int, seed: int = 0) -> dict[str, int]:
    """Write the parts.

    Args:
        train: file of records.
        folder: of the parts.
        reference: number of records for the reference model.
        seed: of the random half.

    Returns:
        The number of records by part.
    """
    table = pq.read_table(train)
    pool = table.slice(reference)
    half = sorted(random.Random(seed).sample(range(len(pool)), len(pool) // 2))
    parts = {"reference": table.slice(0, reference), "pool": pool, "half": pool.take(half)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        _write(folder / f"{name}.parquet", part)
    return {name: len(part) for name, part in parts.items()}


def _write(path: Path, table: pa.Table) -> None:
    with writing(path) as partial:
        pq.write_table(table, partial, row_group_size=500, compression="zstd")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("train", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--reference", type=int, default=2000)
    given = parser.parse_args()
    for name, written in write_parts(given.train, given.folder, given.reference).items():
        console.print(f"{written:,} records in {given.folder / name}.parquet")
