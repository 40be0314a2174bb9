"""What cannot be made is refused in one line, before a model is loaded and with nothing written."""

import json
import os

import pytest
import torch
import yaml

from mmkd.cli import main
from mmkd.errors import MmkdError, RecipeError
from mmkd.making import local
from mmkd.making.base import Request
from mmkd.making.make import make_answers
from mmkd.recipe import ModelConfig, SamplingConfig, load_recipe
from mmkd.runs import pipeline

CPU = torch.device("cpu")


RECORD = json.dumps(
    {"images": ["a.png"], "messages": [{"role": "user", "content": "<image>What?"}]}
)


def entry(path, **changes):
    raw = yaml.safe_load(path.read_text())
    raw["make"]["photos"] |= changes
    return raw


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"by": "techer"}, "asks 'techer', which is no model of the recipe -- did you mean"),
        ({"by": ["teacher", "teacher"]}, "names a model twice"),
        ({"records": "a.json"}, "give either 'pictures' (a folder) or 'records'"),
        ({"prompts": []}, "images have no questions -- add 'prompts'"),
        ({"images": "a"}, "'images' is for 'records'"),
        ({"out": "made.txt"}, "end its name with .jsonl or .parquet"),
        ({"sampling": {"n": 4}}, "4 answers at temperature 0 are all the same"),
        ({"keep": "pair"}, "a pair needs a check that scores answers -- add one of agrees"),
        ({"checks": ["emtpy"]}, "make.photos.checks.0: unknown kind 'emtpy' -- did you mean"),
        ({"checks": ["cut", "cut"]}, "two checks are of the same kind"),
        ({"checks": ["reference"]}, "'reference' reads records"),
        ({"checks": [{"kind": "agrees"}], "sampling": {"n": 1}}, "'agrees' compares answers"),
        (
            {"checks": [{"kind": "judge", "by": "teacher"}]},
            "make.photos: 'teacher' would judge its own answers -- name another model",
        ),
        (
            {"checks": [{"kind": "judge", "by": ["teacher", "student"]}]},
            "'teacher' would judge its own answers",  # it has no answers of others to rate
        ),
        (
            {"by": ["teacher", "student"], "checks": [{"kind": "judge", "by": "student"}]},
            "'student' would judge its own answers",  # nobody else rates them
        ),
        (
            {
                "by": ["teacher", "student"],
                "checks": [
                    {
                        "kind": "judge",
                        "by": ["big", "teacher"],
                        "spread": 2,
                        "adjudicator": "student",
                    }
                ],
            },
            "'student' would judge its own answers",
        ),
        ({"checks": [{"kind": "judge", "by": "big", "margin": 1}]}, "'judge' reads records"),
        (
            {"checks": [{"kind": "judge", "by": ["big", "bg"]}]},
            "asks 'bg', which is no model of the recipe -- did you mean 'big'",
        ),
        (
            {"pictures": None, "records": "a.json", "checks": ["reference"]},
            "which is none to 'prom",
        ),
        (
            {
                "pictures": None,
                "records": "a.json",
                "checks": [{"kind": "judge", "by": "big", "margin": 1}],
            },
            "'judge' compares with the record's own answer, which is none to 'prompts'",
        ),
        ({"join": True}, "'join' needs 'keep: best' and the check 'cut'"),
        ({"keep": "all", "why": {"out": "w.jsonl"}}, "set keep to best"),
        ({"why": {"out": "made.txt"}}, "end its name with .jsonl or .parquet"),
        ({"context": {}}, "nothing is set -- add 'system' or 'shots'"),
        ({"batchsize": 4}, "unknown key -- did you mean 'batch_size'?"),
    ],
)
def test_settings(recipe, changes, message):
    server = {"server": "http://localhost:1/v1", "model": "m"}
    with pytest.raises(RecipeError) as caught:
        load_recipe({**entry(recipe(), **changes), "servers": {"big": server}})
    assert message in str(caught.value)


def test_no_model_rates_what_it_has_made_in_another_entry(recipe, tmp_path):
    """Where the record's own answer is rated, its maker is no judge."""
    raw = entry(recipe(), by=["teacher", "student"])
    judge = {"kind": "judge", "by": ["big", "student"], "margin": 1}
    raw["make"]["hard"] = {"records": raw["make"]["photos"]["out"], "by": "other",
                           "checks": [judge], "out": str(tmp_path / "hard.jsonl")}  # fmt: skip
    server = {"server": "http://localhost:1/v1", "model": "m"}
    raw["servers"] = {"big": server, "other": server}
    with pytest.raises(RecipeError) as caught:
        load_recipe(raw)
    said = "make.hard: 'student' would judge its own answers, of make.photos -- name another model"
    assert said in str(caught.value)
    for fits in ({"margin": None}, {"by": ["big"]}):
        raw["make"]["hard"]["checks"] = [{**judge, **fits}]
        assert load_recipe(raw).make["hard"].checks[0].margin == {**judge, **fits}["margin"]


def test_a_maker_may_rate_the_answers_of_others(recipe):
    check = {"kind": "judge", "by": ["teacher", "student"]}
    raw = entry(recipe(), by=["teacher", "student"], checks=[check])
    assert load_recipe(raw).make["photos"].models == ["teacher", "student"]


def test_names_of_models_and_entries(recipe):
    raw = entry(recipe())
    server = {"server": "http://localhost:1/v1", "model": "m"}
    with pytest.raises(RecipeError, match="a server has the name 'teacher' of another model"):
        load_recipe({**raw, "servers": {"teacher": server}})
    with pytest.raises(RecipeError, match="'made:photo' is no entry of 'make' -- known: photos"):
        load_recipe({**raw, "data": {"train": "made:photo"}})
    with pytest.raises(RecipeError, match="has the images of its entry of 'make'"):
        load_recipe({**raw, "data": {"train": "made:photos", "images": "elsewhere"}})
    second = {**raw["make"], "more": raw["make"]["photos"]}
    with pytest.raises(RecipeError, match="two entries of 'make' write the same file"):
        load_recipe({**raw, "make": second})
    folder, name = raw["make"]["photos"]["out"].rsplit("/", 1)
    second["more"] = {**raw["make"]["photos"], "out": f"{folder}/./{name}"}
    with pytest.raises(RecipeError, match="two entries of 'make' write the same file"):
        load_recipe({**raw, "make": second})
    mixed = load_recipe({**raw, "data": {"sources": [{"train": "made:photos"}]}})
    (source,) = mixed.data.sources
    assert (source.train, source.name) == (raw["make"]["photos"]["out"], "photos")
    assert source.images == raw["make"]["photos"]["pictures"]


@pytest.fixture
def refused(recipe, tmp_path, monkeypatch):
    """Checks that an entry is refused with a message, before a model is loaded."""

    def check(message, **changes):
        def load(*given):
            raise AssertionError("a model was loaded")

        monkeypatch.setattr(local, "load_model", load)
        with pytest.raises(MmkdError) as caught:
            make_answers(load_recipe(entry(recipe(), **changes)), "photos", CPU)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "made.jsonl").exists()

    return check


def test_before_a_model_is_loaded(refused, scenes_dir, tmp_path, tiny_model_dir):
    empty = tmp_path / "empty"
    empty.mkdir()
    refused("no such folder -- check 'pictures'", pictures=str(tmp_path / "gone"))
    refused("the folder has no images -- known are .jpg", pictures=str(empty))
    said = "a text has the placeholder <image>, and images are put before questions -- leave it out"
    refused(f"make.photos.prompts: {said}", prompts=["<image>\nWhat?"])
    refused(f"make.photos.context.system: {said}", context={"system": "<image>"})
    exists = {"existence": {"question": "<image> Is there {a_name}?"}}
    refused(f"make.photos.objects.existence.question: {said}", objects=exists)
    captions = {"pictures": None, "prompts": [], "records": str(scenes_dir / "captions.parquet")}
    refused("contain their images, and a .jsonl file holds paths", **captions)
    refused(
        "the records say nothing of objects -- add 'objects'",
        **{**captions, "records": str(scenes_dir / "preferences.parquet")},
        checks=["objects"],
        out=str(tmp_path / "made.parquet"),
    )
    (tmp_path / "r.jsonl").write_text(RECORD)
    own = {"pictures": None, "prompts": [], "records": str(tmp_path / "r.jsonl")}
    elsewhere = tmp_path / "there" / "made.jsonl"
    refused(
        f"make.photos.images: image paths are relative to {tmp_path}", **own, out=str(elsewhere)
    )
    shots = {"context": {"shots": str(tmp_path / "no.json")}}
    refused("no such data file", **shots)


def test_a_converted_student_does_not_answer(recipe):
    raw = yaml.safe_load(recipe(by="student").read_text())
    raw["student"]["convert"] = [{"kind": "depth_pruning", "decoder": [0]}]
    with pytest.raises(MmkdError, match="its conversions come before its training -- name another"):
        make_answers(load_recipe(raw), "photos", CPU)


def test_a_file_of_someone_else(refused, recipe, tmp_path):
    out = tmp_path / "made.jsonl"
    out.write_text("mine")
    with pytest.raises(MmkdError, match="it is there already -- name a new file"):
        make_answers(load_recipe(recipe()), "photos", CPU)
    assert out.read_text() == "mine"


def test_a_damaged_log(recipe, tmp_path):
    logs = tmp_path / "made.jsonl.answers"
    logs.mkdir()
    (logs / "answers-00000.jsonl").write_text('{"key": "a", "text": 3, "finished": true}\n')
    with pytest.raises(MmkdError, match=r"answers-00000.jsonl: line 1: it is not an answer"):
        make_answers(load_recipe(recipe()), "photos", CPU)


def test_unreadable_images_are_left_out_and_named(recipe, photos, rows, tmp_path, capsys):
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "0.png").write_bytes((photos / "0.png").read_bytes())
    (folder / "1.png").write_bytes(b"no image")
    (folder / "2.png").write_bytes((photos / "1.png").read_bytes()[:-40])
    path = recipe(pictures=str(folder), checks=[], sampling={"max_new_tokens": 6})
    made = make_answers(load_recipe(path), "photos", CPU)
    assert {row["images"][0] for row in rows()} == {"0.png"}
    assert (made.questions, made.answers) == (6, 2)
    assert made.unanswered == 6 - made.records
    errors = " ".join(made.asked.unreadable.values())
    assert "1.png is not a readable image" in errors
    assert "2.png is not a readable image" in errors


def test_a_name_that_is_not_utf8(recipe, photos, rows, tmp_path):
    folder = tmp_path / "names"
    folder.mkdir()
    for name in (b"\xff.png", b"a.png"):
        (folder / os.fsdecode(name)).write_bytes((photos / "0.png").read_bytes())
    path = recipe(pictures=str(folder), checks=["cut"], sampling={"max_new_tokens": 30}, join=True)
    made = make_answers(load_recipe(path), "photos", CPU)
    assert {row["id"] for row in rows()} == {"a.png"}
    assert set(made.asked.unreadable.values()) == {
        "the image's name '\\udcff.png' is not UTF-8 -- rename it"
    }


def test_a_first_record_that_cannot_be_read(recipe, photos, rows, tmp_path):
    (tmp_path / "r.jsonl").write_text('{"images": ["0.png"]}\n' + RECORD.replace("a.png", "0.png"))
    path = recipe(
        pictures=None, prompts=None, records=str(tmp_path / "r.jsonl"), images=str(photos),
        checks=[], sampling={"max_new_tokens": 6},
    )  # fmt: skip
    made = make_answers(load_recipe(path), "photos", CPU)
    assert (len(rows()), made.questions, made.unanswered) == (1, 2, 1)


def test_a_prompt_that_cannot_be_encoded_stops_no_others(tiny_model_dir):
    """Such as a judge's, with an answer that has an image token of the judge's family."""

    def request(text):
        messages = [{"role": "user", "content": [{"type": "text", "text": text}]}]
        return Request(text, messages, list, 0)

    maker = local.LocalMaker("judge", ModelConfig(model=str(tiny_model_dir)), 4, CPU)
    found = {}
    requests = [request(text) for text in ("one", "<image>", "two")]
    maker.answer(requests, SamplingConfig(max_new_tokens=2, temperature=0),
                 lambda request, answer: found.update({request.key: answer.error}))  # fmt: skip
    assert (found["one"], found["two"]) == (None, None)
    assert "contains <image>, which stands for an image" in found["<image>"]


def test_no_answer_that_passes(recipe, tmp_path, scenes_dir):
    path = recipe(
        pictures=None, prompts=None, records=str(scenes_dir / "captions.parquet"), limit=2,
        checks=["reference"], out=str(tmp_path / "made.parquet"), sampling={"max_new_tokens": 2},
    )  # fmt: skip
    with pytest.raises(MmkdError, match=r"of 2 answers, 2 refused by .reference. -- change"):
        make_answers(load_recipe(path), "photos", CPU)
    assert not (tmp_path / "made.parquet").exists()


def test_lists_without_names(recipe, tmp_path):
    lists = {"ask": ["Where is the {name}?"], "least_images": 7, "max_new_tokens": 2}
    path = recipe(prompts=None, objects=lists)
    with pytest.raises(MmkdError, match="there is no question -- lower objects"):
        make_answers(load_recipe(path), "photos", CPU)


def test_the_same_model_under_two_names_does_not_judge_itself(recipe):
    raw = yaml.safe_load(recipe(checks=["empty"]).read_text())
    raw["make"]["photos"]["checks"] = [{"kind": "judge", "by": "student"}]
    with pytest.raises(MmkdError, match="'student' and 'teacher' are the same model"):
        make_answers(load_recipe(raw), "photos", CPU)
    raw["student"]["dtype"] = "bfloat16"  # the same weights
    with pytest.raises(MmkdError, match="'student' and 'teacher' are the same model"):
        make_answers(load_recipe(raw), "photos", CPU)
    raw["make"]["photos"]["by"] = "big"
    raw["servers"] = {"big": {"server": "http://localhost:1/v1", "model": "m"}}
    raw["make"]["photos"]["checks"] = [{"kind": "judge", "by": ["teacher", "student"]}]
    with pytest.raises(MmkdError, match="'teacher' and 'student' are the same model, which would "
                                        "judge twice"):  # fmt: skip
        make_answers(load_recipe(raw), "photos", CPU)
    raw["make"]["photos"]["by"] = ["big", "student"]  # one of two names makes answers
    with pytest.raises(MmkdError, match="'teacher' and 'student' are the same model, which would "
                                        "judge its own answers"):  # fmt: skip
        make_answers(load_recipe(raw), "photos", CPU)


def test_a_run_makes_its_data_once(recipe, tmp_path, monkeypatch, capsys):
    path = recipe(checks=[], sampling={"max_new_tokens": 6})
    with pytest.raises(MmkdError, match="its records are not made yet, or with other"):
        pipeline.preflight.check(load_recipe(path))
    # what cannot be trained is refused before a model answers for hours
    bad = load_recipe(path, ["stages.0.train=[nothing]"])
    with pytest.raises(MmkdError, match="nothing"):
        pipeline.run(bad)
    assert not (tmp_path / "made.jsonl").exists()
    pipeline.run(load_recipe(path))
    assert "wrote" in (said := capsys.readouterr().out)
    assert "12 questions" in said
    lines = (tmp_path / "runs" / "made" / "01-mimic" / "metrics.jsonl").read_text().splitlines()
    assert len([line for line in lines if "loss" in json.loads(line)]) == 2
    changed = (tmp_path / "made.jsonl").stat().st_mtime_ns
    pipeline.run(load_recipe(path, [f"output_dir={tmp_path / 'again'}"]))
    assert (tmp_path / "made.jsonl").stat().st_mtime_ns == changed
    assert "questions" not in capsys.readouterr().out
    # a changed recipe is refused before anything is made, and made if it is allowed
    other = load_recipe(path, ["make.photos.seed=1"])
    with pytest.raises(MmkdError, match=r"differs in make.photos.seed \(stage"):
        pipeline.run(other)
    assert (tmp_path / "made.jsonl").stat().st_mtime_ns == changed
    pipeline.run(load_recipe(path, ["make.photos.batch_size=1"]))  # changes no record
    pipeline.run(other, from_stage="mimic")
    assert (tmp_path / "made.jsonl").stat().st_mtime_ns > changed


def test_students_of_one_run_share_a_file_only_with_the_same_settings(recipe):
    raw = yaml.safe_load(recipe().read_text())
    raw["variants"] = {"other": ["make.photos.seed=1"]}
    with pytest.raises(RecipeError, match=r"two students make .* with different settings"):
        pipeline.run(load_recipe(raw))
    raw["variants"] = {"other": ["teacher.model=assets/scenes_teacher"]}
    with pytest.raises(RecipeError, match=r"two students make .* with different models"):
        pipeline.run(load_recipe(raw))


def test_the_command_names_entries(recipe, monkeypatch, capsys):
    path = str(recipe())
    monkeypatch.setattr("sys.argv", ["mmkd", "data", "answers", path, "--only", "photo"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert "make: no entry 'photo' -- did you mean 'photos'?" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["mmkd", "data", "answers", "configs/quickstart.yaml"])
    with pytest.raises(SystemExit):
        main()
    assert "the recipe makes no data -- add an entry" in capsys.readouterr().err
