"""Scene images as a folder without text, and the records about the same images.

python -m scripts.scenes_photos data/scenes/train.parquet data/scenes_photos --count 2000

    data/scenes_photos/0000.png ...    images
    data/scenes_photos.parquet         their records, with the scenes' own answers
"""

import argparse
from pathlib import Path

import pyarrow.parquet as pq

from mmkd.runtime.files import writing
from mmkd.runtime.progress import console


def write_photos(train: Path, folder: Path, count: int) -> None:
    """Write the images of the first records, and these records.

    Args:
        train: file of records with one image each.
        folder: of the images.
        count: number of records.
    """
    table = pq.read_table(train).slice(0, count)
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(table["image"]):
        (folder / f"{number:04d}.png").write_bytes(image["bytes"].as_py())
    with writing(folder.with_suffix(".parquet")) as partial:
        pq.write_table(table, partial, compression="zstd")
    console.print(f"{len(table):,} images in {folder}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("train", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=2000)
    given = parser.parse_args()
    write_photos(given.train, given.folder, given.count)
