"""The scene benchmark: determinism, splits, and questions whose answers follow from the picture."""

import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest

from mmkd.data.scenes import questions
from mmkd.data.scenes.build import POPE_CATEGORIES, build_scenes
from mmkd.data.scenes.questions import Statistics
from mmkd.data.scenes.render import png_bytes, render
from mmkd.data.scenes.scene import CANVAS, SPLITS, Scene, SceneObject, sample_scene, scene_rng
from mmkd.data.scenes.show import contact_sheet
from mmkd.data.scenes.vocabulary import (
    BACKGROUNDS,
    BY_NAME,
    CLASSES,
    COLOURS,
    GROUPS,
    held_out_colour,
)
from mmkd.errors import DataError, MmkdError
from mmkd.runtime.files import sha256


def obj(name, box, colour="red"):
    return SceneObject(name, colour, BY_NAME[name].assets[0], box)


CAT_AND_DOG = Scene((obj("cat", (2, 4, 24, 26)), obj("dog", (36, 34, 60, 58), "blue")), 0)


def scenes(split, count, **kwargs):
    return [
        sample_scene(scene_rng(5, SPLITS[split], i), SPLITS[split], **kwargs) for i in range(count)
    ]


def read(path):
    return pq.read_table(path).to_pylist()


def test_one_seed_gives_the_same_bytes_and_another_seed_others(tmp_path, scenes_dir):
    again = build_scenes(tmp_path / "again", seed=0, train=64, validation=16, evaluation=6)
    first = json.loads((scenes_dir / "dataset.json").read_text())
    assert again["files"] == first["files"]
    for name in again["files"]:
        assert sha256(tmp_path / "again" / name) == sha256(scenes_dir / name)
    other = build_scenes(tmp_path / "other", seed=1, train=64, validation=16, evaluation=6)
    assert other["files"]["train.parquet"] != first["files"]["train.parquet"]


def test_building_twice_keeps_the_folder_and_refuses_other_settings(tmp_path):
    settings = {"train": 4, "validation": 2, "evaluation": 1}
    build_scenes(tmp_path / "d", **settings)
    written = (tmp_path / "d" / "train.parquet").stat().st_mtime_ns
    build_scenes(tmp_path / "d", **settings)
    assert (tmp_path / "d" / "train.parquet").stat().st_mtime_ns == written
    with pytest.raises(DataError, match="other settings"):
        build_scenes(tmp_path / "d", **{**settings, "train": 5})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(DataError, match="not empty"):
        build_scenes(tmp_path / "full", **settings)
    assert not list(tmp_path.glob("*.partial"))


def test_licences_and_hashes_of_every_asset_are_recorded(scenes_dir):
    record = json.loads((scenes_dir / "dataset.json").read_text())
    assert "CC BY-SA 4.0" in record["licences"]["pictures"]
    shown = {a for c in CLASSES for a in (*c.assets, *c.held_out)}
    assert shown <= set(record["assets"])
    assert all(len(h) == 64 for h in record["assets"].values())


def test_no_picture_of_one_split_is_in_another(scenes_dir):
    files = ["train", "validation", "eval/pope", "eval/vqa", "eval/caption", "eval/vqa_assets",
             "eval/vqa_attributes"]  # fmt: skip
    seen = {f: {r["image"]["bytes"] for r in read(scenes_dir / f"{f}.parquet")} for f in files}
    for i, a in enumerate(files):
        for b in files[i + 1 :]:
            assert not seen[a] & seen[b], (a, b)


def test_training_never_shows_held_out_colours_or_assets():
    for scene in scenes("train", 400):
        for o in scene.objects:
            assert o.colour != held_out_colour(o.name)
            assert o.asset in BY_NAME[o.name].assets
    for scene in scenes("test_attributes", 60):
        assert all(o.colour == held_out_colour(o.name) for o in scene.objects)
    for scene in scenes("test_assets", 60):
        assert all(o.asset in BY_NAME[o.name].held_out for o in scene.objects)


def test_objects_lie_apart_inside_of_the_canvas():
    for scene in scenes("train", 300):
        boxes = [o.box for o in scene.objects] + list(scene.digit_boxes)
        for left, top, right, bottom in boxes:
            assert 0 <= left < right <= CANVAS
            assert 0 <= top < bottom <= CANVAS
        pixels = np.zeros((CANVAS, CANVAS), int)
        for left, top, right, bottom in boxes:
            pixels[top:bottom, left:right] += 1
        assert pixels.max() <= 1


def test_the_card_and_the_background_have_their_colours():
    picture = np.asarray(render(CAT_AND_DOG))
    assert tuple(picture[5, 12]) == COLOURS["red"] or tuple(picture[4, 12]) == COLOURS["red"]
    assert tuple(picture[62, 2]) == BACKGROUNDS[0]
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20
    assert png_bytes(render(CAT_AND_DOG)) == png_bytes(render(CAT_AND_DOG))


def test_companions_make_adversarial_negatives_likelier_than_random_ones():
    train = scenes("train", 1500)
    statistics = Statistics.count(train)
    together = {"random": 0.0, "adversarial": 0.0}
    index = {c.name: i for i, c in enumerate(CLASSES)}
    for i, scene in enumerate(scenes("test", 100, distinct=3)):
        for kind in together:
            rng = np.random.default_rng(i)
            for name in questions.negatives(rng, scene, statistics, kind, 3):
                assert name not in scene.names
                present = [index[n] for n in scene.names]
                together[kind] += statistics.cooccurrence[present, index[name]].sum()
    assert together["adversarial"] > 3 * together["random"]


def test_popular_negatives_are_the_most_frequent_absent_classes():
    frequency = np.arange(len(CLASSES), dtype=float)
    statistics = Statistics(frequency, np.zeros((len(CLASSES), len(CLASSES))))
    rng = np.random.default_rng(0)
    got = questions.negatives(rng, CAT_AND_DOG, statistics, "popular", 2)
    assert got == [CLASSES[-1].name, CLASSES[-2].name]


def test_adversarial_negatives_follow_cooccurrence():
    together = np.zeros((len(CLASSES), len(CLASSES)))
    index = {c.name: i for i, c in enumerate(CLASSES)}
    together[index["cat"], index["bell"]] = 5
    together[index["dog"], index["rose"]] = 4
    statistics = Statistics(np.ones(len(CLASSES)), together)
    got = questions.negatives(np.random.default_rng(0), CAT_AND_DOG, statistics, "adversarial", 2)
    assert got == ["bell", "rose"]


def test_captions_name_everything_from_left_to_right():
    assert questions.caption(CAT_AND_DOG) == "A cat on a red card and a dog on a blue card."
    digits = Scene(
        (obj("egg", (0, 30, 24, 54), "orange"),), 0, "42", ((0, 0, 15, 15), (15, 0, 30, 15))
    )
    assert questions.caption(digits) == "The number 42 and an egg on an orange card."


def answers(kind, scene, count=60):
    found = {}
    for i in range(count):
        question = questions.ASKERS[kind](np.random.default_rng(i), scene, STATISTICS)
        if question is not None:
            found[question.text] = question.answer
    return found


STATISTICS = Statistics(np.ones(len(CLASSES)), np.ones((len(CLASSES), len(CLASSES))))


def test_answers_follow_from_the_scene():
    relation = answers("relation", CAT_AND_DOG)
    assert relation["Is the cat left of the dog?"] == "yes"
    assert relation["Is the cat right of the dog?"] == "no"
    assert relation["Is the dog below the cat?"] == "yes"
    assert relation["Is the dog above the cat?"] == "no"
    count = answers("count", CAT_AND_DOG, 200)
    assert count["How many objects are there?"] == "2"
    assert count["Count the animals."] == "2"
    assert count["How many cats are there?"] == "1"
    assert answers("colour", CAT_AND_DOG)["Which colour is behind the dog?"] == "blue"
    assert answers("name", CAT_AND_DOG)["What is on the red card?"] == "cat"
    assert set(answers("category", CAT_AND_DOG).values()) == {"animal"}
    existence = answers("existence", CAT_AND_DOG)
    assert existence["Do you see a cat?"] == "yes"
    assert all(a == "no" for q, a in existence.items() if "cat" not in q and "dog" not in q)
    for text, letter in answers("choice", CAT_AND_DOG).items():
        options = dict(re.findall(r"([A-D])\. (\w+)", text))
        assert len(options) == 4
        assert [k for k, name in options.items() if name in ("cat", "dog")] == [letter]


def test_every_kind_has_several_wordings():
    for kind in ("existence", "relation", "colour", "name", "category"):
        assert len(answers(kind, CAT_AND_DOG, 200)) >= 3


def test_pope_has_three_yes_and_three_no_questions_per_picture_and_kind(scenes_dir):
    rows = read(scenes_dir / "eval" / "pope.parquet")
    assert len(rows) == 6 * len(POPE_CATEGORIES) * 6
    for start in range(0, len(rows), 6):
        block = rows[start : start + 6]
        assert len({r["category"] for r in block}) == 1
        assert [r["answer"] for r in block] == ["yes"] * 3 + ["no"] * 3


def test_preference_pairs_differ_in_one_object_that_is_not_there(scenes_dir):
    rows = read(scenes_dir / "preferences.parquet")
    objects = {r["id"]: {o["name"] for o in r["objects"]}
               for r in read(scenes_dir / "train.parquet")}  # fmt: skip
    questions = 0
    for row in rows:
        chosen, rejected = row["chosen"][1]["value"], row["rejected"][1]["value"]
        assert row["chosen"][0] == row["rejected"][0]
        assert chosen != rejected
        if chosen in ("yes", "no"):
            questions += 1
            asked = row["chosen"][0]["value"].replace("?", "").split()
            named = next(w for w in asked if w in BY_NAME)
            there = named in objects[row["id"].replace("preference", "train")]
            assert (chosen, rejected) == (("yes", "no") if there else ("no", "yes"))
            continue
        a, b = (t.replace(",", "").replace(".", "").lower().split() for t in (chosen, rejected))
        changed = [(x, y) for x, y in zip(a, b, strict=True) if x != y and x not in ("a", "an")]
        assert len(changed) == 1
        assert changed[0][1] in BY_NAME
    assert questions == len(rows) / 2


def test_vocabulary_is_what_the_documentation_says():
    assert len(CLASSES) == 48
    assert len(GROUPS) == 8
    assert all(sum(c.group == g for c in CLASSES) == 6 for g in GROUPS)


def test_words_are_single_tokens_and_text_survives(scenes_dir):
    from transformers import AutoProcessor

    tokenizer = AutoProcessor.from_pretrained(scenes_dir / "processor").tokenizer
    for word in [c.name for c in CLASSES] + list(COLOURS) + ["yes", "no"]:
        assert len(tokenizer.tokenize(word)) == 1, word
        assert tokenizer.tokenize(word) == tokenizer.tokenize(f"a {word}")[1:]
    for text in ("A cat on a red card.", "The number 472, yes.", "Zebra's élan 👀"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_contact_sheet_shows_pictures_or_says_what_is_missing(scenes_dir, tmp_path):
    sheet = contact_sheet(scenes_dir, 6)
    assert sheet.width > 3 * CANVAS
    assert len(np.unique(np.asarray(sheet).reshape(-1, 3), axis=0)) > 100
    with pytest.raises(MmkdError, match=r"no train\.parquet"):
        contact_sheet(tmp_path)
