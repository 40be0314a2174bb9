"""A recipe that has changed since a run: what is kept, what is moved away, what is refused."""

import json

import pytest
import yaml

from mmkd.commands.build_cache import build_cache
from mmkd.errors import CheckpointError, RecipeError
from mmkd.recipe import load_recipe
from mmkd.report import write_report
from mmkd.runs import pipeline
from mmkd.runtime.files import locked, read_json, read_yaml
from tests.support import warm
from tests.support.recipes import tiny_recipe
from tests.support.slow import slow

STAGES = ("one", "two", "three")
FOLDERS = [f"{i:02d}-{name}" for i, name in enumerate(STAGES, 1)]


@pytest.fixture
def raw(scenes_dir, tiny_model_dir, tmp_path):
    made = tiny_recipe(scenes_dir, tiny_model_dir, tmp_path, stage={"steps": 2})
    made["stages"] = [{**made["stages"][0], "name": name} for name in STAGES]
    return made


def weights(folder):
    path = folder / "student" / "model.safetensors"
    return path.read_bytes(), path.stat().st_mtime_ns


def started(raw, monkeypatch):
    """What the run of a recipe trains: the stages' names."""
    trained, run_stage = [], pipeline.run_stage

    def watched(inputs):
        trained.append(inputs.config.name)
        return run_stage(inputs)

    monkeypatch.setattr(pipeline, "run_stage", watched)
    return trained


@pytest.mark.parametrize(
    ("change", "first", "key"),
    [
        slow("stages.0.optimizer.lr=1e-2", 0, "stages.0.optimizer.lr"),
        ("stages.1.optimizer.lr=1e-2", 1, "stages.1.optimizer.lr"),
        slow("stages.2.objectives.0.weight=2", 2, "stages.2.objectives.0.weight"),
        slow("stages.1.name=renamed", 1, "stages.1.name"),
        ("stages.2.data={train: DATA, max_length: 1024}", 2, "stages.2.data.max_length"),
        ("data.max_length=1024", 0, "data.max_length"),
    ],
)
def test_stages_before_the_first_changed_one_are_kept(
    raw, scenes_dir, tmp_path, monkeypatch, capsys, change, first, key
):
    change = change.replace("DATA", str(scenes_dir / "train.parquet"))
    folder = pipeline.run(load_recipe(raw))
    before = {name: weights(folder / name) for name in FOLDERS}
    listing = sorted(p for p in folder.rglob("*"))
    changed = load_recipe(raw, [change])
    name = changed.stages[first].name
    with pytest.raises(RecipeError) as refused:
        pipeline.run(changed)
    assert f"which differs in {key}" in str(refused.value)
    assert f"--from-stage {name}" in str(refused.value)
    assert listing == sorted(p for p in folder.rglob("*"))
    trained = started(raw, monkeypatch)
    capsys.readouterr()
    pipeline.run(changed, from_stage=name)
    assert trained == [s.name for s in changed.stages[first:]]
    said = " ".join(capsys.readouterr().out.split())
    assert f"starts again from stage {name}, which differs in {key}" in said
    for number, stage in enumerate(FOLDERS):
        old = folder / stage if number < first else folder / "replaced" / "1" / stage
        assert weights(old) == before[stage]
    # as if it had been trained so from the beginning
    alone = pipeline.run(load_recipe({**raw, "name": "alone"}, [change]))
    last = f"03-{changed.stages[2].name}"
    assert weights(folder / last)[0] == weights(alone / last)[0]
    trained.clear()
    pipeline.run(changed, from_stage=name)  # the same command again
    assert trained == []
    assert "the recipe has not changed" in capsys.readouterr().out


def test_what_was_not_begun_needs_no_leave(raw, monkeypatch, capsys):
    """A later stage that nothing was trained of, and stages that are new."""
    folder = pipeline.run(load_recipe(raw, [f"stages=[{json.dumps(raw['stages'][0])}]"]))
    kept = weights(folder / "01-one")
    trained = started(raw, monkeypatch)
    pipeline.run(load_recipe(raw))
    assert trained == ["two", "three"]
    assert "starts again from stage two, which differs in stages.1; one kept" in " ".join(
        capsys.readouterr().out.split()
    )
    assert weights(folder / "01-one") == kept


def test_stages_that_are_gone_are_not_dropped_in_silence(raw, monkeypatch):
    folder = pipeline.run(load_recipe(raw))
    shorter = {**raw, "stages": raw["stages"][:2]}
    with pytest.raises(RecipeError, match="--from-stage three"):
        pipeline.run(load_recipe(shorter))
    trained = started(raw, monkeypatch)
    pipeline.run(load_recipe(shorter), from_stage="three")
    assert trained == []
    assert not (folder / "03-three").exists()
    assert (folder / "replaced" / "1" / "03-three" / "done.json").exists()


def test_an_earlier_stage_may_be_named_and_a_later_one_is_refused(raw, monkeypatch):
    folder = pipeline.run(load_recipe(raw))
    changed = load_recipe(raw, ["stages.1.optimizer.lr=1e-2"])
    with pytest.raises(
        RecipeError, match=r"stage two before it has changed too, in stages\.1\.opt"
    ):
        pipeline.run(changed, from_stage="three")
    with pytest.raises(RecipeError, match=r"--from-stage thre: no such stage -- did you mean"):
        pipeline.run(changed, from_stage="thre")
    with pytest.raises(RecipeError, match=r"--from-stage thre: no such stage -- did you mean"):
        pipeline.run(load_recipe(raw), from_stage="thre")
    trained = started(raw, monkeypatch)
    pipeline.run(changed, from_stage="one")
    assert trained == list(STAGES)
    assert (folder / "replaced" / "1" / "01-one").is_dir()


def test_a_conversion_that_has_changed_is_made_again(raw):
    raw["stages"][1]["convert"] = [{"kind": "width_pruning", "decoder": 32}]
    pipeline.run(load_recipe(raw))
    change = ["stages.1.convert=[{kind: width_pruning, decoder: 48}]"]
    folder = pipeline.run(load_recipe(raw, change), from_stage="two")
    config = read_json(folder / "03-three" / "student" / "config.json")
    assert config["text_config"]["intermediate_size"] == 48


def test_scores_and_report_of_the_old_student_go_with_it(raw, scenes_dir):
    raw["evaluate"] = {
        "tasks": ["scenes_vqa"],
        "include": str(scenes_dir / "tasks"),
        "limit": 2,
        "every_stage": True,
    }
    folder = pipeline.run(load_recipe(raw))
    write_report(folder)
    scored = {p.parent.name: p.stat().st_mtime_ns for p in folder.glob("evaluation/*/request.json")}
    assert set(scored) == {"student", "student@one", "student@two"}
    first = read_json(folder / "provenance.json")
    changed = load_recipe(raw, ["stages.1.optimizer.lr=1e-2"])

    class StoppedHereError(Exception):
        pass

    def stop(*words, **settings):
        raise StoppedHereError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "run_stage", stop)
        with pytest.raises(StoppedHereError):
            pipeline.run(changed, from_stage="two")
    left = [p.parent.name for p in folder.glob("evaluation/*/results.json")]
    assert left == ["student@one"]
    assert not (folder / "report.html").exists()
    old = folder / "replaced" / "1"
    assert (old / "report.html").exists()
    assert {p.name for p in (old / "evaluation").iterdir()} == {"student", "student@two"}
    pipeline.run(changed)
    again = {p.parent.name: p.stat().st_mtime_ns for p in folder.glob("evaluation/*/request.json")}
    assert again["student@one"] == scored["student@one"]
    assert again["student"] != scored["student"]
    found = read_json(folder / "provenance.json")
    (replaced,) = found["replaced"]
    assert replaced["provenance"] == first
    assert replaced["kept_stages"] == ["one"]
    assert replaced["differs_in"] == ["stages.1.optimizer.lr"]
    assert read_yaml(old / "training.yaml")["stages"][1]["optimizer"]["lr"] == 1e-3
    write_report(folder)
    assert read_yaml(folder / "training.yaml")["stages"][1]["optimizer"]["lr"] == 1e-2


def test_variants_start_again_on_their_own(raw, monkeypatch):
    raw["stages"] = raw["stages"][:2]
    raw["variants"] = {"other": ["stages.1.optimizer.lr=1e-4"]}
    folder = pipeline.run(load_recipe(raw))
    raw["variants"] = {"other": ["stages.1.optimizer.lr=1e-5"]}
    kept = weights(folder / "student" / "02-two")
    with pytest.raises(RecipeError, match=r"other: the folder .* stages\.1\.optimizer\.lr"):
        pipeline.run(load_recipe(raw))
    trained = started(raw, monkeypatch)
    pipeline.run(load_recipe(raw), from_stage="two")
    assert trained == ["two"]
    assert weights(folder / "student" / "02-two") == kept
    assert (folder / "other" / "replaced" / "1" / "02-two" / "done.json").exists()


def test_two_commands_do_not_write_into_one_folder(raw, tiny_model_dir, tmp_path):
    """Neither of a run nor of a teacher's cache; the second one changes nothing."""
    raw["stages"] = [{**raw["stages"][0], "objectives": [{"kind": "kl"}]}]
    cache = {"folder": str(tmp_path / "cache"), "k": 8}
    raw["teacher"] = {"model": str(tiny_model_dir), "source": "cache", "cache": cache}
    with locked(tmp_path / "cache"):
        with pytest.raises(CheckpointError, match="cache: another command is writing there"):
            build_cache(load_recipe(raw))
        assert not list((tmp_path / "cache").iterdir())
    build_cache(load_recipe(raw))
    with locked(tmp_path / "tiny"):
        with pytest.raises(CheckpointError, match="tiny: another command is writing there -- wait"):
            pipeline.run(load_recipe(raw))
        assert not list((tmp_path / "tiny").iterdir())
    assert (pipeline.run(load_recipe(raw)) / "01-one" / "done.json").exists()


def test_the_command_passes_it_to_all_processes(raw, tmp_path):
    pipeline.run(load_recipe(raw))
    raw["stages"][2]["optimizer"] = {"lr": 1e-2}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw))
    words = ["run", str(path), "stages.2.batch={size: 2, total: 4}", "--nproc", "2"]
    done = [warm.run(*words, *more) for more in ([], ["--from-stage", "three"])]
    assert [d.returncode for d in done] == [2, 0], done[1].stderr
    assert "--from-stage three" in done[0].stderr
    assert "starts again from stage three" in " ".join(done[1].stdout.split())
