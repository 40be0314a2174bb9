"""Keys of a cache: hashes of a record's content and of a processor's settings."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from PIL import Image

KEY_BYTES = 16
HASH = "mmkd_hash"


def record_key(messages: Sequence[Any], pictures: Sequence[Image.Image]) -> bytes:
    """A hash of a record's text and decoded images."""
    seen = hashlib.blake2b(digest_size=KEY_BYTES)
    seen.update(json.dumps(messages, sort_keys=True).encode())
    for picture in pictures:
        seen.update(picture_hash(picture))
    return seen.digest()


def picture_hash(picture: Image.Image) -> bytes:
    """A hash of a decoded image; what stands in for one says it itself, in its `info`."""
    if HASH in picture.info:
        return bytes.fromhex(picture.info[HASH])
    seen = hashlib.blake2b(digest_size=KEY_BYTES)
    seen.update(repr((picture.mode, picture.size)).encode())
    seen.update(picture.tobytes())
    return seen.digest()


def processor_hash(processor: Any) -> str:
    """A hash of everything that determines a processor's tokens and pixels."""
    said = processor.to_dict() if hasattr(processor, "to_dict") else {}
    pictures = processor.image_processor.to_dict()
    words = sorted(processor.tokenizer.get_vocab().items())
    facts = [said, pictures, words, processor.chat_template]
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
