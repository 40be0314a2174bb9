"""Sources of records: published formats, files, and the Hub."""

import json

import datasets
import pytest
from pydantic import ValidationError

from mmkd.data import images
from mmkd.data.encoder import Encoder
from mmkd.data.records import Records
from mmkd.data.sources import json_records
from mmkd.errors import DataError
from mmkd.recipe import DataConfig, SourceConfig
from tests.support.layouts import (
    LAYOUTS,
    drawn,
    encoded,
    llava_665k_rows,
    read,
    rlaif_rows,
    sample,
    turns,
    words,
    write_numbers,
    write_tar,
)
from tests.support.processors import FAMILIES

EXPECTED = {
    "llava_pretrain": [(f"00453{i:04d}", 1, 2) for i in range(4)],
    "llava_665k": [
        ("000000033471", 1, 4),
        ("2354786", 1, 2),
        ("wgByO4Y_0", 0, 2),
        ("wgByO4Y_17", 0, 2),
        ("140031996X", 1, 2),
    ],
    "sharegpt4v": [
        ("sa_545504", 1, 2),
        ("sa_545505", 0, 2),
        ("000000033471", 1, 4),
        ("2354786", 1, 2),
        ("wgByO4Y_0", 0, 2),
    ],
    "allava": [
        ("allava_laion_cap_100277305", 1, 2),
        ("allava_vflan_inst_7", 1, 4),
        ("5", 0, 2),
    ],
    "rlaif_v": [(f"{20 + i}", 1, 2) for i in range(5)],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_layouts_load(tmp_path, layout):
    config = LAYOUTS[layout](tmp_path)
    records = Records(config)
    found = [records[i] for i in range(len(records))]
    assert [(r.id, len(r.images), len(r.messages)) for r in found] == EXPECTED[layout]
    assert all(r.messages[0]["role"] == "user" for r in found)
    pairs = layout == "rlaif_v"
    batch = Encoder(records, FAMILIES["llava"](), config, pairs=pairs).encode([*range(len(found))])
    assert batch.targets.response.any(1).all()
    if layout == "sharegpt4v":
        assert len(batch.skipped) == 1
        assert (
            "record 0 (id sa_545504): no such image: sam/images/sa_545504.jpg" in batch.skipped[0]
        )
    else:
        assert batch.ids == [r.id for r in found]


def test_columns_that_agree_in_nothing_are_read_from_both_kinds_of_json(tmp_path):
    rows = llava_665k_rows(tmp_path)
    odd = [
        {"id": None, "image": {"path": rows[0]["image"], "bytes": None}, **said}
        for said in (
            {"conversations": turns("<image>\nA?", "B"), "score": [1, "two", {"three": 3}]},
            {"messages": [{"role": "user", "content": "<image>A?"},
                          {"role": "assistant", "content": "B", "score": 0.5}]},
        )
    ]  # fmt: skip
    several = {"id": 9.5, "image": [rows[0]["image"]] * 2,
               "conversations": turns("<image><image>?", "two")}  # fmt: skip
    nothing = {"id": "", "image": "", "conversations": turns("Hm?", "No.")}
    everything = [*rows, *odd, several, nothing]
    (tmp_path / "list.json").write_text(json.dumps(everything))
    (tmp_path / "lines.jsonl").write_text("\n\n".join(map(json.dumps, everything)) + "\n")
    a, b = read(tmp_path / "list.json"), read(tmp_path / "lines.jsonl")
    assert [a[i] for i in range(len(a))] == [b[i] for i in range(len(b))]
    assert [len(a.pictures(a[i])) for i in range(len(a))] == [1, 1, 0, 0, 1, 1, 1, 2, 0]
    assert [a[i].id for i in range(5, 9)] == ["5", "6", "9.5", "8"]


def test_an_answer_that_nobody_asked_for_is_left_out(tmp_path):
    said = turns("... and so on.", "Now?", "Now a dog.", first="gpt")
    (tmp_path / "a.json").write_text(json.dumps([{"conversations": said}]))
    assert words(read(tmp_path / "a.json")[0]) == ["Now?", "Now a dog."]
    (tmp_path / "b.json").write_text(json.dumps([{"conversations": said[:1]}]))
    with pytest.raises(DataError, match="record 0: no response"):
        read(tmp_path / "b.json")[0]
    said = [{"role": r, "content": "..."} for r in ("assistant", "user", "assistant")]
    (tmp_path / "c.json").write_text(json.dumps([{"messages": said}]))
    with pytest.raises(DataError, match="record 0: the conversation begins with an answer"):
        read(tmp_path / "c.json")[0]


def test_a_broken_line_is_one_bad_record_and_a_broken_list_is_named(tmp_path):
    good = json.dumps({"id": "g", "conversations": turns("?", "yes")})
    (tmp_path / "a.jsonl").write_text(f'{good}\n{{"id": 1, "conv\n[1, 2]\n{good}\n')
    records = read(tmp_path / "a.jsonl")
    assert (len(records), records[3].id) == (4, "g")
    for index in (1, 2):
        with pytest.raises(
            DataError, match=rf"a\.jsonl: record {index}: a record is not a JSON obj"
        ):
            records[index]
    (tmp_path / "b.json").write_text(f"[{good},\n {good} {good}]")
    with pytest.raises(DataError, match=r"b\.json: cannot read: ',' or '\]' expected: line 2 col"):
        read(tmp_path / "b.json")
    (tmp_path / "c.json").write_text(f"[{good}] {good}")
    with pytest.raises(DataError, match="more text after the list"):
        read(tmp_path / "c.json")
    (tmp_path / "d.json").write_bytes(f"[{good}".encode()[:-5] + b"\xff\xfe")
    with pytest.raises(DataError, match="not UTF-8 at byte"):
        read(tmp_path / "d.json")
    (tmp_path / "e.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match="cannot read"):
        read(tmp_path / "e.json")


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 64, 10_000])
def test_lists_are_read_in_pieces(tmp_path, monkeypatch, piece):
    """Wherever a piece ends: in a character, an escape, a number, between records."""
    monkeypatch.setattr(json_records, "PIECE", piece)
    rows = [{"n": i, "t": 'é\u2028\U0001f600]},\\"' * (i % 4), "in": [[i], {}]} for i in range(30)]
    for written in (
        json.dumps(rows),
        json.dumps(rows, ensure_ascii=False, indent=3),
        "\ufeff\n \n" + json.dumps(rows, ensure_ascii=False).replace("}, {", "}\n,\r\n{") + " \n",
        "[]",
        " [ ] ",
    ):
        (tmp_path / "a.json").write_text(written)
        found = [
            json_records.parse_object(row["text"])
            for row in json_records._texts(str(tmp_path / "a.json"))
        ]
        assert found == json.loads(written.removeprefix("\ufeff"))
    held = []
    with (tmp_path / "a.json").open("wb+") as file:
        file.write(json.dumps(rows * 100).encode())
        file.seek(0)
        whole = json_records._Text(file)
        for _ in json_records._elements(whole):
            held.append(len(whole.text))
    assert max(held) < 3 * piece + 400


def test_what_is_wrong_far_inside_of_a_file_is_placed(tmp_path, monkeypatch):
    monkeypatch.setattr(json_records, "PIECE", 50)
    good = json.dumps({"id": "é", "conversations": turns("?", "yes")}, ensure_ascii=False)
    (tmp_path / "a.json").write_text("[" + f"{good},\n" * 40 + f"{good}\n  x")
    with pytest.raises(
        DataError, match=r"',' or '\]' expected: line 42 column 3$|line 42 column 3 "
    ):
        read(tmp_path / "a.json")
    (tmp_path / "b.json").write_text("[" + f"{good},\n" * 40 + '{"id": nothing}]')
    with pytest.raises(DataError, match="Expecting value: line 41 column 8 "):
        read(tmp_path / "b.json")
    for name in ("c.json", "c.jsonl"):
        start, end = ("[", "]") if name == "c.json" else ("", "")
        between = ",\n" if name == "c.json" else "\n"
        content = (start + between.join([good] * 400) + end).encode()
        at = len(content) - 40
        (tmp_path / name).write_bytes(content[:at] + b"\xff" + content[at + 1 :])
        with pytest.raises(DataError, match=rf"not UTF-8 at byte {at} "):
            read(tmp_path / name)
    (tmp_path / "d.jsonl").write_text("\n\n{'id': 1}\n")
    with pytest.raises(DataError, match=r"quotes: line 3 column 2 -- repair the file: a list"):
        read(tmp_path / "d.jsonl")


def test_all_broken_files_of_a_source_are_named_at_once(tmp_path):
    for number in range(30):
        write_numbers(tmp_path / f"{number:02d}.json", [number])
    for number in (3, *range(5, 28)):
        (tmp_path / f"{number:02d}.json").write_text("[1")
    with pytest.raises(DataError, match=r"03\.json: cannot read: .*; 23 more cannot be") as caught:
        read(tmp_path)
    assert "05.json, " in str(caught.value)
    assert "24.json, ... -- repair the file" in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_disk_that_takes_no_more_is_no_broken_file(tmp_path, monkeypatch):
    write_numbers(tmp_path / "a.json", [1])
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "below")
    with pytest.raises(
        DataError, match=r"file/below: cannot be read or written \(Not a dir.*check"
    ):
        read(tmp_path / "a.json")


def test_a_changed_file_is_read_anew(tmp_path):
    path = tmp_path / "a.json"
    for answer in ("one", "two"):
        path.write_text(json.dumps([{"conversations": turns("?", answer)}]))
        assert words(read(path)[0]) == ["?", answer]


# files


def test_globs_ranges_and_folders_name_several_files(tmp_path):
    for i in range(12):
        write_numbers(tmp_path / f"p-{i:02d}.json", [2 * i, 2 * i + 1])
    names = [f"r{i}" for i in range(24)]
    for train, wanted in {
        "p-*.json": names,
        "p-0?.json": names[:20],
        "p-{08..10}.json": names[16:22],
        "p-{0..1}{1..1}.json": ["r2", "r3", "r22", "r23"],
        "p-{0..1}1.j*n": ["r2", "r3", "r22", "r23"],
        ".": names,
    }.items():
        records = read(tmp_path / train)
        assert [records[i].id for i in range(len(records))] == wanted, train
    assert read(tmp_path / "p-*.json").where(5) == f"{tmp_path}/p-02.json: record 1 (id r5)"
    for train, message in {
        "p-{10..13}.json": r"p-12\.json: no such data file",
        "q-*.json": "no such data file",
        "p-{0..3}?.json": r"p-2\?\.json: no such data file",
        "p-{3..1}.json": "names 0 files",
        "p-{0..999999999}.json": "at most 100,000",
    }.items():
        with pytest.raises(DataError, match=message):
            read(tmp_path / train)
    for train, hint in {
        "https://host/p-{00..09}.tar": r"p-00\.tar: no such data file -- download it, or name a",
        "someone/dataset": "someone/dataset: no such data file -- .* Hub is hub:someone/dataset",
    }.items():
        with pytest.raises(DataError, match=hint):
            read(train)
    write_tar(tmp_path / "p-00.tar", sample(0))
    with pytest.raises(DataError, match="several kinds"):
        read(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no data files"):
        read(tmp_path / "empty")


def test_saved_data_sets_are_read(tmp_path):
    table = datasets.Dataset.from_list(rlaif_rows())
    table = table.cast_column("image", datasets.Image())
    table.save_to_disk(tmp_path / "saved")
    records = read(tmp_path / "saved")
    assert records[3].id == "23"
    assert records.pictures(records[3])[0].size == drawn(3).size
    assert records.where(3) == f"{tmp_path}/saved: record 3 (id 23)"
    datasets.DatasetDict({"a": table, "b": table}).save_to_disk(tmp_path / "splits")
    with pytest.raises(DataError, match="holds the splits a, b"):
        read(tmp_path / "splits")


def test_lists_of_pictures_in_tables_are_decoded_with_limits_too(tmp_path, monkeypatch):
    said = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "two"}]
    rows = [{"images": [{"bytes": encoded(i), "path": None} for i in (1, 2)], "messages": said}]
    features = datasets.Dataset.from_list(rows).features
    features["images"] = datasets.List(datasets.Image())
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "a.parquet")
    records = read(tmp_path / "a.parquet")
    pictures = records.pictures(records[0])
    assert [p.tobytes() for p in pictures] == [drawn(i).tobytes() for i in (1, 2)]
    monkeypatch.setattr(images.Image, "MAX_IMAGE_PIXELS", 48 * 32 - 1)
    with pytest.raises(DataError, match="too large to decode"):
        records.pictures(records[0])


def test_media_in_tables_are_not_opened_wherever_they_stand(tmp_path):
    """Images in lists of structures, and sound that needs a library of its own."""
    row = {"conversations": turns("?", "a"), "extra": [{"thumb": {"bytes": b"?", "path": None}}],
           "sound": {"bytes": b"no sound", "path": None}, "number": 5}  # fmt: skip
    table = datasets.Dataset.from_list([row]).cast_column("sound", datasets.Audio())
    table = table.cast_column("extra", datasets.List({"thumb": datasets.Image()}))
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "saved")
    for train in ("a.parquet", "saved", "a.parquet"):
        for ignored, left in ([], "(extra|sound)"), (["extra"], "sound"), (["sound"], "extra"):
            parts = [{"train": str(tmp_path / train), "ignore": ignored}]
            with pytest.raises(DataError, match=f"record 0: the record has .* under '{left}'"):
                Records(DataConfig(sources=parts))[0]
        parts = [{"train": str(tmp_path / train), "ignore": ["extra", "sound"]}]
        source = Records(DataConfig(sources=parts))
        assert words(source[0]) == ["?", "a"]
        assert source.sources[0]._rows.row(0)["extra"] == row["extra"]


@pytest.mark.parametrize("stream", [None, 2])
def test_json_of_the_hub_that_mixes_types_says_the_same(tmp_path, stream):
    said = ["no.", [{"type": "text", "text": '"no."'}]]
    rows = [{"id": i, "messages": [{"role": "user", "content": '"?"'},
                                   {"role": "assistant", "content": said[i]}]}
            for i in range(2)]  # fmt: skip
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = SourceConfig(train=f"hub:{tmp_path}", stream=stream)
    records = Records(DataConfig(sources=[source]))
    assert [words(records[i])[1] for i in range(2)] == ["no.", '"no."']


ANSWERED = {"conversations": turns("?", "a")}


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": "a string"},
        {"conversations": [["human", "?"], ["gpt", "a"]]},
        {"conversations": [{"from": ["human"], "value": "?"}]},
        {"conversations": [{"from": "gpt", "value": 5}]},
        {"conversations": turns("?", "\ud83d")},
        {"messages": {"role": "user", "content": "?"}},
        {"messages": [{"role": "assistant", "content": [None, "text", {"type": "text"}]}]},
        {"chosen": "a", "rejected": {"not": "text"}},
        {"chosen": 3, "rejected": 4, "prompt": 5},
        {**ANSWERED, "objects": ["ball"]},
        {**ANSWERED, "objects": [{"name": 7, "box": [0, 0, 1, 1]}]},
        {**ANSWERED, "objects": [{"name": "b", "box": [0, 0, 1, 10**400]}]},
        {**ANSWERED, "image": 5},
        {"id": "two\nlines\x1b[31m" + "x" * 500, "image": {"a": 1}, "messages": 0},
        ["no", "object"],
    ],
)
def test_rows_of_wrong_shapes_are_one_line(tmp_path, row):
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=r"a\.jsonl: record 0") as caught:
        read(tmp_path / "a.jsonl")[0]
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


# the Hub


@pytest.fixture
def repository(tmp_path):
    """A folder as `datasets` finds one on the Hub: parquet with images, two splits."""
    table = datasets.Dataset.from_list(rlaif_rows()).cast_column("image", datasets.Image())
    folder = tmp_path / "openbmb" / "RLAIF-V"
    table.to_parquet(folder / "data" / "train-00000.parquet")
    table.select([4]).to_parquet(folder / "data" / "test-00000.parquet")
    return folder


def test_hub_data_sets_are_loaded_by_name(repository, monkeypatch):
    calls, load = [], datasets.load_dataset

    def local(name, *arguments, **options):
        calls.append((name, arguments, options.pop("revision"), options["split"]))
        return load(str(repository.parent.parent / name), *arguments, **options)

    monkeypatch.setattr(datasets, "load_dataset", local)
    records = read("hub:openbmb/RLAIF-V")
    assert [records[i].id for i in range(5)] == ["20", "21", "22", "23", "24"]
    assert records.pictures(records[1])[0].size == (48, 32)
    assert records.where(1) == "hub:openbmb/RLAIF-V: record 1 (id 21)"
    one = SourceConfig(train="hub:openbmb/RLAIF-V", split="test", subset="default", revision="v1")
    assert Records(DataConfig(sources=[one]))[0].id == "24"
    assert calls == [
        ("openbmb/RLAIF-V", (None,), None, "train"),
        ("openbmb/RLAIF-V", ("default",), "v1", "test"),
    ]


def test_a_hub_data_set_that_cannot_be_loaded_is_one_line(tmp_path):
    for settings in ({}, {"stream": 2}):
        source = SourceConfig(train=f"hub:{tmp_path}/nobody", **settings)
        with pytest.raises(DataError, match=r"nobody: cannot load the data set: ") as caught:
            Records(DataConfig(sources=[source]))
        assert str(caught.value).isprintable()


def test_keys_of_a_hub_data_set_are_told_where_they_belong():
    for key, value in {"split": "test", "stream": 5, "prompt": "?"}.items():
        with pytest.raises(
            ValidationError, match=rf"write sources: \[{{train: ..., {key}: ...}}\]"
        ):
            DataConfig.model_validate({"train": "hub:a/b", key: value})
    with pytest.raises(ValidationError, match="'stream' is true -- give a number"):
        SourceConfig.model_validate({"train": "hub:a/b", "stream": True})
