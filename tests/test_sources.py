"""Where records come from: published layouts, files, shards, the Hub, and mixtures of them."""

import json
import tarfile
from collections import Counter

import datasets
import pytest
import torch
import yaml
from layouts import (
    LAYOUTS,
    drawn,
    encoded,
    llava_665k_rows,
    put,
    rlaif_rows,
    sample,
    turns,
    write_tar,
)
from processors import FAMILIES
from recipes import tiny_recipe

from mmkd import pipeline
from mmkd.build_cache import build_cache
from mmkd.data import images
from mmkd.data.encoder import Encoder
from mmkd.data.mixture import Mixture, draws
from mmkd.data.records import Records
from mmkd.data.sources import tables
from mmkd.data.stream import BatchStream
from mmkd.errors import DataError, RecipeError
from mmkd.files import read_json
from mmkd.plan import make_plan
from mmkd.recipe import BatchConfig, DataConfig, SourceConfig, load_recipe


def words(record):
    return ["".join(p.get("text", "<image>") for p in m["content"]) for m in record.messages]


def read(train, **settings):
    return Records(DataConfig(train=str(train), **settings))


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
                          {"role": "assistant", "content": "B", "weight": 0.5}]},
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
        Encoder(read(tmp_path / "b.json"), FAMILIES["llava"](), DataConfig(train="-")).load(0)


def test_a_broken_line_is_one_bad_record_and_a_broken_list_is_named(tmp_path):
    good = json.dumps({"id": "g", "conversations": turns("?", "yes")})
    (tmp_path / "a.jsonl").write_text(f'{good}\n{{"id": 1, "conv\n[1, 2]\n{good}\n')
    records = read(tmp_path / "a.jsonl")
    assert (len(records), records[3].id) == (4, "g")
    for index in (1, 2):
        with pytest.raises(DataError, match=rf"a\.jsonl: record {index}: a record is no JSON obj"):
            records[index]
    (tmp_path / "b.json").write_text(f"[{good},\n {good} {good}]")
    with pytest.raises(DataError, match=r"b\.json: cannot read: ',' or '\]' expected: line 2 col"):
        read(tmp_path / "b.json")
    (tmp_path / "c.json").write_text(f"[{good}] {good}")
    with pytest.raises(DataError, match="more text behind the list"):
        read(tmp_path / "c.json")
    (tmp_path / "d.json").write_bytes(f"[{good}".encode()[:-5] + b"\xff\xfe")
    with pytest.raises(DataError, match="no UTF-8 at byte"):
        read(tmp_path / "d.json")
    (tmp_path / "e.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match="cannot read"):
        read(tmp_path / "e.json")


def test_a_changed_file_is_read_anew(tmp_path):
    path = tmp_path / "a.json"
    for answer in ("one", "two"):
        path.write_text(json.dumps([{"conversations": turns("?", answer)}]))
        assert words(read(path)[0]) == ["?", answer]


# files


def write_numbers(path, numbers):
    rows = [{"id": f"r{n}", "conversations": turns("?", f"answer {n}")} for n in numbers]
    path.write_text(
        "\n".join(map(json.dumps, rows)) if path.suffix == ".jsonl" else json.dumps(rows)
    )


def test_globs_ranges_and_folders_name_several_files(tmp_path):
    for i in range(12):
        write_numbers(tmp_path / f"p-{i:02d}.json", [2 * i, 2 * i + 1])
    names = [f"r{i}" for i in range(24)]
    for train, wanted in {
        "p-*.json": names,
        "p-0?.json": names[:20],
        "p-{08..10}.json": names[16:22],
        "p-{0..1}{1..1}.json": ["r2", "r3", "r22", "r23"],
        ".": names,
    }.items():
        records = read(tmp_path / train)
        assert [records[i].id for i in range(len(records))] == wanted, train
    assert read(tmp_path / "p-*.json").where(5) == f"{tmp_path}/p-02.json: record 1 (id r5)"
    for train, message in {
        "p-{10..13}.json": r"p-12\.json: no such data file",
        "q-*.json": "no such data file",
        "p-{3..1}.json": "names 0 files",
        "p-{0..999999999}.json": "at most 100,000",
    }.items():
        with pytest.raises(DataError, match=message):
            read(tmp_path / train)
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


# shards


@pytest.fixture
def shards(tmp_path):
    """Two tars: five samples with records, and captions as downloaders leave them."""
    write_tar(tmp_path / "s-0.tar", {k: v for n in range(5) for k, v in sample(n).items()})
    two = turns("<image> and <image>?", "two")
    notes = json.dumps({"caption": "a ball", "url": "https://example.org", "width": 48}).encode()
    write_tar(
        tmp_path / "s-1.tar",
        {
            "x.jpg": encoded(7, "JPEG"),
            "x.txt": b"a ball\n",
            "x.json": notes,
            "._x.jpg": b"what a Mac leaves behind",
            "README": b"no extension",
            "y.0.png": encoded(8),
            "y.1.webp": encoded(9, "WEBP"),
            "y.json": json.dumps({"id": "pair", "conversations": two}).encode(),
            "z.v1.json": json.dumps({"other": "extension v1.json"}).encode(),
            "z.json": json.dumps({"conversations": turns("Hm?", "No.")}).encode(),
        },
    )
    return tmp_path


def test_shards_are_read_in_any_order_without_unpacking(shards):
    before = sorted(p.name for p in shards.iterdir())
    records = read(shards / "s-{0..1}.tar")
    assert len(records) == 8
    for index in (4, 0, 7, 2, 6, 5, 1, 3):
        record = records[index]
        pictures = records.pictures(record)
        if index < 5:
            assert (record.id, words(record)[1]) == (f"s{index}", f"ball {index}")
            assert pictures[0].tobytes() == drawn(index).tobytes()
    assert records.where(2) == f"{shards}/s-0.tar: record 2 (id s2)"
    caption, pair, text = (records[i] for i in (5, 6, 7))
    assert words(caption) == ["<image>Describe the image.", "a ball"]
    assert [p.tobytes() for p in records.pictures(pair)[:1]] == [drawn(8).tobytes()]
    assert len(records.pictures(pair)) == 2
    assert (caption.id, pair.id, text.id, text.images) == ("x", "pair", "z", [])
    assert sorted(p.name for p in shards.iterdir()) == before
    asked = Records(DataConfig(sources=[{"train": str(shards / "s-1.tar"), "prompt": "Hm?"}]))
    assert words(asked[0]) == ["<image>Hm?", "a ball"]


def special(tar, kind, name="part/0001.png"):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "../../../etc/hostname"
    tar.addfile(info)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_shards_are_refused(tmp_path, kind):
    with tarfile.open(write_tar(tmp_path / "a.tar", sample(0)), "a") as tar:
        special(tar, kind)
    with pytest.raises(DataError, match=r"a\.tar: part/0001\.png is no plain file"):
        read(tmp_path / "a.tar")


def test_names_in_shards_that_lead_elsewhere_name_nothing_on_disk(tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    drawn(1).save(tmp_path / "victim.png")
    record = {"conversations": turns("<image>?", "ball")}
    members = {"../victim.png": encoded(2), "../victim.json": json.dumps(record).encode()}
    outside = json.dumps({**record, "image": "../victim.png"}).encode()
    records = read(write_tar(root / "a.tar", {**members, "/b.json": outside}))
    assert records.pictures(records[0])[0].tobytes() == drawn(2).tobytes()
    with pytest.raises(DataError, match="lies outside of"):
        records.pictures(records[1])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "victim.png"]


def test_damaged_shards_are_named(tmp_path):
    whole = write_tar(tmp_path / "a.tar", {k: v for n in range(3) for k, v in sample(n).items()})
    content = whole.read_bytes()
    second = content.index(b"part/0001.json")
    cases = {
        "cut.tar": (content[: second + 600], "unexpected end of data"),
        "header.tar": (
            content[: second + 148] + b"garbage!" + content[second + 156 :],
            r"damaged behind part/0001\.png",
        ),
        "none.tar": (b"x" * 2000, "cannot read"),
    }
    for name, (broken, message) in cases.items():
        (tmp_path / name).write_bytes(broken)
        with pytest.raises(DataError, match=rf"{name}: .*{message}"):
            read(tmp_path / name)
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as tar:
        tar.add(whole, "whole")
    with pytest.raises(DataError, match="name tars without compression"):
        read(tmp_path / "packed.tar")


def test_samples_that_are_too_large_or_double_are_bad_records(tmp_path, monkeypatch):
    with tarfile.open(write_tar(tmp_path / "a.tar", sample(0)), "a") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("b.json"))
    records = read(tmp_path / "a.tar")
    with pytest.raises(DataError, match=r"record 1: the sample has two files b\.json"):
        records[1]
    monkeypatch.setattr(images, "MEMBER_BYTES", 100)
    with pytest.raises(DataError, match=r"record 0: part/0000\.json has 1\d\d bytes, the limit"):
        records[0]


# pictures


def test_pictures_stay_inside_of_their_folder(tmp_path):
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    put(root, "sub/a.png")
    drawn().save(tmp_path / "secret.png")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "folder").symlink_to(tmp_path)
    (root / "inner.png").symlink_to(root / "sub" / "a.png")
    for good in ("sub/a.png", "sub/../sub/a.png", str(root / "sub/a.png"), "inner.png"):
        assert images.load_image(good, root).size == (48, 32)
    for bad in ("../secret.png", str(tmp_path / "secret.png"), "link.png", "folder/secret.png"):
        for read_image in (images.load_image, images.image_size):
            with pytest.raises(DataError, match="lies outside of"):
                read_image(bad, root)
    for bad in ("sub", "a\0b", "/dev/null", "gone\n.png"):
        with pytest.raises(DataError) as caught:
            images.load_image(bad, root)
        assert str(caught.value).isprintable()
    with pytest.raises(DataError, match="there is no image folder"):
        images.load_image("sub/a.png", None)


def test_pictures_that_are_none_are_refused(tmp_path, monkeypatch):
    cut = encoded(1)[:-30]
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n"
    for content in (b"", b"no picture", script, cut):
        with pytest.raises(DataError, match="is not a readable image"):
            images.load_image({"bytes": content, "path": "x.png"}, None)
    assert images.image_size({"bytes": cut}, None) == (48, 32)  # the header is there
    monkeypatch.setattr(images.Image, "MAX_IMAGE_PIXELS", 48 * 32 - 1)
    for read_image in (images.load_image, images.image_size):
        with pytest.raises(DataError, match="is too large to decode"):
            read_image({"bytes": encoded(1)}, None)


@pytest.mark.parametrize(
    "box", [[0, 0, float("nan"), 1], [0, 0, float("inf"), 1], [5, 0, 1, 1], [0, 1], None, "abcd"]
)
def test_boxes_that_are_none_are_refused(tmp_path, box):
    row = {"conversations": turns("?", "a"), "objects": [{"name": "ball", "box": box}]}
    (tmp_path / "a.json").write_text(json.dumps([row]))
    with pytest.raises(DataError, match=r"record 0: .*box"):
        read(tmp_path / "a.json")[0]


# the Hub


@pytest.fixture
def repository(tmp_path):
    """A folder as `datasets` finds one on the Hub: parquet with pictures, two splits."""
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


def test_streamed_rows_are_the_first_ones_and_read_once(repository, monkeypatch):
    source = SourceConfig(train=f"hub:{repository}", stream=3)
    streamed = Records(DataConfig(sources=[source]))
    whole = read(f"hub:{repository}")
    assert len(streamed) == 3
    for index in (2, 0, 1):
        a, b = streamed[index], whole[index]
        assert (a.id, a.messages, a.rejected) == (b.id, b.messages, b.rejected)
        pictures = [r.pictures(x)[0].tobytes() for r, x in ((streamed, a), (whole, b))]
        assert pictures[0] == pictures[1]

    def refuse(*_, **__):
        raise AssertionError("read a second time")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    again = Records(DataConfig(sources=[source]))
    assert [again[i].id for i in range(3)] == ["20", "21", "22"]
    with pytest.raises(DataError, match="read a second time"):
        tables.StreamedRows(SourceConfig(train=f"hub:{repository}", stream=4))


# mixtures


def mixture(tmp_path, *sources, seed=3):
    made = []
    for number, (size, settings) in enumerate(sources):
        write_numbers(tmp_path / f"s{number}.json", [f"{number}.{i}" for i in range(size)])
        made.append({"train": str(tmp_path / f"s{number}.json"), **settings})
    return Mixture(Records(DataConfig(sources=made)), seed)


def test_records_of_an_epoch_by_weights_and_caps():
    for sizes, weights, caps, wanted in [
        ([10, 20], [None, None], [None, None], [10, 20]),
        ([10, 20], [None, None], [4, 99], [4, 20]),
        ([10, 20], [1, 1], [None, None], [15, 15]),
        ([10, 20], [3, 1], [None, None], [23, 7]),  # 22.5 and 7.5: the first of equals
        ([665, 558], [3, 1], [None, 100], [300, 100]),
        ([7, 7, 7], [1, 1, 1], [5, None, None], [5, 5, 5]),
    ]:
        assert draws(sizes, weights, caps) == wanted


@pytest.mark.parametrize("seed", range(20))
def test_shares_and_caps_hold_for_any_numbers(seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(50, 500, (4,), generator=generator).tolist()
    weights = torch.rand(4, generator=generator).add(0.05).tolist()
    caps = [None, *torch.randint(20, 200, (2,), generator=generator).tolist(), None]
    found = draws(sizes, weights, caps)
    total = sum(found)
    capped = [n if c is None else min(n, c) for n, c in zip(sizes, caps, strict=True)]
    assert total <= sum(capped)
    for count, weight, cap in zip(found, weights, caps, strict=True):
        assert abs(count - total * weight / sum(weights)) < 1
        assert cap is None or count <= cap
    if total < sum(capped):  # then a cap is what ends the epoch
        shares = [(total + 1) * w / sum(weights) for w in weights]
        assert any(c is not None and s > c for s, c in zip(shares, caps, strict=True))


def test_one_source_is_shuffled_by_seed_and_epoch_alone(tmp_path):
    made = mixture(tmp_path, (10, {}))
    for epoch in range(3):
        generator = torch.Generator().manual_seed(3 * 1_000_003 + epoch)
        assert made.order(epoch) == torch.randperm(10, generator=generator).tolist()


def test_all_records_of_a_source_are_seen_equally_often(tmp_path):
    made = mixture(tmp_path, (10, {"weight": 3}), (30, {"weight": 1, "cap": 7}))
    assert made.draws == [13, 4]
    seen: Counter[int] = Counter()
    for epoch in range(13):
        order = made.order(epoch)
        assert sum(i < 10 for i in order) == 13
        assert order != sorted(order)
        seen.update(order)
        for part in (range(10), range(10, 40)):
            counts = [seen[i] for i in part]
            assert max(counts) - min(counts) <= 1
    assert made.order(5) == made.order(5)
    assert made.order(5) != mixture(tmp_path, (10, {"weight": 3}),
                                    (30, {"weight": 1, "cap": 7}), seed=4).order(5)  # fmt: skip


def stream(records, size, accumulate, rank=0, world=1):
    encoder = Encoder(records, FAMILIES["llava"](), DataConfig(train="-"))
    batch = BatchConfig(size=size, accumulate=accumulate)
    return BatchStream(encoder, batch, seed=3, rank=rank, world_size=world)


def ids(streams, first, last):
    """What each step's micro-batches hold, whichever process has them."""
    steps = [list(s.steps(first, last)) for s in streams]
    return [
        sorted(name for own in step for batch in own for name in batch.ids)
        for step in zip(*steps, strict=True)
    ]


def test_a_step_of_a_mixture_sees_the_same_on_any_processes_and_after_a_resume(shards):
    write_numbers(shards / "n.jsonl", range(9))
    records = Records(
        DataConfig(
            sources=[
                {"train": str(shards / "*.tar"), "name": "tars", "weight": 2},
                {"train": str(shards / "n.jsonl"), "weight": 1, "cap": 4},
            ]
        )
    )
    whole = ids([stream(records, 4, 1)], 0, 9)
    assert ids([stream(records, 2, 2)], 0, 9) == whole
    assert ids([stream(records, 2, 1, rank, 2) for rank in range(2)], 0, 9) == whole
    assert ids([stream(records, 4, 1)], 4, 9) == whole[4:]
    one = stream(records, 4, 1)
    names = {records[i].id for i in one.seen(9)}
    assert names == {name for step in whole for name in step}
    assert (len(one.mixture), one.steps_in(3)) == (12, 9)
    assert one.seen(200) == list(range(len(records)))


def test_bad_records_are_replaced_by_far_ones(tmp_path):
    rows = [{"id": f"r{i}", "image": "gone.jpg", "conversations": turns("<image>?", "a")}
            for i in range(400)]  # fmt: skip
    for row in rows[300:]:
        row["image"] = put(tmp_path, "there.png")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    config = DataConfig(train=str(tmp_path / "a.json"), on_bad_sample="skip")
    batch = Encoder(Records(config), FAMILIES["llava"](), config).encode([*range(20)])
    assert len(batch.ids) == 20
    assert len(batch.skipped) < 120  # the good ones are 281 to 300 records away
    assert len(set(batch.ids)) > 10
    records = Records(config)
    assert sorted(records.instead(7, k) for k in range(400)) == list(range(400))


def test_a_weight_too_small_for_one_record_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="an epoch of 20 records has none of s1"):
        mixture(tmp_path, (10, {"weight": 1e6}), (10, {"weight": 1}))


BASE = {"name": "x", "student": {"model": "m"},
        "stages": [{"name": "a", "objectives": [{"kind": "ce"}], "steps": 1}]}  # fmt: skip


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train": "a.json", "sources": [{"train": "b.json"}]}, "data: give either 'train' (one"),
        ({"sources": [{"train": "a/x.json"}, {"train": "b/x.json"}]}, "two sources have the same"),
        ({"sources": [{"train": "a", "weight": 1}, {"train": "b"}]}, "every source a 'weight', or"),
        ({"sources": [{"train": "a", "weight": float("inf")}]}, "data.sources.0.weight"),
        ({"sources": [{"train": "a", "cap": 0}]}, "data.sources.0.cap"),
        ({"sources": [{"train": "a.json", "split": "test"}]}, "'split' is of Hub data sets"),
        ({"sources": [{"train": "a.json", "wieght": 1}]}, "did you mean 'weight'?"),
    ],
)
def test_mixtures_that_say_nothing_clear_are_refused(data, message):
    with pytest.raises(RecipeError) as caught:
        load_recipe({**BASE, "data": data})
    assert message in str(caught.value)


# runs


@pytest.fixture
def mixed(scenes_dir, tiny_model_dir, tmp_path):
    """A recipe on two sources of the scenes."""
    return tiny_recipe(
        scenes_dir,
        tiny_model_dir,
        tmp_path / "runs",
        data={
            "sources": [
                {"train": str(scenes_dir / "train.parquet"), "weight": 3, "cap": 12},
                {"train": str(scenes_dir / "captions.parquet"), "name": "words", "weight": 1},
            ]
        },
    )


def test_a_run_on_a_mixture_names_its_sources(mixed, scenes_dir):
    plan = make_plan(load_recipe(mixed))["members"]["student"]["stages"][0]
    assert (plan["records"], plan["epochs"]) == (16, 1.0)
    folder = pipeline.run(load_recipe(mixed))
    lines = (folder / "01-mimic" / "metrics.jsonl").read_text().splitlines()
    counts = [json.loads(line)["sources"] for line in lines]
    assert all(sum(c.values()) == 4 for c in counts)
    assert {k: sum(c[k] for c in counts) for k in counts[0]} == {"train": 12, "words": 4}
    data = read_json(folder / "provenance.json")["data"]
    assert set(data) == {str(scenes_dir / n) for n in ("train.parquet", "captions.parquet")}
    assert all(v.startswith("sha256 ") for v in data.values())


def test_the_first_record_of_every_source_is_looked_at_before_a_run(mixed, tmp_path):
    rows = [{"id": "r1", "image": "gone.png", "conversations": turns("<image>?", "a")}]
    (tmp_path / "bad.json").write_text(json.dumps(rows))
    mixed["data"]["sources"][1]["train"] = str(tmp_path / "bad.json")
    with pytest.raises(DataError, match=r"bad\.json: record 0 \(id r1\): no such image: gone\.png"):
        pipeline.run(load_recipe(mixed))
    assert not (tmp_path / "runs").exists()


def test_a_cache_of_the_sources_serves_their_mixture(mixed, scenes_dir, tiny_model_dir, tmp_path):
    store = {"folder": str(tmp_path / "cache"), "k": 8}
    teacher = {"model": str(tiny_model_dir), "source": "cache", "cache": store}
    stage = {**mixed["stages"][0], "objectives": [{"kind": "kl"}], "steps": 2}
    both = [scenes_dir / "train.parquet", scenes_dir / "captions.parquet"]
    plain = {"train": str(both[0])}
    apart = [
        {**stage, "name": n, "data": {"train": str(p)}} for n, p in zip("ab", both, strict=True)
    ]
    build_cache(load_recipe({**mixed, "teacher": teacher, "data": plain, "stages": apart}))
    folder = pipeline.run(load_recipe({**mixed, "teacher": teacher, "stages": [stage]}))
    assert (folder / "01-mimic" / "done.json").exists()
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["data"]["train"] is None
