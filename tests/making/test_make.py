"""Records that a model makes: the file is a function of settings and images."""

import gc
import json
import shutil
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
import torch

from mmkd.data.answers import generate_of, sample_answers
from mmkd.data.encoder import Encoder
from mmkd.data.records import GivenRecords, Records
from mmkd.data.schema import Record
from mmkd.making.make import make_answers
from mmkd.making.questions import Question
from mmkd.making.state import is_made
from mmkd.modeling.loading import load_model, load_processor
from mmkd.recipe import DataConfig, ModelConfig, SamplingConfig, load_recipe
from tests.making.conftest import PROMPTS
from tests.support import warm

CPU = torch.device("cpu")


def make(path, *overrides):
    return make_answers(load_recipe(path, list(overrides)), "photos", CPU)


def test_each_image_is_asked_each_prompt(recipe, rows, photos, tiny_model_dir):
    made = make(recipe(keep="all"))
    assert (made.questions, made.answers, made.asked.answers) == (12, 36, 36)
    assert made.records == len(rows()) == 36 - made.refused["empty"]
    names = [f"{n}.png" for n in range(4)] + ["more/4.PNG", "more/5.PNG"]
    assert {(r["images"][0], r["messages"][0]["content"][1]["text"]) for r in rows()} == {
        (name, prompt) for name in names for prompt in PROMPTS
    }
    row = rows()[0]
    assert row["id"] == "0.png-0-0"
    assert row["messages"][1]["role"] == "assistant"
    assert {k: row["made"][k] for k in ("by", "seed", "candidate")} == {
        "by": "teacher", "seed": 0, "candidate": 0,
    }  # fmt: skip
    assert row["made"]["sampling"]["n"] == 3
    assert row["made"]["pass_rate"] <= 1
    # they train like any other records
    config = load_recipe(recipe(keep="all")).data
    assert (config.train, config.images) == (make(recipe(keep="all")).out.as_posix(), str(photos))
    processor = load_processor(ModelConfig(model=str(tiny_model_dir)))
    batch = Encoder(Records(config), processor, config).encode([0, 1])
    assert batch.targets.response.any()


def test_batch_size_and_processes_change_nothing(recipe, rows, tmp_path):
    path = recipe(keep="all")
    make(path)
    whole = (tmp_path / "made.jsonl").read_bytes()
    for size in (1, 64):
        out = tmp_path / f"size{size}.jsonl"
        make(path, f"make.photos.out={out}", f"make.photos.batch_size={size}")
        assert out.read_bytes() == whole
    out = tmp_path / "two.jsonl"
    words = ("data", "answers", path, f"make.photos.out={out}", "--nproc", "2")
    command = warm.Command(*words, "--only", "photos")
    text, _ = command.communicate(timeout=120)
    assert command.returncode == 0, text
    assert "wrote" in text
    assert "12 questions" in text
    assert out.read_bytes() == whole
    assert len(list((tmp_path / "two.jsonl.answers").glob("answers-*.jsonl"))) == 2


def test_greedy_answers_are_those_of_the_model(recipe, rows, tiny_model_dir, photos):
    make(recipe(sampling={"max_new_tokens": 6}, checks=[]))
    source = ModelConfig(model=str(tiny_model_dir))
    model, processor = load_model(source), load_processor(source)
    content = [[{"type": "image"}, {"type": "text", "text": prompt}] for prompt in PROMPTS]
    names = [f"{n}.png" for n in range(4)] + ["more/4.PNG", "more/5.PNG"]
    prompts = [
        Record(name, [{"role": "user", "content": c}], [name], root=photos)
        for name in names
        for c in content
    ]
    encoder = Encoder(GivenRecords("photos"), processor, DataConfig(train="photos"))
    found = sample_answers(
        generate_of(model), encoder, prompts, SamplingConfig(max_new_tokens=6, temperature=0),
        seed=0, device=CPU, ends=model.generation_config.eos_token_id,
    )  # fmt: skip
    found = [a for a in found if a.text]
    assert [r["messages"][1]["content"][0]["text"] for r in rows()] == [a.text for a in found]
    assert [r.get("unfinished", False) for r in rows()] == [not a.finished for a in found]


def test_what_is_known_is_not_asked_again(recipe, photos, rows, tmp_path):
    path = recipe(keep="all")
    first = make(path)
    again = make(path)
    assert (again.asked.answers, again.asked.known) == (0, 36)
    assert replace(again, asked=first.asked) == first
    # another image, another check, more candidates: only what is missing
    before = {r["id"]: r for r in rows()}
    added = photos.parent / "added"
    added.mkdir(exist_ok=True)
    for file in photos.glob("*.png"):
        (added / file.name).write_bytes(file.read_bytes())
    (added / "9.png").write_bytes((photos / "more" / "5.PNG").read_bytes() + b"\0")
    moved = make(path, f"make.photos.pictures={added}", "make.photos.checks=[]")
    assert moved.asked.answers == len(PROMPTS) * 3
    same = [r for r in rows() if r["id"] in before and r["id"][0] in "0123"]
    assert len(same) >= 8
    assert all({**r, "made": None} == {**before[r["id"]], "made": None} for r in same)
    assert make(path, "make.photos.sampling.n=4").asked.answers == 12
    more = make(path, "make.photos.sampling.n=4").asked
    assert (more.answers, more.known) == (0, 48)
    assert make(path, "make.photos.seed=1").asked.answers == 36
    (tmp_path / "made.jsonl.answers" / "answers-00000.jsonl").unlink()
    assert make(path).asked.answers == 36


def test_only_the_maker_reads_the_context(recipe, rows, scenes_dir, tmp_path, monkeypatch):
    shots = tmp_path / "shots.jsonl"
    shots.write_text(
        json.dumps(
            {"messages": [{"role": "user", "content": "Be brief?"},
                          {"role": "assistant", "content": "Yes."}]}
        )
    )  # fmt: skip
    from mmkd.making import local

    seen = []
    answer = local.LocalMaker.answer

    def noting(self, requests, sampling, keep):
        seen.extend(requests)
        answer(self, requests, sampling, keep)

    monkeypatch.setattr(local.LocalMaker, "answer", noting)
    make(recipe(context={"system": "Be exact.", "shots": str(shots)}, checks=[]))
    texts = [[p.get("text") for p in m["content"]] for m in seen[0].messages]
    assert texts == [["Be exact."], ["Be brief?"], ["Yes."], [None, PROMPTS[0]]]
    assert [m["role"] for m in rows()[0]["messages"]] == ["user", "assistant"]
    plain = {r.key for r in seen}
    make(recipe(checks=[]))
    assert not plain & {r.key for r in seen[len(plain) :]}  # context is part of the key


def test_records_with_images_become_parquet(recipe, scenes_dir, tmp_path):
    settings = {
        "pictures": None, "records": str(scenes_dir / "captions.parquet"), "limit": 5,
        "prompts": None, "out": str(tmp_path / "made.parquet"), "keep": "pair",
        "checks": [{"kind": "reference", "match": "text"}, "objects"],
        "by": "teacher", "top": {"teacher": {"model": "assets/scenes_teacher"}},
        "sampling": {"n": 4, "temperature": 1.5, "max_new_tokens": 32},
    }  # fmt: skip
    path = recipe(**settings)
    made = make(path)
    found = pq.read_table(made.out).to_pylist()
    assert len(found) == made.records > 0
    records = Records(DataConfig(train=str(scenes_dir / "captions.parquet")))
    truth = {records[i].id: records[i].messages[1]["content"][0]["text"] for i in range(5)}
    for row in found:
        assert row["made"]["score"] == [1.0]
        assert row["made"]["rejected"]["score"] == [0.0]
        said = row["chosen"][0]["content"][0]["text"]
        assert (
            said.rstrip(".").lower() == truth[row["id"].removesuffix("-pair")].rstrip(".").lower()
        )
        assert row["rejected"][0]["content"][0]["text"] != said
    config = DataConfig(train=str(made.out))
    processor = load_processor(ModelConfig(model="assets/scenes_teacher"))
    batch = Encoder(Records(config), processor, config, pairs=True).encode([0])
    assert batch.targets.rejected.tolist() == [False, True]


def test_questions_about_an_image_become_turns(recipe, rows, tmp_path, tiny_model_dir):
    settings = {"checks": ["cut"], "sampling": {"max_new_tokens": 30}}
    made = make(recipe(**settings))
    single = {r["id"]: r for r in rows()}
    out = tmp_path / "joined.jsonl"
    joined = make(recipe(**settings, join=True, out=str(out)))
    assert (made.records, joined.records) == (len(single), len(rows("joined.jsonl")))
    assert joined.unanswered == made.unanswered
    assert joined.records < made.records
    turns = {}
    for row in rows("joined.jsonl"):
        ids = [turn["id"] for turn in row["made"]["turns"]]
        images = [p for m in row["messages"] for p in m["content"] if p["type"] == "image"]
        assert len(images) == 1
        assert row["messages"][0]["content"][0] == {"type": "image"}
        for number, name in enumerate(ids):
            asked, said = row["messages"][2 * number : 2 * number + 2]
            assert asked["content"][-1] == single[name]["messages"][0]["content"][-1]
            assert said == single[name]["messages"][1]
            turns[name] = row["id"]
    assert turns == {name: r["images"][0] for name, r in single.items()}
    first = [row["made"]["turns"][0]["id"][-1] for row in rows("joined.jsonl")]
    assert set(first) == {"0", "1"}  # the order is random
    config = DataConfig(train=str(out), images=load_recipe(recipe()).data.images)
    processor = load_processor(ModelConfig(model=str(tiny_model_dir)))
    assert Encoder(Records(config), processor, config).encode([0]).targets.response.any()


def test_rationales_are_records_of_their_own(recipe, rows, tmp_path, tiny_model_dir, photos):
    """Asked after the kept answer, of the same model, and checked by the form checks."""
    settings = {"sampling": {"max_new_tokens": 20}, "checks": ["cut"]}
    why = {"prompt": "How does the image show it?", "question": "Explain.", "max_new_tokens": 20}
    made = make(recipe(**settings))
    plain = (tmp_path / "made.jsonl").read_bytes()
    path = recipe(**settings, why={**why, "out": str(tmp_path / "why.jsonl")})
    again = make(path)
    assert (tmp_path / "made.jsonl").read_bytes() == plain  # the answers stay as they are
    assert again.asked.answers == made.records
    kept = {r["id"]: r for r in rows()}
    reasons = rows("why.jsonl")
    assert 0 < len(reasons) <= made.records
    source = ModelConfig(model=str(tiny_model_dir))
    model, processor = load_model(source), load_processor(source)
    encoder = Encoder(GivenRecords("photos"), processor, DataConfig(train="photos"))
    for row in reasons:
        answer = kept[row["id"].removesuffix("-why")]
        asked, said = row["messages"]
        assert asked["content"] == [*answer["messages"][0]["content"],
                                    {"type": "text", "text": "\nExplain."}]  # fmt: skip
        assert row["images"] == answer["images"]
        follow = [{"role": "user", "content": [{"type": "text", "text": why["prompt"]}]}]
        prompt = Record("a", [*answer["messages"], *follow], row["images"], root=photos)
        (expected,) = sample_answers(
            generate_of(model), encoder, [prompt], SamplingConfig(max_new_tokens=20, temperature=0),
            seed=0, device=CPU, ends=model.generation_config.eos_token_id,
        )  # fmt: skip
        assert expected.finished
        assert said["content"][0]["text"] == expected.text
    config = load_recipe(path, ["data.train=made:photos-why"]).data
    assert (config.train, config.images) == (str(tmp_path / "why.jsonl"), str(photos))
    assert make(path).asked.answers == 0
    (tmp_path / "why.jsonl").unlink()
    assert not is_made(load_recipe(path), "photos")


def test_rationales_that_were_cut_have_no_end(recipe, rows, tmp_path):
    why = {"max_new_tokens": 2, "out": str(tmp_path / "why.jsonl")}
    make(recipe(sampling={"max_new_tokens": 6}, checks=["empty"], why=why))
    reasons = rows("why.jsonl")
    assert reasons
    assert all(row["unfinished"] for row in reasons)


def test_requests_do_not_hold_images(recipe, scenes_dir, tmp_path, monkeypatch):
    """The images of all requests may not fit into memory."""
    from mmkd.making import local

    answer, held = local.LocalMaker.answer, []

    def noting(self, requests, sampling, keep):
        held.append(sum(type(o) is Question and bool(o.references) for o in gc.get_objects()))
        answer(self, requests, sampling, keep)

    monkeypatch.setattr(local.LocalMaker, "answer", noting)
    made = make(
        recipe(pictures=None, prompts=None, records=str(scenes_dir / "captions.parquet"), limit=6,
               checks=[], sampling={"max_new_tokens": 2}, out=str(tmp_path / "made.parquet"))
    )  # fmt: skip
    assert made.answers == 6
    assert max(held) <= 1


def test_models_take_turns(recipe, rows, photos, tmp_path):
    names = ["teacher", "student"]
    path = recipe(
        keep="all", by=names, checks=[], top={"teacher": {"model": "assets/scenes_teacher"}},
    )  # fmt: skip
    made = make(path)
    by = {(r["id"].rpartition("-")[0], r["made"]["candidate"]): r["made"]["by"] for r in rows()}
    known = [(by[question, 0], number, name) for (question, number), name in by.items()
             if (question, 0) in by]  # fmt: skip
    assert all(name == names[(names.index(first) + n) % 2] for first, n, name in known)
    assert {by[question, 0] for question, number in by if number == 0} == {*names}
    # an image before all others changes no model of theirs
    folder = tmp_path / "more"
    shutil.copytree(photos, folder)
    (folder / "00.png").write_bytes((photos / "more" / "5.PNG").read_bytes() + b"\0")
    more = make(path, f"make.photos.pictures={folder}")
    assert more.asked.answers == 3 * len(PROMPTS)
    assert more.answers == made.answers + more.asked.answers


def test_answers_cannot_bring_images_of_their_own(recipe, rows, monkeypatch):
    from mmkd.making import local

    answer = local.LocalMaker._sample

    def hostile(self, records, *more):
        found = answer(self, records, *more)
        return [replace(a, text="A <image> dog <ima<image>ge>") for a in found]

    monkeypatch.setattr(local.LocalMaker, "_sample", hostile)
    make(recipe())
    assert {r["messages"][1]["content"][0]["text"] for r in rows()} == {"A  dog"}


def test_listed_objects_cannot_bring_images_either(recipe, rows, monkeypatch):
    from mmkd.making import local

    answer = local.LocalMaker._sample

    def hostile(self, records, *more):
        return [replace(a, text="<image> dog, key") for a in answer(self, records, *more)]

    monkeypatch.setattr(local.LocalMaker, "_sample", hostile)
    make(recipe(prompts=None, objects={"ask": ["Where is {a_name}?"]}, checks=[]))
    asked = {r["messages"][0]["content"][1]["text"] for r in rows()}
    assert asked == {"Where is a dog?", "Where is a key?"}


@pytest.mark.parametrize("keep", ["best", "pair"])
def test_best_answers_agree_most(recipe, rows, keep):
    made = make(
        recipe(
            keep=keep, checks=["empty", {"kind": "agrees", "least": 0}],
            top={"teacher": {"model": "assets/scenes_teacher"}},
            sampling={"n": 5, "temperature": 1.5, "max_new_tokens": 24},
        )
    )  # fmt: skip
    assert made.records > 0
    for row in rows():
        score = row["made"]["score"][0]
        assert 0 <= score <= 1
        if keep == "pair":
            assert row["made"]["rejected"]["score"][0] < score
