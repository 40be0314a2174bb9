"""Which tokens of a model stand for each token of another tokenizer."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mmkd.data.chat import special_tokens
from mmkd.data.generation import turn_ends
from mmkd.data.processing import image_token_id
from mmkd.data.token_text import decoder, is_byte, token_bytes
from mmkd.data.vocabulary import token_count

IMAGE, END = "image", "end of turn"
GENERAL = ("bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "sep_token",
           "mask_token")  # fmt: skip
"""Roles that a token may have in addition to one of its own."""


@dataclass(frozen=True)
class TokenMap:
    """For each new token, the old tokens whose embeddings it starts from.

    Attributes:
        sources: by new id, old ids: one if the tokens are equal, several for the mean of them,
            none if the id has no token or no old token has a part of its bytes.
        by_role: number of special tokens with an equal or with a token of the same role.
        equal: number of other tokens that both tokenizers have.
        composed: number of tokens that stand for several old ones.
    """

    sources: list[list[int]]
    by_role: int
    equal: int
    composed: int

    @property
    def unknown(self) -> int:
        """Number of ids without an old token."""
        return len(self.sources) - self.by_role - self.equal - self.composed


class Roles:
    """The special tokens of a processor by their role: the names that the tokenizer has for them,
    `IMAGE` and `END`."""

    def __init__(self, processor: Any):
        self.tokenizer = processor.tokenizer
        named = self.tokenizer.special_tokens_map
        self.tokens = {name: str(token) for name, token in named.items() if isinstance(token, str)}
        self.tokens[IMAGE] = self.tokenizer.convert_ids_to_tokens(image_token_id(processor))
        ends = sorted(turn_ends(processor)) or [self.tokenizer.eos_token_id]
        if ends[0] is not None:
            self.tokens[END] = self.tokenizer.convert_ids_to_tokens(ends[0])
        self.specials = {t: i for t, i in special_tokens(self.tokenizer).items() if not is_byte(t)}

    def counterpart(self, token: str, other: "Roles") -> int | None:
        """The id of the other processor's token with the role of this one's `token`; None if it has
        none. A role of its own counts before an equal text, and that before a general role."""
        roles = [r for r, t in self.tokens.items() if t == token and r in other.tokens]
        own = [r for r in (END, IMAGE, *roles) if r in roles and r not in GENERAL]
        names = [other.tokens[r] for r in own] + [token] + [other.tokens[r] for r in roles]
        return next((other.specials[n] for n in names if n in other.specials), None)


def map_tokens(old: Any, new: Any) -> TokenMap:
    """Find the old tokens of each new token.

    A special token comes from the old one of its role, or with the same text. Another token comes
    from the old token with the same bytes, otherwise from the tokens into which the old tokenizer
    cuts its text, and for a part of a character from the longest tokens that its bytes consist of.

    Args:
        old: the model's processor.
        new: the processor with the new tokenizer.
    """
    olds, news = Roles(old), Roles(new)
    known = _Known(olds)
    found: list[list[int]] = [[] for _ in range(token_count(new.tokenizer))]
    by_role = equal = 0
    texts: dict[int, bytes] = {}
    text = decoder(new.tokenizer)
    for token, number in new.tokenizer.get_vocab().items():
        if token in news.specials:
            partner = news.counterpart(token, olds)
            by_role += partner is not None
            data = token.encode()
        else:
            data = token_bytes(token, text(token))
            partner = known.same(token, data)
            equal += partner is not None
        if partner is None:
            texts[number] = data
        else:
            found[number] = [partner]
    for number, sources in known.composed(texts).items():
        found[number] = sources
    return TokenMap(found, by_role, equal, sum(bool(found[n]) for n in texts))


class _Known:
    """The tokens of the old tokenizer, other than special ones, by their bytes."""

    def __init__(self, roles: Roles):
        self.tokenizer = roles.tokenizer
        text = decoder(self.tokenizer)
        vocabulary = self.tokenizer.get_vocab()
        # The text of a byte counts before the byte itself.
        tokens = [t for t in vocabulary if t not in roles.specials]
        tokens.sort(key=lambda t: (is_byte(t), vocabulary[t]))
        self.bytes = {t: token_bytes(t, text(t)) for t in tokens}
        self.ids = vocabulary
        self.by_bytes = {self.bytes[t]: vocabulary[t] for t in reversed(tokens)}
        self.longest = max(map(len, self.by_bytes), default=0)

    def same(self, token: str, data: bytes) -> int | None:
        """The id of the token with the same bytes, preferably one that is also written alike."""
        if not data:
            return None
        alike = self.bytes.get(token) == data
        return self.ids[token] if alike else self.by_bytes.get(data)

    def composed(self, texts: Mapping[int, bytes]) -> dict[int, list[int]]:
        """The tokens of each text, by the same keys."""
        readable = {}
        for key, data in texts.items():
            try:
                readable[key] = data.decode()
            except UnicodeDecodeError:  # a part of a character
                continue
        cut = self.tokenizer([*readable.values()], add_special_tokens=False) if readable else {}
        unknown = self.tokenizer.unk_token_id
        found = {
            key: [i for i in ids if i != unknown]
            for key, ids in zip(readable, cut.get("input_ids", []), strict=True)
        }
        return {key: found.get(key) or self._cut(data) for key, data in texts.items()}

    def _cut(self, data: bytes) -> list[int]:
        """The longest tokens that bytes consist of, from the first byte on. Bytes without a token
        are left out."""
        ids, start = [], 0
        while start < len(data):
            ends: Iterable[int] = range(min(len(data), start + self.longest), start, -1)
            end = next((e for e in ends if data[start:e] in self.by_bytes), None)
            if end is not None:
                ids.append(self.by_bytes[data[start:end]])
            start = start + 1 if end is None else end
        return ids
