"""A contact sheet of clusters: a row for each, with images of some of its records."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mmkd.data.images import load_image
from mmkd.data.records import Records
from mmkd.errors import DataError, MmkdError
from mmkd.runtime.files import writing

COLUMNS, ROWS = 10, 50
THUMBNAIL, CELL, LABEL = 96, 100, 16


def check_sheet(sheet: Path | None) -> None:
    """Check the name of a contact sheet.

    Raises:
        MmkdError: it is not that of a PNG file.
    """
    if sheet is not None and sheet.suffix.lower() != ".png":
        raise MmkdError(
            "--sheet writes PNG", where=str(sheet), hint="name a file that ends in .png"
        )


def write_cluster_sheet(path: Path, records: Records, labels: np.ndarray) -> None:
    """Write a PNG file with the first image of up to `COLUMNS` records of each cluster, evenly
    spread. Only the first `ROWS` clusters are shown.

    Args:
        path: the file.
        records: the records.
        labels: [N], the cluster of each record, NaN for none.

    Raises:
        CheckpointError: it cannot be written.
    """
    count = min(ROWS, int(np.nanmax(labels)) + 1)
    height = CELL + LABEL
    sheet = Image.new("RGB", (COLUMNS * CELL, count * height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for cluster in range(count):
        own, top = np.flatnonzero(labels == cluster), cluster * height
        draw.text((2, top + 1), f"cluster {cluster}: {len(own):,} records", "black", font)
        places = np.unique(np.linspace(0, len(own) - 1, COLUMNS).astype(int))
        images = [image for index in own[places].tolist() if (image := _first(records, index))]
        for column, image in enumerate(images):
            image.thumbnail((THUMBNAIL, THUMBNAIL))
            sheet.paste(image, (column * CELL + 2, top + LABEL))
    with writing(path) as partial:
        sheet.save(partial, "PNG")


def _first(records: Records, index: int) -> Image.Image | None:
    """The first image of a record; None if it has none, or if it cannot be read."""
    try:
        record = records[index]
        return load_image(record.images[0], record.root) if record.images else None
    except DataError:
        return None
