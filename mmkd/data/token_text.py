"""The text of single tokens.

A token is decoded after a letter, because some decoders remove white space at the start of a text.
"""

import re
from collections.abc import Callable
from functools import cache
from typing import Any

from mmkd.data.chat import special_tokens

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
"""A token of one byte, in tokenizers with byte fallback."""
_UNDECODED = "\N{REPLACEMENT CHARACTER}"


def is_byte(token: str) -> bool:
    """Whether a token is written as one byte, such as `<0xC3>`."""
    return _BYTE.fullmatch(token) is not None


def decoder(tokenizer: Any) -> Callable[[str], str]:
    """A function that returns the text of a token in the middle of a text."""
    decode = tokenizer.convert_tokens_to_string
    specials = {*special_tokens(tokenizer)}
    words = (t for t in tokenizer.get_vocab() if t not in specials)
    letter = next((t for t in words if _is_letter(t, decode)), "")
    before = [letter] if letter else []
    start = len(decode(before)) if letter else 0

    def text(token: str) -> str:
        return str(decode([*before, token])[start:])

    return text


def token_bytes(token: str, text: str) -> bytes:
    """The bytes of a token. A token may be a part of a character.

    Args:
        token: as the vocabulary writes it: bytes in GPT-2's alphabet, `<0xC3>`, or a text.
        text: the token decoded, with replacement characters for incomplete ones.
    """
    if (byte := _BYTE.fullmatch(token)) and text != token:
        return bytes([int(byte[1], 16)])
    if _UNDECODED in text and all(c in _alphabet() for c in token):
        return bytes(_alphabet()[c] for c in token)
    return text.encode("utf-8", "surrogatepass")


@cache
def _alphabet() -> dict[str, int]:
    """The characters that stand for the 256 bytes in byte-level BPE (GPT-2)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(256 + n): b for n, b in enumerate(others)}


def _is_letter(token: str, decode: Callable[[list[str]], str]) -> bool:
    """Whether a token is one letter of ASCII, with no white space around it."""
    return len(token) == 1 and token.isascii() and token.isalpha() and decode([token]) == token
