"""Images that cannot be used."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

from tests.support.bad_inputs.table import FIRST, World, case, record
from tests.support.drawn_pictures import png

KIND = "image"


def picture(name: str) -> dict[str, Any]:
    return record(image=name)


@case(KIND, "named an image that is not there", FIRST + "no such image: gone.png", "data.images")
def missing_image(world: World) -> None:
    world.records(picture("gone.png"))


@case(
    KIND,
    "named an image on the web",
    FIRST + "https://example.org/a.png is a web address",
    "download it",
)
def image_on_the_web(world: World) -> None:
    world.records(picture("https://example.org/a.png"))


@case(
    KIND,
    "gave LLaVA-1.5 an image of 10000 x 2 pixels",
    FIRST + "the processor would resize",
    "an image of 10000 x 2 to",
    "crop or drop it",
)
def image_that_a_processor_blows_up(world: World) -> None:
    Image.new("1", (10_000, 2)).save("wide.png")
    path = Path("model/processor_config.json")
    settings = json.loads(path.read_text())
    settings["image_processor"]["size"] = {"shortest_edge": 336}
    path.write_text(json.dumps(settings))
    world.records(picture("wide.png"))


@case(KIND, "named a folder", FIRST + "model is not a file", "check data.images")
def image_is_a_folder(world: World) -> None:
    world.records(picture("model"))


@case(
    KIND,
    "gave bytes that are not an image",
    FIRST + "broken.png is not a readable image",
    "replace",
)
def broken_image(world: World) -> None:
    Path("broken.png").write_bytes(b"\x89PNG but not really")
    world.records(picture("broken.png"))


@case(KIND, "gave an image that was cut", FIRST + "cut.jpg is not a readable image", "replace")
def cut_image(world: World) -> None:
    Image.effect_noise((200, 200), 50).save("cut.jpg")
    content = Path("cut.jpg").read_bytes()
    Path("cut.jpg").write_bytes(content[: len(content) // 2])
    world.records(picture("cut.jpg"))


@case(
    KIND,
    "gave a format that is not read",
    FIRST + "picture.eps is not a readable image",
    "JPEG, PNG",
)
def format_that_is_not_read(world: World) -> None:
    Image.new("RGB", (64, 64)).save("picture.eps")
    world.records(picture("picture.eps"))


@case(
    KIND,
    "gave a small file of 900 million pixels",
    FIRST + "bomb.png is too large to decode",
    "shrink or drop it",
)
def decompression_bomb(world: World) -> None:
    Path("bomb.png").write_bytes(png(30_000, 30_000, rows=0))
    world.records(picture("bomb.png"))


@case(
    KIND,
    "gave an image with 32 bits per pixel",
    FIRST + "depth.tif has numbers of 32 bits",
    "8 or 16 bits",
)
def image_of_32_bits(world: World) -> None:
    Image.new("F", (64, 64), 0.5).save("depth.tif")
    world.records(picture("depth.tif"))


@case(
    KIND,
    "named an image outside the folder",
    FIRST + "../picture.png is outside of",
    "keep images",
)
def image_above(world: World) -> None:
    Path("images").mkdir()
    world.records(picture("../picture.png"))
    world.raw["data"]["images"] = "images"


@case(
    KIND,
    "named an image by an absolute path",
    FIRST + "/etc/passwd is outside of",
    "keep images",
)
def image_by_an_absolute_path(world: World) -> None:
    world.records(picture("/etc/passwd"))


@case(
    KIND,
    "linked to an image outside the folder",
    FIRST + "link.png is outside of",
    "targets of links",
)
def image_behind_a_link(world: World) -> None:
    Path("images").mkdir()
    Path("images/link.png").symlink_to("../picture.png")
    world.records(picture("link.png"))
    world.raw["data"]["images"] = "images"
