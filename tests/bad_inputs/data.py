"""Records and pictures that cannot be used."""

import json
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

from PIL import Image

from bad_inputs.table import RECORD, World, case, overridden, record

KIND = "data"
FIRST = "records.json: record 0 (id r1): "
TURNS = RECORD["conversations"]

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
overridden(
    KIND, "images_longer_than_a_sequence", "data.max_length=20", "max_length 20", "data.max_length"
)


@case(
    KIND,
    "asked a question that leaves no room for its answer",
    FIRST + "max_length 100 cuts off its whole answer",
    "raise data.max_length",
)
def answer_behind_max_length(world: World) -> None:
    question = {"from": "human", "value": "<image>\n" + "Is there a cat? " * 20}
    world.records(record(conversations=[question, TURNS[1]]))
    world.raw["data"]["max_length"] = 100


@case(
    KIND,
    "gave a system message that the chat template leaves out",
    FIRST + "the chat template leaves out or changes what 'system' says in turn 0",
    "drop the turn",
)
def turn_that_the_template_leaves_out(world: World) -> None:
    path = Path("model/chat_template.jinja")
    loop = "for message in messages"
    path.write_text(path.read_text().replace(loop, f"{loop} if message['role'] != 'system'"))
    system = {"from": "system", "value": "Answer in French."}
    world.records(record(conversations=[system, *TURNS]))


@case(
    KIND, "named a folder without data files", "parts: the folder holds no data files", "put .json"
)
def folder_of_nothing(world: World) -> None:
    Path("parts").mkdir()
    world.raw["data"] = {"train": "parts"}


@case(KIND, "gave a list that breaks off", "records.json: cannot read", "mend the file")
def broken_json(world: World) -> None:
    Path("records.json").write_text('[{"id": "r1", "conv')


@case(
    KIND, "gave lines that are no JSON", "records.jsonl: cannot read: ", "line 1 ", "mend the file"
)
def broken_lines(world: World) -> None:
    Path("records.jsonl").write_text('{"id": "r1", }\n')
    world.raw["data"] = {"train": "records.jsonl"}


@case(
    KIND,
    "gave text of another encoding",
    "records.json: cannot read: no UTF-8 at byte 10",
    "mend the file",
)
def another_encoding(world: World) -> None:
    Path("records.json").write_bytes('[{"id": "r\xe9"}]'.encode("latin-1"))


@case(KIND, "gave a parquet file that was cut", "part.parquet: cannot read", "mend the file")
def broken_parquet(world: World) -> None:
    Path("part.parquet").write_bytes(b"PAR1" + bytes(40))
    world.raw["data"] = {"train": "part.parquet"}


@case(KIND, "named something else .tar", "part.tar: cannot read", "name tars without compression")
def no_tar(world: World) -> None:
    Path("part.tar").write_bytes(b"something else " * 100)
    world.raw["data"] = {"train": "part.tar"}


@case(KIND, "put a link into a shard", "part.tar: 1.jpg is no plain file", "pack plain files only")
def link_in_a_tar(world: World) -> None:
    with tarfile.open("part.tar", "w") as tar:
        member = tarfile.TarInfo("1.jpg")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member)
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
    "data.sources.0.stream: no number of records",
    "say how many are read",
)
def stream_without_a_number(world: World) -> None:
    world.raw["data"] = {"sources": [{"train": "hub:someone/dataset", "stream": True}]}


@case(
    KIND,
    "gave a key of a source beside `train`",
    "data: 'split' is a key of a source",
    "write sources: [{train: ..., split: ...}]",
)
def key_of_a_source(world: World) -> None:
    world.raw["data"] = {"train": "hub:someone/dataset", "split": "test"}


@case(KIND, "gave no records", "records.json: the data set is empty", "add records")
def empty_data(world: World) -> None:
    world.records()


@case(
    KIND,
    "gave a record without an answer",
    FIRST + "no response of the assistant",
    "add one or drop",
)
def no_response(world: World) -> None:
    world.records(record(conversations=TURNS[:1]))


@case(
    KIND,
    "gave a record without its picture",
    FIRST,
    "1 image placeholder(s) but 0 image(s)",
    "make the two numbers equal",
)
def no_image(world: World) -> None:
    world.records(record(image=None))


@case(
    KIND,
    "gave two pictures for one placeholder",
    FIRST,
    "1 image placeholder(s) but 2 image(s)",
    "make the two numbers equal",
)
def more_images_than_placeholders(world: World) -> None:
    world.records(record(image=["picture.png", "picture.png"]))


@case(KIND, "gave a turn to a robot", FIRST + "unknown role 'robot'", "known: human, gpt")
def unknown_role(world: World) -> None:
    world.records(record(conversations=[{"from": "robot", "value": "?"}, *TURNS]))


@case(
    KIND,
    "wrote a conversation as text",
    FIRST + "a conversation is no list of turns",
    "give each turn",
)
def conversation_of_text(world: World) -> None:
    world.records(record(conversations="Is there a cat? yes"))


@case(
    KIND,
    "gave an answer that is a number",
    FIRST + "a turn of 'gpt' has no text",
    "give it a value",
)
def answer_of_a_number(world: World) -> None:
    world.records(record(conversations=[TURNS[0], {"from": "gpt", "value": 5}]))


@case(
    KIND,
    "used keys of no known schema",
    "record 0",
    "neither 'conversations' nor 'messages'",
    "use one of the schemas",
)
def unknown_schema(world: World) -> None:
    world.records({"question": "Is there a cat?", "answer": "yes"})


@case(
    KIND,
    "gave an object without a box",
    FIRST + "an object has no name or no box",
    "give {name, box}",
)
def object_without_a_box(world: World) -> None:
    world.records(record(objects=[{"name": "cat"}]))


@case(
    KIND,
    "gave a preference objective records without a rejected answer",
    FIRST + "the record has no rejected answer",
    "add 'chosen' and 'rejected'",
)
def no_rejected_answer(world: World) -> None:
    world.teach({"kind": "preference"})


@case(
    KIND, "gave a pair of one answer", FIRST + "chosen and rejected are the same", "drop the record"
)
def equal_pair(world: World) -> None:
    world.records({"id": "r1", "question": "Is there a cat?", "chosen": "no", "rejected": "no"})


@case(
    KIND,
    "gave a record with a video",
    FIRST + "the record has media under 'video', which is not read",
    "name the key in 'ignore' of its source",
)
def record_with_a_video(world: World) -> None:
    world.records(record(video="clip.mp4"))


@case(
    KIND,
    "gave the system message a key of its own",
    FIRST + "the record has content under 'system', which is not read",
    "drop the record",
)
def system_beside_the_conversation(world: World) -> None:
    world.records(record(system="Be brief."))


@case(
    KIND,
    "gave sound among the parts of a turn",
    FIRST + "unknown content type 'audio'",
    "text or image",
)
def audio_part(world: World) -> None:
    said = [{"role": "user", "content": [{"type": "audio", "audio": "a.wav"}]}]
    world.records({"id": "r1", "messages": [*said, {"role": "assistant", "content": "yes"}]})


@case(
    KIND,
    "gave a picture a size among the parts of a turn",
    FIRST + "unknown content key 'max_pixels' beside image",
    "image_size",
)
def size_of_a_picture_in_a_turn(world: World) -> None:
    part = {"type": "image", "image": "picture.png", "max_pixels": 50176}
    said = [{"role": "user", "content": [part]}, {"role": "assistant", "content": "yes"}]
    world.records({"id": "r1", "messages": said})


@case(
    KIND,
    "marked an answer as one not to train on",
    FIRST + "a turn of 'gpt' has weight: 0",
    "cut the record before it",
)
def turn_without_weight(world: World) -> None:
    world.records(record(conversations=[TURNS[0], {**TURNS[1], "weight": 0}]))


@case(
    KIND,
    "named a picture within the text",
    FIRST + "the text names a file: <img>picture.png</img>",
    "write <image> in its place",
)
def picture_named_in_the_text(world: World) -> None:
    asked = {"from": "human", "value": "Picture 1: <img>picture.png</img>\nIs there a cat?"}
    world.records(record(image=None, conversations=[asked, TURNS[1]]))


@case(
    KIND,
    "named the picture under another key",
    FIRST + "its picture is named under 'image_path'",
    "name it under 'image'",
)
def picture_under_another_key(world: World) -> None:
    world.records(record(image=None, image_path="picture.png"))


@case(
    KIND,
    "gave two pictures under two keys",
    FIRST + "'image' and 'images' say different things",
    "drop one of them",
)
def picture_under_two_keys(world: World) -> None:
    world.records(record(images=["other.png"]))


@case(
    KIND,
    "referred to a picture that is not in the list",
    FIRST + "image placeholders have the indices [1], but the images are [0]",
    "counted from 0",
)
def index_of_no_picture(world: World) -> None:
    asked = [{"type": "image", "index": 1}, {"type": "text", "text": "Is there a cat?"}]
    said = [{"role": "user", "content": asked}, {"role": "assistant", "content": "yes"}]
    world.records({"id": "r1", "images": ["picture.png"], "messages": said})


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


@case(KIND, "let all records be skipped", "records.json: every record is bad", "data check")
def every_record_is_bad(world: World) -> None:
    world.records(record(image=None))
    world.raw["data"]["on_bad_sample"] = "skip"


# Pictures


def picture(name: str) -> dict[str, Any]:
    return record(image=name)


@case(
    "image", "named a picture that is not there", FIRST + "no such image: gone.png", "data.images"
)
def missing_image(world: World) -> None:
    world.records(picture("gone.png"))


@case(
    "image",
    "named a picture on the web",
    FIRST + "https://example.org/a.png lies on the web",
    "download it",
)
def image_on_the_web(world: World) -> None:
    world.records(picture("https://example.org/a.png"))


@case(
    "image",
    "gave LLaVA-1.5 a picture of 10000 x 2 pixels",
    FIRST + "the processor would make",
    "pixels of a picture of 10000 x 2",
    "crop or drop it",
)
def image_that_a_processor_blows_up(world: World) -> None:
    Image.new("1", (10_000, 2)).save("wide.png")
    path = Path("model/processor_config.json")
    settings = json.loads(path.read_text())
    settings["image_processor"]["size"] = {"shortest_edge": 336}
    path.write_text(json.dumps(settings))
    world.records(picture("wide.png"))


@case("image", "named a folder", FIRST + "model is not a file", "check data.images")
def image_is_a_folder(world: World) -> None:
    world.records(picture("model"))


@case(
    "image",
    "gave bytes that are no picture",
    FIRST + "broken.png is not a readable image",
    "replace",
)
def broken_image(world: World) -> None:
    Path("broken.png").write_bytes(b"\x89PNG but not really")
    world.records(picture("broken.png"))


@case("image", "gave a picture that was cut", FIRST + "cut.jpg is not a readable image", "replace")
def cut_image(world: World) -> None:
    Image.effect_noise((200, 200), 50).save("cut.jpg")
    content = Path("cut.jpg").read_bytes()
    Path("cut.jpg").write_bytes(content[: len(content) // 2])
    world.records(picture("cut.jpg"))


@case(
    "image",
    "gave a format that is not read",
    FIRST + "picture.eps is not a readable image",
    "JPEG, PNG",
)
def format_that_is_not_read(world: World) -> None:
    Image.new("RGB", (64, 64)).save("picture.eps")
    world.records(picture("picture.eps"))


@case(
    "image",
    "gave a small file of 900 million pixels",
    FIRST + "bomb.png is too large to decode",
    "shrink or drop it",
)
def decompression_bomb(world: World) -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    Path("bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + body)
    world.records(picture("bomb.png"))


@case(
    "image",
    "gave a picture of 32 bits a pixel",
    FIRST + "depth.tif has numbers of 32 bits",
    "8 or 16 bits",
)
def image_of_32_bits(world: World) -> None:
    Image.new("F", (64, 64), 0.5).save("depth.tif")
    world.records(picture("depth.tif"))


@case(
    KIND,
    "held a file out that is not there",
    "none.json: no such data file",
    "check data.validation",
)
def no_held_out_file(world: World) -> None:
    world.raw["data"]["validation"] = "none.json"


@case(
    KIND,
    "held the only record out",
    "records.json: its only record cannot be held out",
    "give data.validation a file",
)
def only_record_held_out(world: World) -> None:
    world.raw["data"]["validation"] = 0.5


@case(
    KIND,
    "held a record out that is bad",
    "held.json: record 0 (id r1): no such image: none.png",
    "check data.images",
)
def bad_held_out_record(world: World) -> None:
    Path("held.json").write_text(json.dumps([{**RECORD, "image": "none.png"}]))
    world.raw["data"]["validation"] = "held.json"


@case(
    "image",
    "named a picture above the folder",
    FIRST + "../picture.png lies outside of",
    "keep images below",
)
def image_above(world: World) -> None:
    Path("images").mkdir()
    world.records(picture("../picture.png"))
    world.raw["data"]["images"] = "images"


@case("image", "named a file of the machine", FIRST + "/etc/passwd lies outside of", "keep images")
def image_by_an_absolute_path(world: World) -> None:
    world.records(picture("/etc/passwd"))


@case(
    "image", "linked to a picture elsewhere", FIRST + "link.png lies outside of", "links' targets"
)
def image_behind_a_link(world: World) -> None:
    Path("images").mkdir()
    Path("images/link.png").symlink_to("../picture.png")
    world.records(picture("link.png"))
    world.raw["data"]["images"] = "images"
