"""Data that models make: entries of `make`, and what they read."""

import json
import sys
from pathlib import Path
from typing import Any

from tests.support.bad_inputs.table import TURNS, World, case, record, write

KIND = "make"
ANSWERS = ["data", "answers", "recipe.yaml"]


def make(world: World, **changes: Any) -> list[str]:
    """Give the recipe an entry of `make`, and its command."""
    Path("photos").mkdir()
    write(Path("picture.png").read_bytes(), "photos/a.png")
    entry = {"pictures": "photos", "prompts": ["What?"], "out": "made.jsonl", **changes}
    world.raw.setdefault("teacher", {"model": "model"})
    world.raw["make"] = {"photos": {k: v for k, v in entry.items() if v is not None}}
    return ANSWERS


@case(KIND, "`mmkd data answers` of a recipe without `make`", "make: the recipe makes no data", "a")
def nothing_to_make(world: World) -> list[str]:
    return ANSWERS


@case(
    KIND,
    "trained on an entry of `make` that is not there",
    "'made:photo' is no entry of 'make'",
    "known: photos",
)
def made_by_another_name(world: World) -> None:
    make(world)
    world.raw["data"] = {"train": "made:photo"}


@case(KIND, "named a folder without images", "no: no such folder", "check 'pictures'")
def no_folder_of_images(world: World) -> list[str]:
    return make(world, pictures="no")


@case(
    KIND,
    "wrote an image's placeholder into a prompt",
    "make.photos.prompts: a text has the placeholder <image>",
    "leave it out",
)
def placeholder_in_a_prompt(world: World) -> list[str]:
    return make(world, prompts=["<image> What is it?"])


@case(KIND, "asked a model that the recipe has not", "asks 'techer'", "did you mean 'teacher'?")
def asks_another_model(world: World) -> list[str]:
    return make(world, by="techer")


@case(
    KIND,
    "wanted several greedy answers",
    "4 answers at temperature 0 are all the same",
    "raise the temperature",
)
def several_greedy_answers(world: World) -> list[str]:
    return make(world, sampling={"n": 4})


@case(KIND, "misspelt a check", "unknown kind 'repeat'", "did you mean 'repeats'?")
def unknown_check(world: World) -> list[str]:
    return make(world, checks=["repeat"])


@case(
    KIND,
    "wanted pairs without a score",
    "a pair needs a check that scores answers",
    "add one of agrees, judge",
)
def pairs_without_scores(world: World) -> list[str]:
    return make(world, keep="pair", sampling={"n": 2, "temperature": 1})


@case(
    KIND,
    "had a model judge its own answers",
    "make.photos: 'teacher' would judge its own answers",
    "name another model",
)
def own_judge(world: World) -> list[str]:
    return make(world, checks=[{"kind": "judge", "by": "teacher"}])


@case(
    KIND,
    "had a model compare answers with its own ones, of another entry",
    "make.hard: 'teacher' would judge its own answers, of make.photos",
    "name another model",
)
def own_judge_of_another_entry(world: World) -> list[str]:
    command = make(world)
    check = {"kind": "judge", "by": "teacher", "margin": 1}
    world.raw["make"]["hard"] = {
        "records": "made.jsonl", "by": "student", "checks": [check], "out": "hard.jsonl",
    }  # fmt: skip
    return command


@case(
    KIND,
    "wanted an adjudicator for one reviewer",
    "make.photos.checks.0: one reviewer has no spread",
    "name two in 'by'",
)
def adjudicator_of_one(world: World) -> list[str]:
    judge = {"kind": "judge", "by": "a", "spread": 2, "adjudicator": "b"}
    return make(world, checks=[judge])


@case(
    KIND,
    "set a spread without a model that decides",
    "'spread' and 'adjudicator' go together",
    "give both or neither",
)
def spread_without_adjudicator(world: World) -> list[str]:
    return make(world, checks=[{"kind": "judge", "by": ["a", "b"], "spread": 2}])


@case(
    KIND,
    "had a reviewer decide where the reviewers disagree",
    "the adjudicator 'b' is a reviewer",
    "name another model",
)
def reviewer_as_adjudicator(world: World) -> list[str]:
    judge = {"kind": "judge", "by": ["a", "b"], "spread": 2, "adjudicator": "b"}
    return make(world, checks=[judge])


@case(KIND, "named a reviewer twice", "'by' names a reviewer twice", "name it once")
def reviewer_twice(world: World) -> list[str]:
    return make(world, checks=[{"kind": "judge", "by": ["a", "a"]}])


@case(
    KIND,
    "wanted a rating and a difference of ratings",
    "an answer needs a rating or a difference",
    "give either 'least' or 'margin'",
)
def rating_and_difference(world: World) -> list[str]:
    return make(world, checks=[{"kind": "judge", "by": "a", "least": 7, "margin": 1}])


@case(
    KIND,
    "had one model judge twice, under two names",
    "'teacher' and 'student' are the same model, which would judge twice",
    "name another model",
)
def judge_under_two_names(world: World) -> list[str]:
    world.raw["servers"] = {"big": {"server": "http://localhost:8000/v1", "model": "m"}}
    return make(world, by="big", checks=[{"kind": "judge", "by": ["teacher", "student"]}])


@case(
    KIND,
    "compared with answers of records that have none",
    "records.json: the records have no answers to compare with",
    "change the check 'reference'",
)
def no_answers_to_compare_with(world: World) -> list[str]:
    bare = record(conversations=TURNS[:1])
    write(json.dumps([bare]), "records.json")
    return make(world, pictures=None, prompts=None, records="records.json", checks=["reference"])


@case(
    KIND,
    "checked objects of records without any",
    "records.json: the records say nothing of objects",
    "add 'objects'",
)
def objects_of_none(world: World) -> list[str]:
    return make(world, pictures=None, prompts=None, records="records.json", checks=["objects"])


@case(
    KIND,
    "compared answers to prompts with the record's own answer",
    "which is none to 'prompts'",
    "make them in another entry",
)
def reference_of_prompts(world: World) -> list[str]:
    return make(world, pictures=None, records="records.json", checks=["reference"])


@case(
    KIND,
    "made a file in another folder than the records, whose images are named by paths",
    "make.photos.images: image paths are relative to",
    "set it to",
)
def paths_of_another_folder(world: World) -> list[str]:
    return make(world, pictures=None, records="records.json", out="made/made.jsonl")


@case(KIND, "named a file that is there", "made.jsonl: it is there already", "name a new file")
def made_file_is_there(world: World) -> list[str]:
    write("mine", "made.jsonl")
    return make(world)


@case(
    KIND,
    "wrote a question about objects with an unknown placeholder",
    "has the placeholder {it}",
    "known: {name}",
)
def unknown_placeholder(world: World) -> list[str]:
    return make(world, objects={"ask": ["What colour is {it}?"]})


@case(
    KIND,
    "wrote braces into a prompt",
    "has a placeholder with ':' or '!'",
    "write the braces twice",
)
def braces_in_a_prompt(world: World) -> list[str]:
    return make(world, prompts=['Answer as {"objects": []}.'])


@case(
    KIND,
    "wrote an unknown placeholder into a prompt",
    "has the placeholder {it} -- known: {question} {answer}",
    "write other braces twice",
)
def placeholder_of_a_prompt(world: World) -> list[str]:
    return make(world, pictures=None, records="records.json", prompts=["Where is {it}?"])


@case(KIND, "left a brace open in a prompt", "'What is {it?' has a single brace", "write it twice")
def open_brace_in_a_prompt(world: World) -> list[str]:
    return make(world, prompts=["What is {it?"])


@case(
    KIND,
    "asked about a record's question, of a folder of images",
    "images of a folder have no {question} {answer}",
    "give 'records', or leave it out of 'prompts'",
)
def question_of_a_folder(world: World) -> list[str]:
    return make(world, prompts=["Write a question like this one: {question}"])


@case(
    KIND,
    "put the answer into a prompt about records that have none",
    "records.json: record 0 (id r1): the record has no answer, which a prompt contains",
    "change the prompt, or drop the record",
)
def prompt_with_no_answer(world: World) -> list[str]:
    write(json.dumps([record(conversations=TURNS[:1])]), "records.json")
    prompts = ["Why is it {answer}?"]
    return make(world, pictures=None, records="records.json", prompts=prompts)


@case(
    KIND,
    "wanted rationales of questions",
    "'why' is for answers, and this entry writes questions",
    "leave it out",
)
def rationales_of_questions(world: World) -> list[str]:
    return make(world, writes="questions", checks=["cut"], why={"out": "why.jsonl"})


@case(
    KIND,
    "had questions written that may be cut off",
    "a question that was cut off cannot be answered",
    "add the check 'cut'",
)
def questions_cut_off(world: World) -> list[str]:
    return make(world, writes="questions")


@case(
    KIND,
    "wanted questions from answers to the records' own ones",
    "what answers the records' own questions is no question",
    "add 'prompts' that ask for one",
)
def questions_without_prompts(world: World) -> list[str]:
    own = {"pictures": None, "prompts": None, "records": "records.json"}
    return make(world, writes="questions", checks=["cut"], **own)


@case(
    KIND,
    "trained on questions without answers",
    "stage mimic: it reads made:photos, which has questions without answers",
    "add an entry of 'make' with 'records: made:photos'",
)
def trained_on_questions(world: World) -> None:
    make(world, writes="questions", checks=["cut"])
    world.raw["data"] = {"train": "made:photos"}


@case(
    KIND,
    "wanted pairs of distinct texts",
    "'distinct' compares single texts, and a pair has two",
    "leave it out",
)
def distinct_pairs(world: World) -> list[str]:
    return make(world, distinct=0.7, keep="pair", checks=["agrees"])


@case(
    KIND,
    "wanted distinct texts without RapidFuzz",
    "make.photos.distinct: texts are compared by the package RapidFuzz",
    "pip install 'mmkd[data]'",
)
def no_rapidfuzz(world: World) -> list[str]:
    world.patch.setitem(sys.modules, "rapidfuzz", None)
    return make(world, distinct=0.7)


@case(KIND, "named a server without its protocol", "it is no address", "http://host:8000/v1")
def server_without_protocol(world: World) -> list[str]:
    world.raw["servers"] = {"big": {"server": "localhost:8000", "model": "m"}}
    return make(world, by="big")


@case(
    KIND,
    "wrote an API key into the recipe",
    "it is no name of an environment variable",
    "does not belong in a recipe",
)
def key_of_a_server(world: World) -> list[str]:
    server = {"server": "http://localhost:8000/v1", "model": "m", "key": "my-key"}
    world.raw["servers"] = {"big": server}
    return make(world, by="big")


@case(
    KIND,
    "did not set the variable of an API key",
    "the environment variable NO_SUCH_KEY is not set",
    "set it to the API key",
)
def unset_key_of_a_server(world: World) -> list[str]:
    server = {"server": "http://localhost:8000/v1", "model": "m", "key": "NO_SUCH_KEY"}
    world.raw["servers"] = {"big": server}
    return make(world, by="big")


@case(
    KIND,
    "compared images with records without images",
    "text.json: none of its images can be compared, the first: no record has any",
    "a folder of images, in 'against'",
)
def against_no_images(world: World) -> list[str]:
    write('[{"messages": [{"role": "user", "content": "What?"}]}]', "text.json")
    return make(world, against=["text.json"])


@case(
    KIND,
    "compared images with themselves",
    "make.photos: no image is left: 1 image is a near-duplicate of images of photos/",
    "lower 'twins', or name less in 'against'",
    leaves="made.jsonl.answers",
)
def no_image_is_left(world: World) -> list[str]:
    return make(world, against=["photos/"])


@case(
    KIND,
    "damaged the hashes of images",
    "made.jsonl.answers/hashes-00000.jsonl: line 1: it is not a hash of an image",
    "it is made again",
)
def damaged_hashes(world: World) -> list[str]:
    Path("made.jsonl.answers").mkdir()
    write('{"image": 1}\n', "made.jsonl.answers/hashes-00000.jsonl")
    return make(world, twins=16)


def later(world: World, **changes: Any) -> dict[str, Any]:
    """Have the student answer before the second stage; returns that stage."""
    make(world, by="student", **changes)
    first = world.raw["stages"][0]
    stage = {**first, "name": "improve", "data": {"train": "made:photos"}}
    world.raw["stages"] = [first, stage]
    return stage


@case(
    KIND,
    "had two entries read each other's records",
    "entries of 'make' read each other's records (more -> photos -> more)",
    "break the circle",
)
def made_in_a_circle(world: World) -> None:
    make(world, pictures=None, records="made:more")
    more = {"records": "made:photos", "out": "more.jsonl"}
    world.raw["make"]["more"] = more


@case(
    KIND,
    "read the records of an entry that is not there",
    "'made:more' is no entry of 'make'",
    "known: photos",
)
def reads_no_entry(world: World) -> None:
    make(world, pictures=None, records="made:more")


@case(
    KIND,
    "made two files of one name before a stage",
    "stage improve: two entries of 'make' write files with the name made.jsonl",
    "give one another name",
)
def made_under_one_name(world: World) -> None:
    stage = later(world)
    world.raw["make"]["again"] = {"records": "made:photos", "out": "again/made.jsonl"}
    stage["data"] = {"train": "made:again"}


@case(
    KIND,
    "left out records that are made right before their stage",
    "stage improve: left.jsonl belongs to records that are there before the run",
    "leave it out, or name another model in 'by'",
)
def left_out_before_it_is_made(world: World) -> None:
    stage = later(world)
    write(b"{}", "left.jsonl")
    stage["data"]["leave_out"] = "left.jsonl"


@case(
    KIND,
    "named a stage like a round of another one",
    "two stages have the same name",
    "rename one",
)
def named_like_a_round(world: World) -> None:
    first = world.raw["stages"][0]
    world.raw["stages"] = [{**first, "rounds": 2}, {**first, "name": f"{first['name']}-2"}]


@case(
    KIND,
    "gave a long name to a stage with rounds",
    "its name with the number of the round has more than 100 characters",
    "shorten it",
)
def long_name_of_rounds(world: World) -> None:
    world.raw["stages"][0] |= {"name": "a" * 99, "rounds": 2}


@case(
    KIND,
    "wanted very many rounds",
    "1,100 stages, counting each round",
    "give at most 1,000",
)
def too_many_rounds(world: World) -> None:
    first = world.raw["stages"][0]
    world.raw["stages"] = [{**first, "name": f"s{n}", "rounds": 100} for n in range(11)]
