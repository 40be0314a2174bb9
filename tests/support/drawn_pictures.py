"""PNG files by their bytes, for sizes that no library would write."""

import struct
import zlib


def png(width: int, height: int, *, rows: int | None = None) -> bytes:
    """A black PNG of one bit per pixel.

    Args:
        width, height: what its header says, in pixels.
        rows: how many rows of pixels it has; default: `height`.
    """
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    row = b"\0" * (1 + (width + 7) // 8)
    pixels = zlib.compress(row * (height if rows is None else rows), 9)
    parts = (_chunk(b"IHDR", header), _chunk(b"IDAT", pixels), _chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _chunk(kind: bytes, content: bytes) -> bytes:
    whole = kind + content
    return struct.pack(">I", len(content)) + whole + struct.pack(">I", zlib.crc32(whole))
