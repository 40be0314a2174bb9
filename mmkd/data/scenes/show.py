"""A contact sheet of a built data set: pictures with their questions and answers."""

import textwrap
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

from mmkd.data.images import load_image
from mmkd.errors import DataError

PICTURE, TEXT_WIDTH, ROW, COLUMNS = 192, 330, 216, 3
LINES, CHARACTERS = 13, 52


def contact_sheet(folder: Path, count: int = 24) -> Image.Image:
    """The first `count` training pictures, enlarged, with what is asked about them.

    Raises:
        DataError: the folder holds no scene data set.
    """
    path = folder / "train.parquet"
    if not path.is_file():
        raise DataError(
            "no train.parquet", where=str(folder), hint="build it: mmkd data build scenes"
        )
    rows = next(pq.ParquetFile(path).iter_batches(count)).to_pylist()
    columns = min(COLUMNS, len(rows))
    width = columns * (PICTURE + TEXT_WIDTH)
    sheet = Image.new("RGB", (width, -(-len(rows) // columns) * ROW), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for i, row in enumerate(rows):
        left, top = (i % columns) * (PICTURE + TEXT_WIDTH), (i // columns) * ROW
        picture = load_image(row["image"], None)
        side = PICTURE - 12
        sheet.paste(picture.resize((side, side), Image.Resampling.NEAREST), (left + 6, top + 18))
        draw.text((left + 6, top + 2), row["id"], fill="grey", font=font)
        draw.multiline_text(
            (left + PICTURE, top + 6), _exchanges(row["conversations"]), fill="black", font=font
        )
    return sheet


def _exchanges(turns: list[dict[str, str]]) -> str:
    lines: list[str] = []
    for question, answer in zip(turns[::2], turns[1::2], strict=True):
        text = question["value"].removeprefix("<image>\n") + " > " + answer["value"]
        lines += textwrap.wrap(text, CHARACTERS, subsequent_indent="    ")
    return "\n".join(lines[:LINES])
