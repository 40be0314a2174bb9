"""Records that cannot be used."""

from pathlib import Path

from tests.support.bad_inputs.table import FIRST, TURNS, World, case, overridden, record

KIND = "data"

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
    FIRST + "the chat template leaves out or changes the text of 'system' in turn 0",
    "drop the turn",
)
def turn_that_the_template_leaves_out(world: World) -> None:
    path = Path("model/chat_template.jinja")
    loop = "for message in messages"
    path.write_text(path.read_text().replace(loop, f"{loop} if message['role'] != 'system'"))
    system = {"from": "system", "value": "Answer in French."}
    world.records(record(conversations=[system, *TURNS]))


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
    "gave a record without its image",
    FIRST,
    "1 image placeholder(s) but 0 image(s)",
    "make the two numbers equal",
)
def no_image(world: World) -> None:
    world.records(record(image=None))


@case(
    KIND,
    "gave two images for one placeholder",
    FIRST,
    "1 image placeholder(s) but 2 image(s)",
    "make the two numbers equal",
)
def more_images_than_placeholders(world: World) -> None:
    world.records(record(image=["picture.png", "picture.png"]))


@case(KIND, "gave a turn the role `robot`", FIRST + "unknown role 'robot'", "known: human, gpt")
def unknown_role(world: World) -> None:
    world.records(record(conversations=[{"from": "robot", "value": "?"}, *TURNS]))


@case(
    KIND,
    "wrote a conversation as text",
    FIRST + "a conversation is not a list of turns",
    "give each turn",
)
def conversation_of_text(world: World) -> None:
    world.records(record(conversations="Is there a cat? yes"))


@case(
    KIND,
    "gave a number as an answer",
    FIRST + "a turn of 'gpt' has no text",
    "give it a value",
)
def answer_of_a_number(world: World) -> None:
    world.records(record(conversations=[TURNS[0], {"from": "gpt", "value": 5}]))


@case(
    KIND,
    "used keys that no schema has",
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
    KIND,
    "gave a preference pair with two equal answers",
    FIRST + "chosen and rejected are the same",
    "drop the record",
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
    "gave audio among the parts of a turn",
    FIRST + "unknown content type 'audio'",
    "text or image",
)
def audio_part(world: World) -> None:
    said = [{"role": "user", "content": [{"type": "audio", "audio": "a.wav"}]}]
    world.records({"id": "r1", "messages": [*said, {"role": "assistant", "content": "yes"}]})


@case(
    KIND,
    "gave an image's size among the parts of a turn",
    FIRST + "unknown content key 'max_pixels' of type image",
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
    "cut the record before this turn",
)
def turn_without_weight(world: World) -> None:
    world.records(record(conversations=[TURNS[0], {**TURNS[1], "weight": 0}]))


@case(
    KIND,
    "named an image within the text",
    FIRST + "the text names a file: <img>picture.png</img>",
    "write <image> instead",
)
def picture_named_in_the_text(world: World) -> None:
    asked = {"from": "human", "value": "Picture 1: <img>picture.png</img>\nIs there a cat?"}
    world.records(record(image=None, conversations=[asked, TURNS[1]]))


@case(
    KIND,
    "named the image under another key",
    FIRST + "its image is named under 'image_path'",
    "name it under 'image'",
)
def picture_under_another_key(world: World) -> None:
    world.records(record(image=None, image_path="picture.png"))


@case(
    KIND,
    "gave two images under two keys",
    FIRST + "'image' and 'images' differ",
    "drop one of them",
)
def picture_under_two_keys(world: World) -> None:
    world.records(record(images=["other.png"]))


@case(
    KIND,
    "referred to an image that is not in the list",
    FIRST + "image placeholders have the indices [1], but the images are [0]",
    "counted from 0",
)
def index_of_no_picture(world: World) -> None:
    asked = [{"type": "image", "index": 1}, {"type": "text", "text": "Is there a cat?"}]
    said = [{"role": "user", "content": asked}, {"role": "assistant", "content": "yes"}]
    world.records({"id": "r1", "images": ["picture.png"], "messages": said})
