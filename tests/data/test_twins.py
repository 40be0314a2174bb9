"""Twins of images: scene images under changes, and neighbours compared with brute force."""

import io
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmkd.data import twins
from mmkd.data.overlap import WORDS, question_keys, run_keys
from mmkd.data.twins import BITS, HASH_BITS, as_array, image_hash, near_pairs, twin_groups
from mmkd.errors import DataError, MmkdError


def images(path):
    """The different images of a Parquet file."""
    rows = pq.read_table(path, columns=["image"]).to_pylist()
    found = dict.fromkeys(row["image"]["bytes"] for row in rows)
    return [Image.open(io.BytesIO(content)).convert("RGB") for content in found]


@pytest.fixture(scope="module")
def scenes(scenes_dir):
    return images(scenes_dir / "train.parquet")


def jpeg(image, quality):
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return Image.open(out)


def scaled(image, factor):
    return image.resize((round(image.width * factor), round(image.height * factor)))


def distances(scenes, change):
    return [(image_hash(i) ^ image_hash(change(i))).bit_count() for i in scenes]


def test_a_copy_has_the_same_hash_in_any_mode_and_any_lossless_file(scenes):
    def again(image):
        out = io.BytesIO()
        image.save(out, "PNG")
        return Image.open(out).convert("RGBA")

    assert {h.bit_length() <= HASH_BITS for h in map(image_hash, scenes)} == {True}
    assert distances(scenes, lambda i: i.copy()) == [0] * len(scenes)
    assert distances(scenes, again) == [0] * len(scenes)
    assert distances(scenes, lambda i: i.convert("L")) == [0] * len(scenes)


@pytest.mark.parametrize(
    "change",
    [
        lambda i: jpeg(i, 75),
        lambda i: scaled(i, 0.9),
        lambda i: scaled(i, 1.1),
        lambda i: scaled(i, 4),
        lambda i: jpeg(scaled(i, 0.9), 75),
    ],
    ids=["jpeg", "smaller", "larger", "four times", "smaller jpeg"],
)
def test_copies_that_were_compressed_or_scaled_are_twins(scenes, change):
    found = distances(scenes, change)
    assert max(found) <= BITS
    assert max(found) > 0  # they are not equal files


def test_a_mirrored_image_is_no_twin(scenes):
    mirror = Image.Transpose.FLIP_LEFT_RIGHT
    assert min(distances(scenes, lambda i: i.transpose(mirror))) > 4 * BITS


def test_unrelated_scenes_are_no_twins(scenes_dir, scenes):
    names = ["validation", "eval/vqa", "eval/pope", "eval/caption"]
    every = [*scenes, *(i for n in names for i in images(scenes_dir / f"{n}.parquet"))]
    hashes = dict.fromkeys(map(image_hash, every))
    assert len(hashes) == len({i.tobytes() for i in every})
    left, _, _ = near_pairs(as_array([*hashes]), BITS)
    assert len(left) == 0


def clusters(count, rng):
    """Different hashes, of which many are near to each other."""
    centers = rng.integers(0, 256, (count // 8, HASH_BITS // 8), dtype=np.uint8)
    rates = rng.choice([0.004, 0.03, 0.1], (count, 1))
    flips = np.packbits(rng.random((count, HASH_BITS)) < rates, axis=1)
    return np.unique(centers[rng.integers(0, len(centers), count)] ^ flips, axis=0)


@pytest.mark.parametrize("bits", [0, 1, 3, 4, 7, 16, 31, 64])
def test_near_pairs_are_those_of_brute_force(bits):
    for seed in range(3):
        hashes = clusters(240, np.random.default_rng(seed))
        values = [int.from_bytes(row.tobytes()) for row in hashes]
        assert (as_array(values) == hashes).all()
        wanted = [
            (a, b, (values[a] ^ values[b]).bit_count())
            for a in range(len(values))
            for b in range(a + 1, len(values))
            if (values[a] ^ values[b]).bit_count() <= bits
        ]
        assert [*zip(*map(np.ndarray.tolist, near_pairs(hashes, bits)), strict=True)] == wanted
        assert wanted or bits == 0


def test_no_hash_and_one_hash_have_no_pairs():
    for hashes in ([], [5]):
        assert [len(part) for part in near_pairs(as_array(hashes), BITS)] == [0, 0, 0]
        assert twin_groups(hashes) == []


def test_groups_follow_chains_and_name_equal_hashes():
    ones = [(1 << n) - 1 for n in (0, 16, 32)]  # the first and the last differ by 32 bits
    far = ((1 << 256) - 1) << 100 & ((1 << 256) - 1)
    hashes = [ones[2], far, ones[0], ones[2], 7 << 200, ones[1], far]
    assert twin_groups(hashes, 16) == [[0, 2, 3, 4, 5], [1, 6]]
    assert twin_groups(hashes, 15) == [[0, 3], [1, 6], [2, 4]]
    assert twin_groups(hashes, 0) == [[0, 3], [1, 6]]


def test_too_many_pairs_and_too_many_bits_are_refused(monkeypatch):
    monkeypatch.setattr(twins, "MOST_PAIRS", 100)
    hashes = as_array([1 << n for n in range(20)])
    with pytest.raises(DataError, match="more than 100 pairs of images differ in at most 2 bits"):
        near_pairs(hashes, 2)
    with pytest.raises(DataError, match="give 0 to 64 bits"):
        near_pairs(hashes, 65)


def test_a_missing_package_is_named_with_its_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "imagehash", None)
    with pytest.raises(MmkdError) as caught:
        image_hash(Image.new("RGB", (8, 8)))
    assert str(caught.value).endswith("-- pip install 'mmkd[data]'")


def test_questions_are_equal_up_to_spelling_and_a_line_of_the_benchmark():
    asked = question_keys("Is there a dog in the image?")
    assert asked == question_keys("  is there a  DOG in the image")
    extended = "Is there a dog in the image?\nAnswer the question using a single word."
    assert asked < question_keys(extended)
    assert asked.isdisjoint(question_keys("Is there a cat in the image?\nIs there a dog?"))
    assert question_keys(" ?!") == set()


def test_texts_share_a_run_of_thirteen_words():
    words = [f"w{n}" for n in range(30)]
    whole, text = run_keys(" ".join(words)), " ".join(words[5 : 5 + WORDS])
    assert len(whole) == 30 - WORDS + 1
    assert np.isin(run_keys(f"Before, {text.upper()}; after."), whole).sum() == 1
    assert not np.isin(run_keys(text.replace("w10", "other")), whole).any()
    assert len(run_keys(" ".join(words[: WORDS - 1]))) == 0
