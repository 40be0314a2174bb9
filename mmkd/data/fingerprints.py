"""Fingerprints of records, to find images and texts that occur twice."""

from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np

from mmkd.data.overlap import question_keys, run_keys
from mmkd.data.schema import Record, text_of


@dataclass(frozen=True)
class Wanted:
    """What to look for in records.

    Attributes:
        texts: keys of texts that records without images are compared with, [n] uint64.
    """

    texts: np.ndarray


@dataclass
class Fingerprints:
    """Fingerprints of some records of a source.

    Attributes:
        images: index of a record, and the hash of an image that it shows.
        whole: index of a record with images, and a 64-bit key of its images and questions.
        texts: index of a record without images, and a key of `Wanted.texts` that occurs in it.
    """

    images: list[tuple[int, int]] = field(default_factory=list)
    whole: list[tuple[int, int]] = field(default_factory=list)
    texts: list[tuple[int, int]] = field(default_factory=list)

    def add(self, others: "Fingerprints") -> None:
        """Append the fingerprints of further records."""
        self.images += others.images
        self.whole += others.whole
        self.texts += others.texts

    def of_record(self, index: int, record: Record, hashes: list[int], wanted: Wanted) -> None:
        """Append the fingerprints of a record.

        Args:
            index: of the record.
            record: the record.
            hashes: of its images that could be decoded.
            wanted: what to look for.
        """
        if record.images:
            self.images += [(index, value) for value in hashes]
            words = repr((hashes, sorted(asked_keys(record)))).encode()
            key = int.from_bytes(blake2b(words, digest_size=8).digest())
            self.whole.append((index, key))
        elif len(wanted.texts):
            said = "\n".join(text_of(message) for message in record.messages)
            asked = np.fromiter(asked_keys(record), dtype=np.uint64)
            keys = np.intersect1d(np.concatenate([asked, run_keys(said)]), wanted.texts)
            self.texts += [(index, key) for key in keys.tolist()]


def asked_keys(record: Record) -> set[int]:
    """Keys of the questions of a record."""
    turns = (text_of(m) for m in record.messages if m["role"] == "user")
    return {key for turn in turns for key in question_keys(turn)}
