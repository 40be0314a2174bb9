"""Near-duplicate images by perceptual hash.

The hash is pHash with 256 bits: which of the 16 x 16 lowest frequencies of a cosine transform of
the grey image at 64 x 64 pixels are above their median. ImageHash computes it. Two images are twins
if at most `BITS` of the bits differ.

64 bits are too few for images of one kind: at the usual 4 of 64 bits, 9 % of the held-out scene
images have an unrelated twin, and with 256 bits none has. PDQ, the hash of the package pdqhash,
moves by up to 52 of its 256 bits if a scene image is scaled by 0.9, and pHash by 12. Unrelated
scene images differ by 20 bits and more in both (`python -m benchmarks.twins`).
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from mmkd.errors import DataError, MmkdError
from mmkd.runtime.progress import track

SIDE = 16
HASH_BITS = SIDE * SIDE
"""Number of bits of a hash."""
BITS = 16
"""Most bits in which two twins differ, by default: as a share, 4 of 64."""
MOST_BITS = 64
"""Largest number of bits that can be asked for. Unrelated images differ by half of all bits, with a
standard deviation of 8."""
NAME = f"pHash, {HASH_BITS} bits"
INSTALL = "pip install 'mmkd[data]'"
MOST_PAIRS = 20_000_000
MANY = 100_000
"""From this number of hashes on, the search takes seconds and has a progress bar."""
KEY_BITS = 62


def require_hash() -> Any:
    """The module `imagehash`.

    Raises:
        MmkdError: ImageHash is not installed.
    """
    try:
        import imagehash
    except ImportError as error:
        raise MmkdError("twins of images need the package ImageHash", hint=INSTALL) from error
    return imagehash


def image_hash(image: Image.Image) -> int:
    """The perceptual hash of an image, below 2**256.

    It does not depend on colours, and hardly on size, compression and brightness. It does depend on
    cropping, rotation and mirroring. All images of a single colour have the same hash, except for
    one bit of black ones.

    Args:
        image: decoded, of any mode.

    Raises:
        MmkdError: ImageHash is not installed.
    """
    found = require_hash().phash(image, hash_size=SIDE)
    return int.from_bytes(np.packbits(found.hash).tobytes())


def as_array(hashes: Sequence[int]) -> np.ndarray:
    """Hashes as rows of bytes, [n, 32] uint8."""
    joined = b"".join(h.to_bytes(HASH_BITS // 8) for h in hashes)
    return np.frombuffer(joined, dtype=np.uint8).reshape(-1, HASH_BITS // 8)


def twin_groups(hashes: Sequence[int], bits: int = BITS) -> list[list[int]]:
    """Groups of images of which each is a twin of another one of its group.

    Two images of a group may differ by more than `bits`, if there is a chain of twins between them.

    Args:
        hashes: of `image_hash`.
        bits: most bits in which twins differ.

    Returns:
        The indices of each group with at least two images, ascending, ordered by the first one.

    Raises:
        DataError: there are more than `MOST_PAIRS` pairs of different hashes.
    """
    members: dict[int, list[int]] = defaultdict(list)
    for index, value in enumerate(hashes):
        members[value].append(index)
    left, right, _ = near_pairs(as_array([*members]), bits)
    shown = [*members.values()]
    joined = [sorted(i for k in group for i in shown[k]) for group in connected(
        len(shown), zip(left.tolist(), right.tolist(), strict=True)
    )]  # fmt: skip
    return sorted(group for group in joined if len(group) > 1)


def connected(count: int, pairs: Iterator[tuple[int, int]]) -> list[list[int]]:
    """Connected components of a graph, single nodes included.

    Args:
        count: number of nodes.
        pairs: edges.
    """
    above = list(range(count))

    def top(node: int) -> int:
        while above[node] != node:
            above[node] = above[above[node]]
            node = above[node]
        return node

    for a, b in pairs:
        a, b = sorted((top(a), top(b)))
        above[b] = a
    groups: dict[int, list[int]] = defaultdict(list)
    for node in range(count):
        groups[top(node)].append(node)
    return [*groups.values()]


def near_pairs(hashes: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All pairs of hashes that differ in at most `bits` bits.

    The positions are divided into `bits + 1` bands. At most `bits` bands of a pair can differ, so
    at least one is equal: only hashes with an equal band are compared. Nothing is missed.

    Args:
        hashes: [n, 32] uint8. Rows should be different from each other, because n equal rows are
            n * (n - 1) / 2 pairs.
        bits: from 0 to `MOST_BITS`.

    Returns:
        Indices of the first and of the second hash, and their distance, three arrays [pairs] int64,
        ordered by first and second; first < second.

    Raises:
        DataError: there are more than `MOST_PAIRS` pairs.
    """
    if not 0 <= bits <= MOST_BITS:
        raise DataError(f"twins within {bits} bits", hint=f"give 0 to {MOST_BITS} bits")
    count = len(hashes)
    words = np.ascontiguousarray(hashes).view(np.uint64)
    found = np.empty(0, dtype=np.int64)
    bands = range(bits + 1)
    for band in track(bands, "comparing images", len(bands), quiet=count < MANY):
        keys = _keys(hashes, range(band, HASH_BITS, bits + 1)[:KEY_BITS])
        parts = [found]
        for first, second in _equal(keys):
            near = np.bitwise_count(words[first] ^ words[second]).sum(axis=1) <= bits
            low, high = np.minimum(first, second)[near], np.maximum(first, second)[near]
            parts.append(low * count + high)
            if sum(map(len, parts)) > 2 * MOST_PAIRS:
                parts = [np.unique(np.concatenate(parts))]
        found = np.unique(np.concatenate(parts))
        if len(found) > MOST_PAIRS:
            raise DataError(
                f"more than {MOST_PAIRS:,} pairs of images differ in at most {bits} bits",
                hint="give fewer bits",
            )
    left, right = np.divmod(found, max(count, 1))
    return left, right, np.bitwise_count(words[left] ^ words[right]).sum(axis=1).astype(np.int64)


def _keys(hashes: np.ndarray, positions: Sequence[int]) -> np.ndarray:
    """The bits at some positions as numbers, [n] uint64."""
    keys = np.zeros(len(hashes), dtype=np.uint64)
    for position in positions:
        bit = (hashes[:, position // 8] >> (7 - position % 8)) & 1
        keys <<= np.uint64(1)
        keys |= bit
    return keys


def _equal(keys: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields indices of all pairs with equal keys, in parts of at most n pairs."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    active = np.arange(len(keys))
    for step in range(1, len(keys)):
        active = active[: np.searchsorted(active, len(keys) - step)]
        active = active[ordered[active] == ordered[active + step]]
        if not len(active):
            return
        yield order[active], order[active + step]
