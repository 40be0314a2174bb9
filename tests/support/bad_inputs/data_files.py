"""Files of records that cannot be read."""

import tarfile
from pathlib import Path

from tests.support.bad_inputs.table import World, case, overridden, record

KIND = "file"

overridden(
    KIND, "no_data_file", "data.train=none.json", "none.json: no such data file", "data.train"
)
overridden(
    KIND,
    "pattern_of_nothing",
    "data.train=parts/*.parquet",
    "parts/*.parquet: no such data file",
    "data.train",
)
overridden(
    KIND,
    "range_with_a_gap",
    "data.train='part-{00..01}.tar'",
    "part-00.tar: no such data file",
    "check data.train",
)
overridden(
    KIND,
    "data_on_the_web",
    "data.train=https://example.org/part-{00..09}.tar",
    "part-00.tar: no such data file",
    "download it",
)
overridden(
    KIND,
    "hub_name_alone",
    "data.train=liuhaotian/LLaVA-Pretrain",
    "LLaVA-Pretrain: no such data file",
    "hub:liuhaotian/LLaVA-Pretrain",
)
overridden(KIND, "unknown_suffix", "data.train=picture.png", "picture.png: unknown kind", ".jsonl")


@case(
    KIND, "named a folder without data files", "parts: the folder holds no data files", "put .json"
)
def folder_of_nothing(world: World) -> None:
    Path("parts").mkdir()
    world.raw["data"] = {"train": "parts"}


@case(KIND, "gave a JSON list that was cut", "records.json: cannot read", "repair the file")
def broken_json(world: World) -> None:
    Path("records.json").write_text('[{"id": "r1", "conv')


@case(
    KIND,
    "gave lines that are not JSON",
    "records.jsonl: cannot read: ",
    "line 1 ",
    "repair the file",
)
def broken_lines(world: World) -> None:
    Path("records.jsonl").write_text('{"id": "r1", }\n')
    world.raw["data"] = {"train": "records.jsonl"}


@case(
    KIND,
    "gave a file that is not UTF-8",
    "records.json: cannot read: not UTF-8 at byte 10",
    "repair the file",
)
def another_encoding(world: World) -> None:
    Path("records.json").write_bytes('[{"id": "r\xe9"}]'.encode("latin-1"))


@case(KIND, "gave a parquet file that was cut", "part.parquet: cannot read", "repair the file")
def broken_parquet(world: World) -> None:
    Path("part.parquet").write_bytes(b"PAR1" + bytes(40))
    world.raw["data"] = {"train": "part.parquet"}


@case(
    KIND,
    "gave another kind of file the suffix .tar",
    "part.tar: cannot read",
    "name tars without compression",
)
def no_tar(world: World) -> None:
    Path("part.tar").write_bytes(b"something else " * 100)
    world.raw["data"] = {"train": "part.tar"}


@case(
    KIND,
    "put a link into a shard",
    "part.tar: 1.jpg is not a regular file",
    "pack regular files only",
)
def link_in_a_tar(world: World) -> None:
    with tarfile.open("part.tar", "w") as tar:
        member = tarfile.TarInfo("1.jpg")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member)
    world.raw["data"] = {"train": "part.tar"}


@case(
    KIND,
    "packed videos into a shard",
    "part.tar: record 0: the sample has the file 1.mp4, which is not read",
    "read are json, txt and jpg",
)
def video_in_a_shard(world: World) -> None:
    with tarfile.open("part.tar", "w") as tar:
        for name in ("1.mp4", "1.txt"):
            tar.addfile(tarfile.TarInfo(name))
    world.raw["data"] = {"train": "part.tar"}


@case(
    KIND,
    "gave several tars that are cut",
    "a.tar: cannot read",
    "parts/b.tar, parts/c.tar",
    "copy or",
)
def several_cut_tars(world: World) -> None:
    Path("parts").mkdir()
    for name in "abc":
        with tarfile.open(f"parts/{name}.tar", "w") as tar:
            tar.add("picture.png")
        content = Path(f"parts/{name}.tar").read_bytes()
        Path(f"parts/{name}.tar").write_bytes(content[:1700])
    world.raw["data"] = {"train": "parts/*.tar"}


@case(
    KIND,
    "wrote `stream: true`",
    "data.sources.0: 'stream' is true",
    "give a number",
)
def stream_without_a_number(world: World) -> None:
    world.raw["data"] = {"sources": [{"train": "hub:someone/dataset", "stream": True}]}


@case(
    KIND,
    "gave a key of a source next to `train`",
    "data: 'split' is a key of a source",
    "write sources: [{train: ..., split: ...}]",
)
def key_of_a_source(world: World) -> None:
    world.raw["data"] = {"train": "hub:someone/dataset", "split": "test"}


overridden(
    KIND,
    "train_and_sources",
    "data.sources=[{train: more.json}]",
    "data: both of them or neither -- give either 'train' (one source) or 'sources' (a mixture)",
)


@case(KIND, "gave no records", "records.json: the data set is empty", "add records")
def empty_data(world: World) -> None:
    world.records()


@case(KIND, "let all records be skipped", "records.json: every record is bad", "data check")
def every_record_is_bad(world: World) -> None:
    world.records(record(image=None))
    world.raw["data"]["on_bad_record"] = "skip"


overridden(
    KIND,
    "scores_that_are_not_there",
    "data.select={kind: robust, scores: s.parquet, model: student, keep: 0.5}",
    "s.parquet: no such file of scores",
    "mmkd data score RECIPE --out FILE",
)
overridden(
    KIND,
    "scores_of_another_program",
    "data.select={kind: robust, scores: picture.png, model: student, keep: 0.5}",
    "picture.png: it is damaged, or `mmkd data score` has not written it",
    "score the records again",
)
overridden(
    KIND,
    "difference_of_one_model",
    "data.select={kind: difference, scores: s.parquet, large: teacher, small: teacher}",
    "recipe.yaml: data.select: both models are 'teacher'",
    "name two models, whose losses differ",
)
overridden(
    KIND,
    "difficulty_without_the_field",
    "data.select={kind: difficulty, field: made.pass_rate}",
    "records: no record has a number in 'made.pass_rate'",
    "check 'field'",
)
overridden(
    KIND,
    "selection_of_a_stream",
    "data={sources: [{train: 'hub:a/b', stream: 9, select: {kind: balance, field: score}}]}",
    "data.sources.0: 'select' needs all records before training",
    "leave 'stream' out",
)
overridden(
    KIND,
    "moving_shares_of_one_source",
    "data.sampling={kind: domain}",
    "recipe.yaml: data: 'sampling' changes the shares of sources",
    "give two or more sources",
)
overridden(
    KIND,
    "moving_shares_with_weights",
    "data={sources: [{train: records.json, weight: 1}, {train: b.json, weight: 2}], "
    "sampling: {kind: domain}}",
    "data: 'sampling' decides the shares",
    "leave 'weight' of the sources out",
)


@case(
    KIND,
    "let the shares of sources change without a teacher",
    "stage mimic: data.sampling: it needs one teacher, which an objective of the stage reads",
    "add a teacher and a divergence",
)
def moving_shares_without_a_teacher(world: World) -> None:
    rows = [record(id=f"r{i}") for i in range(3)]
    world.records(*rows, name="a.json")
    world.records(*rows, name="b.json")
    sources = [{"train": "a.json"}, {"train": "b.json"}]
    world.raw["data"] = {"sources": sources, "sampling": {"kind": "domain", "held_out": 1}}
