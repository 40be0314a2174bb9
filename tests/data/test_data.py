"""Records, images, chat masks and batches."""

import copy

import pytest
import torch
from PIL import Image, ImageFile

from mmkd.data import records as records_module
from mmkd.data.chat import render_chat
from mmkd.data.encoder import Encoder
from mmkd.data.images import load_image
from mmkd.data.processing import Processing
from mmkd.data.records import Records
from mmkd.errors import DataError
from mmkd.recipe import DataConfig
from tests.support.processors import END, FAMILIES
from tests.support.templates import THINKING
from tests.support.written_records import TURNS, conversations, records


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (40, 24), "red").save(tmp_path / "red.png")
    Image.new("L", (24, 40), 9).save(tmp_path / "grey.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    return tmp_path


def supervised(batch, processor, row):
    ids = batch.targets.input_ids[row][batch.targets.response[row]]
    return processor.tokenizer.decode(ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_supervised_tokens_are_the_responses_exactly(folder, family):
    processor = FAMILIES[family]()
    rows = [
        {"id": "a", "image": "red.png", "conversations": conversations(TURNS)},
        {"id": "b", "image": "grey.png", "conversations": conversations(TURNS[:2])},
    ]
    encoder = Encoder(records(folder, rows), processor, DataConfig(train="-"))
    batch = encoder.encode([0, 1])
    first, second = "two cats and a dog", "No hat: none at all."
    end = END[family]
    # LLaVA-1.5's template closes no turn: only the last one gets the EOS token.
    middle = first if family == "llava" else first + end
    got = supervised(batch, processor, 0)
    assert got.replace(" ", "") == (middle + second + end).replace(" ", "")
    assert supervised(batch, processor, 1).strip() == first + end


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_never_overlap_and_cover_all_real_tokens(folder, family):
    processor = FAMILIES[family]()
    rows = [
        {"image": "red.png", "conversations": conversations(TURNS)},
        {"image": "grey.png", "conversations": conversations(TURNS[:2])},
    ]
    targets = (
        Encoder(records(folder, rows), processor, DataConfig(train="-")).encode([0, 1]).targets
    )
    assert targets.vision.sum() > 0
    assert not (targets.vision & targets.response).any()
    assert not (targets.response & ~targets.attention).any()
    assert (targets.input_ids[targets.vision] == Processing(processor).image_token_id).all()
    for row in range(2):
        assert targets.input_ids[row][targets.predicts("response")[row]].shape[0] == int(
            targets.response[row].sum()
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_response_token_is_predicted_by_the_last_prompt_token(folder, family):
    processor = FAMILIES[family]()
    rows = [{"image": "red.png", "conversations": conversations(TURNS[:2])}]
    targets = Encoder(records(folder, rows), processor, DataConfig(train="-")).encode([0]).targets
    first = int(targets.response[0].nonzero()[0])
    rows_ = targets.predicts("response")[0]
    assert rows_[first - 1]
    assert not targets.response[0, first - 1]
    predicted = processor.tokenizer.decode(targets.next_ids()[0, first - 1]).strip()
    assert predicted
    assert "two cats".startswith(predicted)
    last = int(targets.response[0].nonzero()[-1])
    assert not rows_[last]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_masked_is_what_generation_is_asked_for(folder, family):
    """The prompt of evaluation is exactly what stands before the first supervised token."""
    processor = FAMILIES[family]()
    rows = [{"image": "red.png", "conversations": conversations(TURNS[:2])}]
    data = records(folder, rows)
    batch = Encoder(data, processor, DataConfig(train="-")).encode([0])
    prompt = processor.apply_chat_template(data[0].messages[:1], add_generation_prompt=True)
    asked = processor(text=[prompt], images=data.pictures(data[0]), return_tensors="pt")
    first = int(batch.targets.response[0].nonzero()[0])
    assert batch.targets.input_ids[0, :first].tolist() == asked["input_ids"][0].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_records_without_and_with_several_images(folder, family):
    processor = FAMILIES[family]()
    two = [("human", "<image>\nand <image>\ntwo?"), ("gpt", "yes")]
    rows = [
        {"images": [], "conversations": conversations([("human", "hat?"), ("gpt", "no")])},
        {"images": ["red.png", "grey.png"], "conversations": conversations(two)},
    ]
    encoder = Encoder(records(folder, rows), processor, DataConfig(train="-"))
    batch = encoder.encode([0, 1])
    assert batch.targets.vision[0].sum() == 0
    assert supervised(batch, processor, 0).strip() == "no" + END[family]
    assert supervised(batch, processor, 1).strip() == "yes" + END[family]
    assert encoder.encode([0]).targets.vision.sum() == 0


def test_chat_messages_and_jsonl_read_like_llava_records(folder):
    llava = {"image": "red.png", "conversations": conversations(TURNS)}
    roles = {"human": "user", "gpt": "assistant"}
    chat = {
        "images": ["red.png"],
        "messages": [
            {"role": roles[who], "content": what.removeprefix("<image>\n")} for who, what in TURNS
        ],
    }
    a = records(folder, [llava])[0]
    b = records(folder, [chat], ".jsonl")[0]
    assert a.messages == b.messages
    assert a.images == b.images


def test_thoughts_before_the_last_answer_alone():
    """Earlier answers stand without them, and where the generation prompt has left off there."""
    processor = copy.copy(FAMILIES["qwen"]())
    processor.chat_template = THINKING
    said = ["two cats", "no", "a dog"]
    messages = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for answer in said
        for role, text in (("user", "How many?"), ("assistant", answer))
    ]
    found = render_chat(processor, messages)
    spans = [found.text[a:b] for a, b in found.spans]
    assert spans == ["two cats<|im_end|>", "no<|im_end|>", "\n</think>\n\na dog<|im_end|>"]
    assert [found.text[a:b] for a, b in found.said] == said


def test_a_template_that_rewrites_history_is_refused():
    processor = FAMILIES["qwen"]()
    template = processor.chat_template
    try:
        processor.chat_template = "{{ messages | length }}" + template
        messages = [
            {"role": r, "content": [{"type": "text", "text": t}]}
            for r, t in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
        ]
        with pytest.raises(DataError, match="rewrites the conversation"):
            render_chat(processor, messages)
    finally:
        processor.chat_template = template


def test_turns_that_a_template_refuses_are_a_bad_record(folder):
    """As Gemma's does two questions in a row."""
    processor = copy.copy(FAMILIES["llava"]())
    processor.chat_template = (
        "{% for m in messages %}{% if loop.index0 % 2 != (m.role == 'assistant') | int %}"
        "{{ raise_exception('Roles must alternate!\\n') }}{% endif %}{% endfor %}"
    ) + processor.chat_template
    two = [("human", "what?"), ("human", "two ?"), ("gpt", "two cats")]
    rows = [{"id": "twice", "conversations": conversations(two)},
            {"id": "good", "conversations": conversations(two[1:])}]  # fmt: skip
    data = records(folder, rows)
    for encode in (lambda e: e.encode([0]), lambda e: e.encode([1, 0])):
        with pytest.raises(DataError, match=r"0 \(id twice\): the chat template refuses it: Roles"):
            encode(Encoder(data, processor, DataConfig(train="-")))
    skipping = Encoder(data, processor, DataConfig(train="-", on_bad_record="skip"))
    assert skipping.encode([0, 1]).ids == ["good", "good"]
    assert skipping.length(0) == skipping.length(1) > 0


def test_what_a_processor_refuses_is_named_and_can_be_skipped(folder):
    """Qwen's refuses images 200 times as wide as high; no look at the record alone tells."""
    Image.new("RGB", (900, 3)).save(folder / "wide.png")
    rows = [
        {"id": name, "image": image, "conversations": conversations(TURNS)}
        for name, image in (("a", "red.png"), ("wide", "wide.png"), ("b", "red.png"))
    ]
    data, processor = records(folder, rows), FAMILIES["qwen"]()
    stopping = Encoder(data, processor, DataConfig(train="-"))
    with pytest.raises(
        DataError, match=r"record 1 \(id wide\): the processor refuses it: absolute"
    ):
        stopping.encode([0, 1, 2])
    assert stopping.length(1) == 0
    for pack in (None, 200):
        config = DataConfig(train="-", on_bad_record="skip")
        skipping = Encoder(data, processor, config, pack=pack)
        batch = skipping.encode([0, 1, 2])
        assert [len(batch.ids), "wide" in batch.ids] == [3, False]
        assert len(batch.skipped) == 1
        assert "record 1 (id wide): the processor refuses it" in batch.skipped[0]
        assert skipping.length(1) == stopping.length(0)


def test_pictures_longer_than_a_sequence_can_be_skipped(folder):
    rows = [{"id": str(n), "images": ["red.png"] * n,
             "conversations": conversations([("human", "<image>" * n + "?"), ("gpt", "two cats")])}
            for n in (1, 4, 1)]  # fmt: skip
    config = DataConfig(train="-", max_length=50, on_bad_record="skip")
    batch = Encoder(records(folder, rows), FAMILIES["llava"](), config).encode([0, 1, 2])
    assert batch.ids == ["1", "1", "1"]
    assert ["its images have more tokens than max_length 50" in s for s in batch.skipped] == [True]


def test_a_record_that_the_teachers_processor_refuses_is_read_by_neither(folder):
    """Else the two models would see different records side by side."""
    Image.new("RGB", (900, 3)).save(folder / "wide.png")
    rows = [
        {"id": name, "image": image, "conversations": conversations(TURNS)}
        for name, image in (("a", "red.png"), ("wide", "wide.png"), ("b", "red.png"))
    ]
    config = DataConfig(train="-", on_bad_record="skip")
    encoder = Encoder(records(folder, rows), FAMILIES["llava"](), config,
                      teacher_processor=FAMILIES["qwen"](), chunks=True, aligned=False)  # fmt: skip
    batch = encoder.encode([0, 1, 2])
    assert batch.indices == batch.teacher.indices
    assert 1 not in batch.indices
    assert ["id wide" in s for s in batch.skipped] == [True]


def test_looking_for_another_record_ends(folder, monkeypatch):
    rows = [{"id": str(i), "image": "broken.png", "conversations": conversations(TURNS)}
            for i in range(20)]  # fmt: skip
    config = DataConfig(train="-", on_bad_record="skip")
    encoder = Encoder(records(folder, rows), FAMILIES["llava"](), config)
    with pytest.raises(DataError, match=r"every record is bad, the last one: broken\.png is not"):
        encoder.encode([0])
    monkeypatch.setattr(records_module, "MOST_TRIED", 5)
    with pytest.raises(DataError, match="5 records in a row are bad, the last one: broken"):
        encoder.encode([0])


BAD = {
    "no response": (
        {"image": "red.png", "conversations": conversations(TURNS[:1])},
        "no response of the assistant",
    ),
    "empty response": (
        {"image": "red.png", "conversations": conversations([TURNS[0], ("gpt", " ")])},
        "no response of the assistant",
    ),
    "no image": ({"conversations": conversations(TURNS)}, "1 image placeholder(s) but 0 image(s)"),
    "two images": (
        {"images": ["red.png", "red.png"], "conversations": conversations(TURNS)},
        "1 image placeholder(s) but 2 image(s)",
    ),
    "missing file": (
        {"image": "none.png", "conversations": conversations(TURNS)},
        "no such image: none.png",
    ),
    "broken file": (
        {"image": "broken.png", "conversations": conversations(TURNS)},
        "broken.png is not a readable image",
    ),
    "outside": (
        {"image": "../../etc/hostname", "conversations": conversations(TURNS)},
        "is outside of",
    ),
    "unknown role": (
        {"image": "red.png", "conversations": conversations([("robot", "<image>")])},
        "unknown role 'robot'",
    ),
    "no schema": ({"image": "red.png", "text": "hello"}, "neither 'conversations' nor"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_records_name_file_record_and_mend(folder, name):
    row, message = BAD[name]
    encoder = Encoder(records(folder, [{"id": "x7", **row}]), FAMILIES["llava"](),
                      DataConfig(train="-"))  # fmt: skip
    with pytest.raises(DataError) as caught:
        encoder.encode([0])
    text = str(caught.value)
    assert message in text
    assert "data.json: record 0 (id x7)" in text
    assert "\n" not in text


def test_bad_records_can_be_skipped_and_are_listed(folder):
    good = {"id": "good", "image": "red.png", "conversations": conversations(TURNS[:2])}
    bad = {"id": "bad", "image": "broken.png", "conversations": conversations(TURNS[:2])}
    config = DataConfig(train="-", on_bad_record="skip")
    batch = Encoder(records(folder, [bad, good]), FAMILIES["llava"](), config).encode([0, 1])
    assert batch.ids == ["good", "good"]
    assert len(batch.skipped) == 1
    assert "id bad" in batch.skipped[0]


@pytest.mark.parametrize(
    ("content", "suffix", "message"),
    [
        ("[]", ".json", "empty"),
        ("{broken", ".json", "cannot read"),
        ("a,b", ".csv", "unknown kind of data file"),
        (None, ".json", "no such data file"),
    ],
)
def test_bad_data_files(tmp_path, content, suffix, message):
    path = tmp_path / f"data{suffix}"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        Records(DataConfig(train=str(path)))
    assert str(path) in str(caught.value)


def test_long_records_are_cut_behind_the_images_only(folder):
    rows = [{"id": "long", "image": "red.png", "conversations": conversations(TURNS)}]
    data = records(folder, rows)
    whole = Encoder(data, FAMILIES["llava"](), DataConfig(train="-")).encode([0])
    cut = Encoder(data, FAMILIES["llava"](), DataConfig(train="-", max_length=60)).encode([0])
    assert cut.targets.input_ids.shape[1] == 60
    assert (cut.targets.input_ids == whole.targets.input_ids[:, :60]).all()
    assert cut.inputs["input_ids"].shape == cut.inputs["attention_mask"].shape == (1, 60)
    with pytest.raises(DataError, match="images have more tokens than max_length 10"):
        Encoder(data, FAMILIES["llava"](), DataConfig(train="-", max_length=10)).encode([0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pairs", [False, True])
def test_a_filler_adds_a_picture_and_changes_no_record(folder, family, pairs):
    turns = conversations([("human", "How many cats ?"), ("gpt", "two cats and a dog")])
    if pairs:
        other = [*turns[:1], {"from": "gpt", "value": "a cat"}]
        rows = [{"id": "words", "chosen": turns, "rejected": other}]
    else:
        rows = [{"id": "words", "conversations": turns}]
    data, config = records(folder, rows), DataConfig(train="-")
    plain = Encoder(data, FAMILIES[family](), config, pairs=pairs).encode([0])
    filled = Encoder(data, FAMILIES[family](), config, pairs=pairs, filler=True).encode([0])
    assert "pixel_values" not in plain.inputs
    assert "pixel_values" in filled.inputs
    count = len(plain.targets.input_ids)
    assert filled.inputs["input_ids"].shape[0] == count + 1
    assert (filled.inputs["input_ids"][-1] == Processing(FAMILIES[family]()).image_token_id).any()
    length = plain.targets.input_ids.shape[1]
    for name in ("input_ids", "attention", "response", "vision"):
        assert (getattr(filled.targets, name)[:, :length] == getattr(plain.targets, name)).all()
        assert len(getattr(filled.targets, name)) == count
    assert not filled.targets.attention[:, length:].any()
    assert (filled.ids, filled.grids) == (plain.ids, plain.grids)


def test_a_filler_is_for_batches_without_pictures(folder):
    rows = [
        {"id": "seen", "image": "red.png", "conversations": conversations(TURNS)},
        {"id": "words", "conversations": conversations([("human", "?"), ("gpt", "cats")])},
    ]
    data = records(folder, rows)
    whole = Encoder(data, FAMILIES["llava"](), DataConfig(train="-"), filler=True).encode([0, 1])
    assert whole.inputs["input_ids"].shape == whole.targets.input_ids.shape
    short = Encoder(data, FAMILIES["llava"](), DataConfig(train="-", max_length=10), filler=True)
    with pytest.raises(DataError, match="a blank image has more tokens than max_length 10"):
        short.encode([1])


def test_cut_pictures_are_refused_whatever_lmms_eval_has_set(folder, monkeypatch):
    noise = torch.randint(256, (64, 64, 3), dtype=torch.uint8).numpy()
    Image.fromarray(noise).save(folder / "cut.png")
    content = (folder / "cut.png").read_bytes()
    (folder / "cut.png").write_bytes(content[: len(content) // 2])
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(DataError, match=r"cut\.png is not a readable image"):
        load_image("cut.png", folder)
    assert ImageFile.LOAD_TRUNCATED_IMAGES
