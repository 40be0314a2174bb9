"""`made:NAME` in a recipe: in held-out records, in variants, and in runs that cannot go on."""

import pytest
import yaml

from mmkd.commands.bench import bench
from mmkd.commands.build_cache import build_cache
from mmkd.commands.check_data import check_data
from mmkd.commands.score_data import score_data
from mmkd.data.check import Look
from mmkd.errors import MmkdError
from mmkd.making.used import used_entries
from mmkd.recipe import load_recipe, load_written, to_yaml
from mmkd.runs import make_data, pipeline
from mmkd.runs.members import members


def test_held_out_records_can_be_made(recipe, photos, tmp_path):
    path, out = recipe(), str(tmp_path / "made.jsonl")
    for said in ("made:photos", [{"train": "made:photos"}]):
        read = load_recipe(path, [f"data={{train: other.json, validation: {said}}}"])
        [part] = read.data.validation_parts
        assert (part.train, part.images, part.name) == (out, str(photos), "photos")
        assert set(used_entries(read)) == {"photos"}
        assert load_written(yaml.safe_load(to_yaml(read))) == read
    with pytest.raises(MmkdError, match="'made:photo' is no entry of 'make' -- known: photos"):
        load_recipe(path, ["data={train: other.json, validation: 'made:photo'}"])


@pytest.mark.parametrize("stage", [False, True])
def test_a_variant_that_writes_another_file_trains_on_it(recipe, tmp_path, stage):
    raw = yaml.safe_load(recipe(why={"out": str(tmp_path / "why.jsonl")}).read_text())
    sources = [{"train": "made:photos"}, {"train": "made:photos-why"}, {"train": "other.json"}]
    data = {"sources": sources, "validation": "made:photos"}
    if stage:
        raw["stages"][0]["data"] = data
    else:
        raw["data"] = data
    new = [f"make.photos.out={tmp_path / 'new.jsonl'}", "make.photos.seed=1",
           f"make.photos.why.out={tmp_path / 'new-why.jsonl'}"]  # fmt: skip
    raw["variants"] = {"other": new}
    own, other = (m.recipe for m in members(load_recipe(raw)))
    read = [r.stage_data(r.stages[0]) for r in (own, other)]
    files = [[p.train.rpartition("/")[2] for p in (*d.parts, *d.validation_parts)] for d in read]
    assert files == [
        ["made.jsonl", "why.jsonl", "other.json", "made.jsonl"],
        ["new.jsonl", "new-why.jsonl", "other.json", "new.jsonl"],
    ]
    assert [p.label for p in read[0].parts] == [p.label for p in read[1].parts]


def test_commands_say_how_records_are_made(recipe, tmp_path):
    path, folder = recipe(), {"folder": str(tmp_path / "cache")}
    read = load_recipe(path)
    stored = load_recipe(path, [f"teacher.cache={folder}", "teacher.source=cache"])
    for command in (
        lambda: check_data(str(path), None, Look(), 1),
        lambda: score_data(read, tmp_path / "s.parquet", device="cpu"),
        lambda: build_cache(stored),
        lambda: bench(read, None, 1),
    ):
        with pytest.raises(MmkdError, match=r"make\.photos: its records are not made yet"):
            command()


def refuse(*_):
    raise MmkdError("no such task")


def test_a_run_that_cannot_go_on_makes_nothing(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(make_data, "make_answers", lambda *_: pytest.fail("a model was asked"))
    path = recipe()
    with monkeypatch.context() as patched:
        patched.setattr(pipeline.preflight, "check_tasks", refuse)
        with pytest.raises(MmkdError, match="no such task"):
            pipeline.run(load_recipe(path, ["evaluate={tasks: [nothing]}"]))
    with pytest.raises(MmkdError, match="--from-stage mimick: no such stage"):
        pipeline.run(load_recipe(path), from_stage="mimick")
    foreign = tmp_path / "runs" / "made" / "recipe.yaml"
    foreign.parent.mkdir(parents=True, exist_ok=True)
    foreign.write_text(path.read_text())
    with pytest.raises(MmkdError, match=r"recipe\.yaml that no run has written"):
        pipeline.run(load_recipe(path))
