"""Evaluations by lmms-eval, and sample answers."""

from pathlib import Path
from typing import Any

import yaml

from tests.support.bad_inputs.table import World, case, write

KIND = "evaluation"


@case(
    KIND, "asked for an unknown evaluation", "unknown task 'scenes_pop'", "did you mean scenes_pope"
)
def unknown_evaluation(world: World) -> None:
    task_folder()
    world.raw["evaluate"] = {"tasks": ["scenes_pop"], "include": "tasks"}


@case(
    KIND,
    "asked for an evaluation without its data",
    "tasks/scenes_pope.yaml: the data of task",
    "questions.parquet",
    "mmkd data build scenes",
)
def evaluation_without_data(world: World) -> None:
    task_folder(dataset_path="parquet", dataset_kwargs={"data_files": "questions.parquet"})
    world.raw["evaluate"] = {"tasks": ["scenes_pope"], "include": "tasks"}


@case(
    KIND,
    "asked offline for a benchmark on the Hub",
    "lmms-lab-encoder/POPE: the data of task pope cannot be reached",
    "give its files as `local`",
)
def evaluation_out_of_reach(world: World) -> None:
    world.raw["evaluate"] = {"tasks": ["pope"]}


@case(KIND, "split a pair of MME's questions", "limit 3 splits a pair", "give an even limit")
def pairs_of_questions(world: World) -> None:
    world.raw["evaluate"] = {"tasks": ["mme"], "limit": 3}


@case(
    KIND,
    "asked for a benchmark that is scored by likelihoods",
    "task seedbench_ppl is not answered by generation",
    "use seedbench",
)
def evaluation_by_likelihoods(world: World) -> None:
    world.raw["evaluate"] = {"tasks": ["seedbench_ppl"]}


@case(
    KIND,
    "misspelt a task's generation setting",
    "task scenes_pope: its generation_kwargs have 'max_new_token', which mmkd does not know",
    "did you mean 'max_new_tokens'?",
)
def evaluation_with_an_unknown_setting(world: World) -> None:
    task_folder(generation_kwargs={"max_new_token": 8})
    world.raw["evaluate"] = {"tasks": ["scenes_pope"], "include": "tasks"}


@case(
    KIND,
    "asked for an evaluation without tasks and samples",
    "evaluate",
    "nothing to evaluate",
    "give 'samples'",
)
def empty_evaluation(world: World) -> None:
    world.raw["evaluate"] = {"teacher": True}


@case(
    KIND,
    "asked for samples without images or records",
    "evaluate.samples",
    "nothing to show",
    "'images'",
)
def samples_of_nothing(world: World) -> None:
    world.raw["evaluate"] = {"samples": {"count": 3}}


@case(
    KIND,
    "gave both records and a list of images for samples",
    "evaluate.samples",
    "with 'records', 'images' must be one folder",
)
def samples_of_two_sources(world: World) -> None:
    world.raw["evaluate"] = {"samples": {"records": "train.json", "images": ["picture.png"]}}


@case(
    KIND,
    "gave prompts together with records",
    "evaluate.samples",
    "'prompts' are asked about 'images'",
)
def samples_with_prompts(world: World) -> None:
    world.raw["evaluate"] = {"samples": {"records": "train.json", "prompts": ["What?"]}}


@case(
    KIND,
    "named a sample image that is not there",
    "gone.png: no such image",
    "evaluate.samples.images",
)
def sample_picture_gone(world: World) -> None:
    world.raw["evaluate"] = {"samples": {"images": ["gone.png"]}}


@case(
    KIND, "named a folder of samples that is not there", "gone: no such folder of images",
    "check evaluate.samples.images",
)  # fmt: skip
def sample_folder_gone(world: World) -> None:
    world.raw["evaluate"] = {"samples": {"images": "gone"}}


@case(KIND, "named a folder of samples without images", "none: no images in it", "read are .jpg")
def sample_folder_empty(world: World) -> None:
    Path("none").mkdir()
    world.raw["evaluate"] = {"samples": {"images": "none"}}


@case(
    KIND,
    "wrote the image placeholder in a sample's prompt",
    "picture.png: the text of turn 0 contains <image>",
)
def sample_that_is_refused(world: World) -> None:
    world.raw["evaluate"] = {
        "samples": {"images": ["picture.png"], "prompts": ["Is <image> a cat?"]}
    }


def task_folder(**settings: Any) -> None:
    Path("tasks").mkdir()
    write(yaml.safe_dump({"task": "scenes_pope", **settings}), "tasks/scenes_pope.yaml")
