"""Content of records other than text and paths: images in turns, media, unknown keys."""

import base64
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmkd.data.check import Look, check_source
from mmkd.data.encoder import Encoder
from mmkd.data.records import Records
from mmkd.errors import DataError
from mmkd.recipe import DataConfig, SourceConfig
from tests.support.layouts import drawn, encoded, put, read, turns, words, write_tar
from tests.support.processors import FAMILIES

LLAVA = {"image": "a.png", "conversations": turns("<image>\nWhat?", "A ball.")}
URL = "data:image/png;base64," + base64.b64encode(encoded(1)).decode()


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate("abc"):
        put(tmp_path, f"{name}.png", number)
    return tmp_path


def one(folder, row, name="a.json"):
    """The record of a row, and the numbers of its images."""
    (folder / name).write_text(json.dumps([row]) if name.endswith("json") else json.dumps(row))
    records = read(folder / name)
    record = records[0]
    known = [drawn(number).tobytes() for number in range(3)]
    return record, [known.index(picture.tobytes()) for picture in records.pictures(record)]


def chat(*parts, answer="A ball.", **keys):
    asked = {"role": "user", "content": list(parts)}
    return {"messages": [asked, {"role": "assistant", "content": answer}], **keys}


TEXT = {"type": "text", "text": "What?"}
OWN = {
    "image": lambda folder: {"type": "image", "image": "b.png"},
    "path": lambda folder: {"type": "image", "path": "b.png", "text": None, "index": None},
    "url_of_a_file": lambda folder: {"type": "image", "url": (folder / "b.png").as_uri()},
    "relative_url": lambda folder: {"type": "image_url", "image_url": "file:b.png"},
    "openai": lambda folder: {"type": "image_url", "image_url": {"url": URL, "detail": "low"}},
    "responses": lambda folder: {"type": "input_image", "image_url": URL},
    "base64": lambda folder: {"type": "image", "base64": URL.partition(",")[2]},
    "anthropic": lambda folder: {
        "type": "image",
        "source": {"type": "base64", "media_type": "image/png", "data": URL.partition(",")[2]},
    },
    "without_a_type": lambda folder: {"image": str(folder / "b.png")},
}


@pytest.mark.parametrize("how", OWN)
def test_pictures_in_the_turns_are_the_records(folder, how):
    other = {"type": "image", "image": "c.png"}
    record, shown = one(folder, chat(OWN[how](folder), TEXT, other))
    assert (shown, words(record)) == ([1, 2], ["<image>What?<image>", "A ball."])
    listed, _ = one(folder, chat({"type": "image"}, TEXT, {"type": "image"}, images=["b.png"] * 2))
    assert record.messages == listed.messages


@pytest.mark.parametrize("family", ["llava", "qwen", "smolvlm"])
def test_pictures_in_the_turns_are_encoded_as_listed_ones(folder, family):
    rows = [
        chat({"type": "image", "image": "b.png"}, TEXT, {"image": "c.png"}),
        chat({"type": "image"}, TEXT, {"type": "image"}, images=["b.png", "c.png"]),
        chat({"type": "image", "index": 1}, TEXT, {"type": "image", "index": 0},
             images=["c.png", "b.png"]),
    ]  # fmt: skip
    (folder / "a.json").write_text(json.dumps(rows))
    encoder = Encoder(read(folder / "a.json"), FAMILIES[family](), DataConfig(train="-"))
    first, *others = (encoder.encode([i]).inputs for i in range(3))
    for other in others:
        assert other.keys() == first.keys()
        assert all(bool((other[k] == first[k]).all()) for k in first)


def test_nulls_that_tables_write_say_nothing(folder):
    """As llava-instruct-mix-vsft and TRL's data have them."""
    parts = [{"index": None, "text": "What?", "type": "text"},
             {"index": 0, "text": None, "type": "image"}]  # fmt: skip
    answer = [{"type": "text", "text": "A ball.", "index": None}]
    row = chat(
        *parts, answer=answer, images=[{"bytes": encoded(2), "path": None}], video=None, audio=[]
    )
    pq.write_table(pa.Table.from_pylist([row]), folder / "a.parquet")
    records = read(folder / "a.parquet")
    assert words(records[0]) == ["What?<image>", "A ball."]
    assert records.pictures(records[0])[0].tobytes() == drawn(2).tobytes()
    plain = {"role": "user", "content": [{"type": "text", "text": "Hm?"}], "images": [None]}
    asked = {
        "prompt": {"content": "Hm?", "images": [None]}, "images": [None], "chosen": "Yes.",
        "rejected": "No.",
    }  # fmt: skip
    for row in (
        {"messages": [plain, {"role": "assistant", "content": "Yes."}], "images": [None]},
        {"prompt": [plain], "images": [], "chosen": "Yes.", "rejected": "No."},
        asked,
        {"images": None, "texts": [{"user": "Hm?", "assistant": "Yes.", "source": "x"}]},
    ):
        record, shown = one(folder, row)
        assert (words(record), shown) == (["Hm?", "Yes."], [])


def test_pictures_of_a_turn_stand_in_it(folder):
    asked = {"role": "user", "content": "What?", "images": ["b.png"]}
    again = {"role": "user", "content": "And <image> here?", "images": ["c.png"]}
    answer = {"role": "assistant", "content": "Yes."}
    record, shown = one(folder, {"messages": [asked, answer, again, answer]})
    assert words(record) == ["<image>What?", "Yes.", "And <image> here?", "Yes."]
    assert shown == [1, 2]


def test_the_cauldron_layout_is_read(folder):
    said = [{"user": "What?", "assistant": "A ball."}, {"user": "And?", "assistant": "No."}]
    record, shown = one(folder, {"images": ["c.png"], "texts": said})
    assert (words(record), shown) == (["<image>What?", "A ball.", "And?", "No."], [2])


def test_turns_before_a_pair_of_answers_are_its_prompt(folder):
    """As LLaMA-Factory writes pairs."""
    row = {"conversations": turns("<image>What?"), "image": "b.png",
           "chosen": {"from": "gpt", "value": "A ball."},
           "rejected": {"from": "gpt", "value": "A cat."}}  # fmt: skip
    record, shown = one(folder, row)
    assert (words(record), shown) == (["<image>What?", "A ball."], [1])
    assert record.rejected[-1]["content"][0]["text"] == "A cat."


BAD_ROWS = {
    "video": ({**LLAVA, "video": "a.mp4"}, "media under 'video'"),
    "videos": (chat(TEXT, videos=["a.mp4"]), "media under 'videos'"),
    "audio": (chat(TEXT, audio={"path": "a.wav"}), "media under 'audio'"),
    "speech_path": ({**LLAVA, "Speech_path": "a.wav"}, "media under 'Speech_path'"),
    "system": ({**LLAVA, "system": "Be brief."}, "content under 'system'"),
    "tools": ({**LLAVA, "tools": '[{"name": "f"}]'}, "content under 'tools'"),
    "kto": ({**LLAVA, "kto_tag": False}, "content under 'kto_tag'"),
    "two_texts": ({**LLAVA, "messages": chat(TEXT)["messages"]}, "differ"),
    "two_pictures": ({**LLAVA, "images": ["b.png"]}, "'image' and 'images' differ"),
    "half_a_pair": ({**LLAVA, "rejected": "A cat."}, "'rejected' without 'chosen'"),
    "other_name": (chat(TEXT, image_path="a.png"), "named under 'image_path'"),
    "numbered": (chat(TEXT, image_1="a.png"), "named under 'image_1'"),
    "video_part": (chat({"type": "video", "video": "a.mp4"}, TEXT), "unknown content type 'video'"),
    "untyped_video": (chat({"video": "a.mp4"}, TEXT), "unknown content type"),
    "audio_in_text": (chat({**TEXT, "audio": "a.wav"}), "unknown content key 'audio'"),
    "size_of_a_part": (
        chat({"type": "image", "image": "a.png", "max_pixels": 99}, TEXT),
        "unknown content key 'max_pixels'",
    ),
    "string_part": (chat("image", TEXT), "unknown content type 'None'"),
    "turn_audio": (
        {"messages": [{"role": "user", "content": "?", "audio": "a.wav"}]},
        "a turn of 'user' has media under 'audio'",
    ),
    "other_case": (
        {"messages": [{"role": "user", "content": "?", "Video": "a.mp4"}]},
        "a turn of 'user' has media under 'Video'",
    ),
    "pictures_of_a_turn": (
        {"messages": [{"role": "user", "content": "?", "image": "a.png", "images": ["b.png"]}]},
        "'image' and 'images' differ -- drop one of them$",
    ),
    "tool_calls": (
        {"messages": [{"role": "user", "content": "?"},
                      {"role": "assistant", "content": "!", "tool_calls": [{"name": "f"}]}]},
        "content under 'tool_calls'",
    ),
    "thoughts": (
        {"messages": [{"role": "user", "content": "?"},
                      {"role": "assistant", "content": "!", "reasoning_content": "Hm."}]},
        "content under 'reasoning_content'",
    ),
    "untrained_turn": (
        {"messages": [{"role": "user", "content": "?"},
                      {"role": "assistant", "content": "!", "weight": 0}]},
        "has weight: 0, but mmkd trains on every answer",
    ),
    "qwen_1": (
        {"conversations": turns("Picture 1: <img>a.png</img>\nWhat?", "A ball.")},
        "the text names a file: <img>a.png</img>",
    ),
    "web": ({**LLAVA, "image": "https://example.org/a.png"}, "a.png is a web address"),
    "data_url": (chat({"image": "data:video/mp4;base64,AAAA"}, TEXT), "a data URL is not an ima"),
    "base64": (chat({"image": "data:image/png;base64,A"}, TEXT), "base64 is damaged"),
    "index": (chat({"type": "image", "index": 1}, TEXT, images=["a.png"]), r"the indices \[1\]"),
    "unused": (
        chat({"type": "image", "index": 0}, TEXT, images=["a.png", "b.png"]),
        r"but the images are \[0, 1\]",
    ),
    "half_named": (
        chat({"type": "image", "image": "a.png"}, {"type": "image"}, TEXT, images=["b.png"]),
        "only some of the image placeholders name their image",
    ),
    "twice": (
        chat({"type": "image", "image": "a.png"}, TEXT, images=["b.png"]),
        r"the images in the turns \(1\) differ from those under 'images' \(1\)",
    ),
    "names_two": (
        chat({"type": "image", "image": "a.png", "path": "b.png"}, TEXT), "names several images"
    ),
    "spelt_beside_a_part": (
        chat({"type": "image"}, {"type": "text", "text": "<image>\nWhat?"}, images=["a.png"]),
        r"2 image placeholder\(s\) but 1",
    ),
    "texts": ({"texts": [{"user": "?", "assistant": None}]}, "'assistant' has no text"),
    "system_of_texts": (
        {"texts": [{"user": "?", "assistant": "!", "system": "Be brief."}]},
        "an exchange of 'texts' has content under 'system'",
    ),
    "picture_of_texts": (
        {"texts": [{"user": "?", "assistant": "!", "image": "a.png"}]},
        "an exchange of 'texts' has content under 'image'",
    ),
    "texts_beside_messages": (
        {"messages": chat(TEXT)["messages"], "texts": [{"user": "Who?", "assistant": "A ball."}]},
        "'messages' and 'texts' differ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ROWS)
def test_nothing_of_a_record_is_left_out_in_silence(folder, case):
    row, message = BAD_ROWS[case]
    row = {**row, "id": "x7"}
    with pytest.raises(DataError, match=rf"a\.json: record 0 \(id x7\): .*{message}"):
        one(folder, row)
    (folder / "b.json").write_text(json.dumps([LLAVA, row, LLAVA]))
    config = DataConfig(train=str(folder / "b.json"), on_bad_record="skip")
    batch = Encoder(Records(config), FAMILIES["llava"](), config).encode([0, 1])
    assert len(batch.skipped) == 1
    assert "record 1 (id x7)" in batch.skipped[0]
    found = check_source(SourceConfig(train=str(folder / "b.json")), Look(), workers=1)
    assert (found.bad, found.records) == (1, 3)


def test_a_source_can_ignore_what_turns_have(folder):
    asked = {"role": "user", "content": "What?", "text": "of the turn", "video": "a.mp4"}
    answer = {"role": "assistant", "content": "A ball.", "reasoning_content": "Hm.", "weight": 0}
    pair = {"prompt": {**asked}, "chosen": [answer], "rejected": {**answer, "content": "A cat."}}
    cauldron = {"texts": [{"user": "What?", "assistant": "A ball.", "system": "Be brief."}]}
    for row in ({"messages": [asked, answer], "text": "of the record"}, pair, cauldron):
        keys = ["video", "reasoning_content", "weight", "system", "text"]
        (folder / "a.json").write_text(json.dumps([row]))
        source = {"train": str(folder / "a.json"), "ignore": keys}
        assert words(Records(DataConfig(sources=[source]))[0]) == ["What?", "A ball."]
        for key in keys[:2] if row is not cauldron else keys[3:4]:
            fewer = {**source, "ignore": [k for k in keys if k != key]}
            with pytest.raises(DataError, match=f"under '{key}', .* 'ignore' of its source"):
                Records(DataConfig(sources=[fewer]))[0]


@pytest.mark.parametrize("empty", [[None], [], "", None, [""]])
def test_an_empty_list_of_pictures_hides_no_picture(folder, empty):
    """As tables write it whose rows have either key."""
    record, shown = one(folder, {**chat(TEXT), "images": empty, "image": "b.png"})
    assert (words(record), shown) == (["<image>What?", "A ball."], [1])
    asked = {"role": "user", "content": "What?", "images": empty, "image": "b.png"}
    answer = {"role": "assistant", "content": "A ball."}
    record, shown = one(folder, {"messages": [asked, answer]})
    assert (words(record), shown) == (["<image>What?", "A ball."], [1])


def test_an_empty_text_hides_no_other(folder):
    said = [{"role": "", "content": "", "from": "human", "value": "What?"},
            {"from": "gpt", "value": "A ball.", "content": [], "loss": float("nan")}]  # fmt: skip
    record, _ = one(folder, {"messages": said})
    assert words(record) == ["What?", "A ball."]


def test_a_picture_may_have_the_name_of_a_scheme(folder):
    for name in ("data", "file"):
        put(folder, f"{name}.png", 2).replace(".png", "")
        (folder / f"{name}.png").rename(folder / name)
        assert one(folder, chat({"type": "image", "image": name}, TEXT))[1] == [2]


@pytest.mark.parametrize(
    "key", ["source", "model", "width", "score", "video_id", "split", "url", "image_id", "caption"]
)
def test_metadata_are_passed_over(folder, key):
    record, shown = one(folder, {**LLAVA, key: "some", "height": [3, 4], "split": 0})
    assert (shown, words(record)) == ([0], ["<image>What?", "A ball."])


def test_columns_of_files_are_not_passed_over_whatever_their_name(folder):
    row = {**LLAVA, "thumbnail": {"bytes": encoded(1), "path": None}}
    pq.write_table(pa.Table.from_pylist([row]), folder / "a.parquet")
    with pytest.raises(DataError, match="record 0: the record has content under 'thumbnail'"):
        read(folder / "a.parquet")[0]
    source = {"train": str(folder / "a.parquet"), "ignore": ["thumbnail"]}
    assert words(Records(DataConfig(sources=[source]))[0]) == ["<image>What?", "A ball."]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"x.mp4": b"", "x.txt": b"a ball"}, r"the file x\.mp4, which is not read"),
        ({"x.heic": b"", "x.txt": b"a ball"}, r"the file x\.heic"),
        ({"x.png": encoded(), "x.0.wav": b"", "x.txt": b"a ball"}, r"the file x\.0\.wav"),
        ({"x.txt": b"a ball"}, "a caption without an image"),
    ],
)
def test_media_in_shards_are_not_passed_over(tmp_path, members, message):
    records = read(write_tar(tmp_path / "a.tar", members))
    with pytest.raises(DataError, match=rf"a\.tar: record 0: .*{message}"):
        records[0]
