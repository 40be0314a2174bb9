"""File names with any characters refer to that file, and ranges of names are limited."""

import io
import json
import tarfile
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmkd.data.records import Source
from mmkd.data.sources import find_files
from mmkd.errors import DataError
from mmkd.evaluation.local import read_parquet
from mmkd.evaluation.manager import _meant
from mmkd.recipe import SourceConfig
from tests.support.layouts import turns

ODD = ("a[1]", "a[!b]", "b*", "x?", "{a}", "q'\"#%20 ä", "c[", "d]", "-e", "f:g", "~", "$5")
KINDS = ("parquet", "json", "jsonl", "tar")


def write(path, said):
    """A file of one record whose id is `said`, by the kind that its name ends with."""
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"id": said, "conversations": turns("?", "yes")}
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([record]), path.absolute())
    elif path.suffix == ".tar":
        content = json.dumps(record).encode()
        with tarfile.open(path, "w") as tar:
            member = tarfile.TarInfo("a.json")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    else:
        path.write_text(json.dumps(record if path.suffix == ".jsonl" else [record]))


def ids(train):
    source = Source(SourceConfig(train=train))
    return [source[i].id for i in range(len(source))]


@pytest.fixture
def decoys(tmp_path, monkeypatch, datasets_cache):
    """Files that the odd names would match if they were patterns."""
    monkeypatch.chdir(tmp_path)
    for kind in KINDS:
        for name in ("a1", "a2", "ac", "bb", "xy", "a", "deep/a1"):
            write(tmp_path / f"{name}.{kind}", "decoy")
            write(tmp_path / name / f"data.{kind}", "decoy")
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
def test_a_name_is_no_pattern(decoys, kind):
    for name in ODD:
        write(decoys / f"{name}.{kind}", "meant")
        write(decoys / name / f"data.{kind}", "meant")
    for name in ODD:
        for train in (f"{name}.{kind}", f"./{name}.{kind}", str(decoys / f"{name}.{kind}")):
            assert ids(train) == ["meant"], train
        assert ids(f"{name}/data.{kind}") == ["meant"]
        assert ids(f"{name}/*.{kind}") == ["meant"], "a folder's name is no pattern either"
    assert "decoy" in ids(f"a[12].{kind}"), "what names no file is a pattern"


def test_nor_is_one_of_an_evaluation(decoys):
    for name in ODD:
        path = decoys / f"{name}.parquet"
        write(path, "meant")
        assert read_parquet([path])["id"][:] == ["meant"]
        import datasets

        files = _meant({"test": [str(path)]})
        assert datasets.load_dataset("parquet", data_files=files, split="test")["id"][:] == [
            "meant"
        ]


@pytest.mark.parametrize("train", ["a::b.parquet", "$HOME.parquet", "hub:a[1]"])
def test_names_that_datasets_cannot_be_told_are_refused(decoys, train):
    write(decoys / "a::b.parquet", "meant")
    write(decoys / "$HOME.parquet", "meant")
    write(decoys / "a[1]" / "train.parquet", "meant")
    with pytest.raises(DataError, match="rename"):
        Source(SourceConfig(train=train))


@pytest.mark.parametrize(
    "pattern",
    [
        "{0..1000000000000}.tar",
        "{0..99999}{0..99999}.tar",
        "{0..999}{0..999}{0..999}/a.tar",
        "{0..9}" * 40 + ".tar",
        f"{{0..{'9' * 5000}}}.tar",
        f"{{{'9' * 5000}..0}}.tar",
        "{5..1}.tar",
        "{5..1}{0..99999}{0..99999}.tar",
    ],
)
def test_ranges_name_a_bounded_number_of_files(pattern):
    started = time.process_time()
    with pytest.raises(DataError, match=r"names (0|more than 100,000) files") as refused:
        find_files(pattern)
    assert time.process_time() - started < 1
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500
