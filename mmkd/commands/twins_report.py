"""Twins of images as JSON, on the terminal and as a contact sheet."""

import textwrap
from collections import Counter
from collections.abc import Iterator
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from rich.markup import escape
from rich.table import Table

from mmkd.commands.find_twins import TRAINING, Group, Pair, Place, Side, Training, Twins
from mmkd.data.images import load_image
from mmkd.data.twins import HASH_BITS, NAME, image_hash
from mmkd.errors import DataError
from mmkd.runtime.progress import console

WIDTH = 80
SHOWN = 3
"""Number of pairs per task on the terminal."""
ON_SHEET = 24
THUMBNAIL, CELL, TEXT_ROWS, COLUMNS, CHARACTERS = 160, 168, 4, 3, 58


def as_json(twins: Twins) -> dict[str, Any]:
    """The results, with all pairs."""
    training = twins.training
    shown = Counter(place for places in training.places.values() for place in places)
    return {
        "hash": NAME,
        "hash_bits": HASH_BITS,
        "bits": twins.bits,
        "training": {
            "records": int(sum(mask.sum() for mask in training.trained)),
            "records with images": len(shown),
            "images": len(training.places),
            "images of several records": sum(len(p) > 1 for p in training.places.values()),
            "repeated records": training.repeated,
            "records to leave out": len(twins.left_out()),
            "images with a twin": sum(len(group.values) for group in twins.groups),
            "groups": [_group(training, group) for group in twins.groups],
        },
        "against": list(map(dict, _sides(twins))),
    }


def _group(training: Training, group: Group) -> dict[str, Any]:
    others = [value for value in group.values if value not in group.nearest]
    images = [training.places[value] for value in (*group.nearest, *others)]
    return {
        "bits": group.bits,
        "images": [[training.where(place) for place in places] for places in images],
    }


def _sides(twins: Twins) -> Iterator[dict[str, Any]]:
    where = twins.training.where
    for side, pairs, texts in zip(twins.sides, twins.pairs, twins.texts, strict=True):
        records = {place for pair in pairs for place in pair.training}
        records |= {place for places in texts.values() for place in places}
        yield {
            "name": side.name,
            "records": side.count,
            "unreadable": list(side.unreadable),
            "images": len(side.places),
            "images with a twin": len(pairs),
            "same question": len({place for pair in pairs for place in pair.asked}),
            "same text": len(texts),
            "training records": len(records),
            "pairs": [
                {
                    "bits": pair.bits,
                    "of": [twins.name(side, place) for place in pair.of],
                    "same question": [twins.name(side, place) for place in pair.asked],
                    "training": list(map(where, pair.training)),
                }
                for pair in pairs
            ],
            "texts": [
                {"of": twins.name(side, document), "training": list(map(where, places))}
                for document, places in texts.items()
            ],
        }


def print_twins(found: dict[str, Any] | None) -> None:
    """A table of counts, a table of the first pairs, and what was written."""
    if found is None:
        console.print("Twins were not looked for, because a source cannot be read.")
        return
    own = found["training"]
    console.print(_counts(found))
    if own["repeated records"]:
        console.print(
            f"{own['repeated records']:,} training records repeat the images and questions of "
            "another one",
            soft_wrap=True,
            highlight=False,
        )
    for side in found["against"]:
        if side["unreadable"]:
            console.print(
                f"{escape(side['name'])}: {len(side['unreadable']):,} documents cannot be "
                f"compared, the first: {escape(side['unreadable'][0])}",
                soft_wrap=True,
                highlight=False,
            )
    if any(True for _ in _pairs(found)):
        table = Table(width=min(WIDTH, console.width), title="nearest pairs; all: --json")
        table.add_column("bits", justify="right")
        table.add_column("against", overflow="fold")
        table.add_column("its image", overflow="fold")
        table.add_column("training record", overflow="fold")
        for row in _pairs(found):
            table.add_row(*row)
        console.print(table)
    if "drop" in found:
        for label, count in found["drop"]["records"].items():
            console.print(
                f"{escape(label)}: {count:,} records are listed in {escape(found['drop']['file'])}",
                soft_wrap=True,
                highlight=False,
            )
        console.print(
            f"To train without them: data: {{leave_out: {escape(found['drop']['file'])}}}",
            soft_wrap=True,
            highlight=False,
        )
    if found.get("sheet"):
        console.print(f"wrote {escape(found['sheet'])}", soft_wrap=True, highlight=False)


def _counts(found: dict[str, Any]) -> Table:
    title = f"twins: at most {found['bits']} of {found['hash_bits']} bits differ"
    table = Table(title=title)
    table.add_column("images of", overflow="fold", width=22)
    columns = {"images": 9, "with a twin": 7, "same question": 8, "same text": 7}
    for name, width in {**columns, "training records": 8}.items():
        table.add_column(name, justify="right", width=width)
    own = found["training"]
    table.add_row(TRAINING, f"{own['images']:,}", f"{own['images with a twin']:,}", "", "", "")
    for side in found["against"]:
        keys = ("images", "images with a twin", "same question", "same text", "training records")
        table.add_row(escape(side["name"]), *(f"{side[key]:,}" for key in keys))
    return table


def _pairs(found: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    for group in found["training"]["groups"][:SHOWN]:
        (first, *_), (second, *_) = group["images"][:2]
        yield str(group["bits"]), TRAINING, escape(first), escape(second)
    for side in found["against"]:
        for pair in side["pairs"][:SHOWN]:
            of, training = escape(pair["of"][0]), escape(pair["training"][0])
            yield str(pair["bits"]), escape(side["name"]), of, training
        for text in side["texts"][:SHOWN]:
            yield "text", escape(side["name"]), escape(text["of"]), escape(text["training"][0])


def twins_sheet(twins: Twins) -> Image.Image | None:
    """A contact sheet of at most `ON_SHEET` pairs, of each side those with the most differing bits
    first; None if there are no twins."""
    cells = [(a, b, text) for a, b, text in _cells(twins) if a is not None and b is not None]
    if not cells:
        return None
    columns = min(COLUMNS, len(cells))
    width, height = 2 * CELL, CELL + 13 * TEXT_ROWS
    sheet = Image.new("RGB", (columns * width, -(-len(cells) // columns) * height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=10)
    for i, (first, second, text) in enumerate(cells):
        left, top = (i % columns) * width, (i // columns) * height
        for image, x in ((first, left), (second, left + CELL)):
            scale = THUMBNAIL / max(image.size)
            size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
            sheet.paste(image.resize(size), (x + 2, top + 2))
        lines = [line for part in text.split("\n") for line in textwrap.wrap(part, CHARACTERS)]
        shown = "\n".join(lines[:TEXT_ROWS])
        draw.multiline_text((left + 2, top + CELL), shown, fill="black", font=font, spacing=1)
    return sheet


def _cells(twins: Twins) -> Iterator[tuple[Image.Image | None, Image.Image | None, str]]:
    training = twins.training
    several = sum(map(bool, [twins.groups, *twins.pairs]))
    each = ON_SHEET // max(1, several) or 1
    for group in twins.groups[::-1][:each]:
        first, second = (training.places[value][0] for value in group.nearest)
        images = [_image(training, training.places[v][0], v) for v in group.nearest]
        text = f"{group.bits} bits: {training.where(first)}\n{training.where(second)}"
        yield images[0], images[1], text
    for side, pairs in zip(twins.sides, twins.pairs, strict=True):
        for pair in sorted(pairs, key=lambda pair: -pair.bits)[:each]:
            nearest = training.places[pair.nearest][0]
            text = (
                f"{pair.bits} bits, {side.name}: {twins.name(side, pair.of[0])}\n"
                f"{training.where(nearest)}"
            )
            yield _of_side(training, side, pair), _image(training, nearest, pair.nearest), text


def _of_side(training: Training, side: Side, pair: Pair) -> Image.Image | None:
    if side.held_out:
        return _image(training, pair.of[0], pair.value)
    return side.thumbnails.get(pair.value)


def _image(training: Training, place: Place, value: int) -> Image.Image | None:
    """The image of a record that has a hash."""
    try:
        record = training.sources[place[0]][place[1]]
        images = (load_image(ref, record.root) for ref in record.images)
        return next((image for image in images if image_hash(image) == value), None)
    except DataError:  # another image of the record
        return None
