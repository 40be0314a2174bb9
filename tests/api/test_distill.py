"""`mmkd.distill` trains as a run does, on models and records in memory."""

import json

import datasets
import pytest
import torch
from PIL import Image

import mmkd
from mmkd.data.images import load_image
from mmkd.modeling.adapters import adapted_layers
from mmkd.modeling.loading import load_model, load_pretrained_processor
from mmkd.recipe import ModelConfig
from tests.support.recipes import tiny_recipe

STAGE = {
    "steps": 4,
    "batch": {"size": 4, "accumulate": 2},
    "optimizer": {"lr": 1e-3},
    "engine": {"device": "cpu"},
}
OBJECTIVES = [{"kind": "ce"}, {"kind": "jsd"}, {"kind": "relation", "region": "vision"}]
SHORT = {"steps": 1, "batch": {"size": 2}, "engine": {"device": "cpu"}}


def model(folder, dtype="float32"):
    return load_model(ModelConfig(model=str(folder), dtype=dtype))


def noisy(folder):
    """Another teacher than the student."""
    teacher = model(folder)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for parameter in teacher.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return teacher


@pytest.fixture(scope="module")
def table(scenes_dir):
    return datasets.load_dataset(
        "parquet", data_files=str(scenes_dir / "train.parquet"), split="train"
    )


@pytest.fixture(scope="module")
def records(table):
    """The same records as mappings with open images."""
    return [{**row, "image": load_image(row["image"], None)} for row in table.to_list()]


@pytest.fixture(scope="module")
def processor(tiny_model_dir):
    return load_pretrained_processor(str(tiny_model_dir))


@pytest.fixture(scope="module")
def teacher_dir(tiny_model_dir, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    noisy(tiny_model_dir).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def of_a_run(scenes_dir, tiny_model_dir, teacher_dir, tmp_path_factory):
    """Steps of a run by a recipe, and its student's weights."""
    out = tmp_path_factory.mktemp("runs")
    raw = tiny_recipe(
        scenes_dir,
        tiny_model_dir,
        out,
        stage={**STAGE, "objectives": OBJECTIVES},
        teacher={"model": str(teacher_dir)},
        seed=7,
    )
    folder = mmkd.run(raw, report=False)
    stage = folder / "01-mimic"
    lines = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    return lines, model(stage / "student").state_dict()


def without_time(steps):
    return [{k: v for k, v in step.items() if k != "seconds"} for step in steps]


class Numbered(torch.utils.data.Dataset):
    def __init__(self, records):
        self.records = records

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        return self.records[index]


@pytest.mark.parametrize("kind", ["list", "torch", "datasets", "file"])
def test_losses_and_weights_are_those_of_a_run(
    kind, records, table, scenes_dir, tiny_model_dir, teacher_dir, processor, of_a_run
):
    given = {
        "list": records,
        "torch": Numbered(records),
        "datasets": table,
        "file": scenes_dir / "train.parquet",
    }[kind]
    made = mmkd.distill(
        model(tiny_model_dir),
        model(teacher_dir),
        given,
        OBJECTIVES,
        processor=processor,
        teacher_processor=str(teacher_dir),
        seed=7,
        **STAGE,
    )
    lines, weights = of_a_run
    assert without_time(made.history) == without_time(lines)
    assert made.metrics["loss"] == lines[-1]["loss"]
    for name, tensor in made.student.state_dict().items():
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=0)
    assert made.folder is None
    assert not made.student.training


def test_names_of_models_are_loaded_as_in_a_recipe(
    records, tiny_model_dir, teacher_dir, of_a_run, tmp_path
):
    out = tmp_path / "made"
    made = mmkd.distill(
        tiny_model_dir, str(teacher_dir), records, OBJECTIVES, seed=7, out=out, **STAGE
    )
    lines, weights = of_a_run
    assert without_time(made.history) == without_time(lines)
    written = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert without_time(written) == without_time(lines)
    for name, tensor in model(out / "student").state_dict().items():
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=0)
    assert made.folder == out
    with pytest.raises(mmkd.MmkdError, match="the folder is not empty -- name a new folder"):
        mmkd.distill(tiny_model_dir, None, records, ["ce"], out=out, **SHORT)


def test_nothing_is_left_behind(records, tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    settings = {**STAGE, "checkpoint": {"interval": 1}}
    mmkd.distill(tiny_model_dir, None, records, ["ce"], **settings)
    assert list(tmp_path.iterdir()) == []


def test_callbacks_are_called_in_order(records, tiny_model_dir):
    calls = []

    class Watch(mmkd.Callback):
        def on_stage_begin(self, stage):
            calls.append(("begin", stage.config.name, stage.steps))

        def on_step_end(self, step, metrics):
            calls.append(("step", step, metrics["step"]))

        def on_validation_end(self, step, metrics):
            calls.append(("validation", step, metrics["step"]))

        def on_stage_end(self, stage, metrics):
            calls.append(("end", stage.config.name, metrics["step"]))

    settings = {**STAGE, "steps": 2, "validation": {"interval": 1}}
    made = mmkd.distill(
        tiny_model_dir, None, records, ["ce"], held_out=0.25, callbacks=[Watch()], **settings
    )
    assert calls == [
        ("begin", "distill", 2),
        ("step", 1, 1),
        ("validation", 1, 1),
        ("step", 2, 2),
        ("validation", 2, 2),
        ("end", "distill", 2),
    ]
    assert [line["step"] for line in made.validation] == [1, 2]


def test_held_out_records_may_be_in_memory_too(records, tiny_model_dir):
    share = mmkd.distill(tiny_model_dir, None, records, ["ce"], held_out=records[:8], **SHORT)
    assert share.validation[-1]["records"] == 8


def test_adapters_become_part_of_their_layers(records, tiny_model_dir):
    student = model(tiny_model_dir)
    names = list(student.state_dict())
    before = student.state_dict()["model.language_model.layers.0.self_attn.q_proj.weight"].clone()
    train = {"lora": {"rank": 2, "groups": ["language_model"]}}
    mmkd.distill(student, "self", records, ["kl", "ce"], train=train, **STAGE)
    assert adapted_layers(student) == {}
    assert list(student.state_dict()) == names
    after = student.state_dict()["model.language_model.layers.0.self_attn.q_proj.weight"]
    assert not torch.equal(before, after)
    mmkd.distill(student, "self", records, ["kl", "ce"], train=train, **SHORT)  # and again


def test_a_student_in_bfloat16_stays_a_plain_model(records, tiny_model_dir):
    """No hook of the first training disturbs the second one."""
    student = model(tiny_model_dir, "bfloat16")
    implementation = student.config._attn_implementation
    for _ in range(2):
        mmkd.distill(student, None, records, ["ce"], activation_checkpointing=True, **SHORT)
    assert student.config._attn_implementation == implementation
    assert not student.is_activation_checkpointing
    for parameter in student.parameters():
        assert not parameter._post_accumulate_grad_hooks


def refused(message, *words, **settings):
    with pytest.raises(mmkd.MmkdError) as caught:
        mmkd.distill(*words, **{**SHORT, **settings})
    assert message in str(caught.value)


def test_what_cannot_be_is_refused_before_the_first_step(records, tiny_model_dir, processor):
    student, teacher = model(tiny_model_dir), model(tiny_model_dir)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    refused("weights in common, first", student, student, records)
    teacher.lm_head.weight = student.lm_head.weight
    refused("weights in common, first", student, teacher, records)
    refused("objective kl needs a teacher", student, None, records)
    refused("unknown kind 'kll' -- did you mean 'kl'?", student, None, records, ["kll"])
    refused("stepz: unknown key -- did you mean 'steps'?", student, None, records, ["ce"], stepz=1)
    refused("DeepSpeed takes models apart", student, None, records, ["ce"],
            engine={"kind": "deepspeed"})  # fmt: skip
    refused("call mmkd.convert first", student, None, records, ["ce"],
            convert=[{"kind": "moe", "experts": 2}])  # fmt: skip
    refused("it is given twice -- use images=", student, None, records, ["ce"],
            data={"images": "folder"})  # fmt: skip
    refused("the data set is empty", student, None, [], ["ce"])
    refused("a generator has no length", student, None, (r for r in records), ["ce"])
    refused("give one of its splits", student, None, datasets.DatasetDict(train=1), ["ce"])
    refused("dataset: record 0: the record is a int", student, None, [1, 2], ["ce"])
    refused("dataset: record 0 (id a): neither 'conversations'", student, None, [{"id": "a"}],
            ["ce"])  # fmt: skip
    refused("its weights are float64", model(tiny_model_dir).double(), None, records, ["ce"])
    student.name_or_path = ""
    refused("student: the model was loaded from nowhere", student, None, records, ["ce"])
    student.name_or_path = "/nowhere"
    refused("student: its processor cannot be loaded from /nowhere (no such model folder) -- give "
            "processor=", student, None, records, ["ce"])  # fmt: skip
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_processors_that_differ_are_refused_by_name(records, tiny_model_dir, processor):
    other = load_pretrained_processor(str(tiny_model_dir))
    other.image_processor.image_mean = [0.1, 0.2, 0.3]
    words = (model(tiny_model_dir), noisy(tiny_model_dir), records)
    refused("teacher and student have different processors", *words, [{"kind": "hidden_mse"}],
            teacher_processor=other)  # fmt: skip


def test_a_process_group_without_a_launcher_is_refused(records, tiny_model_dir, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    refused("the process group has 2 processes, and WORLD_SIZE says 1", tiny_model_dir, None,
            records, ["ce"])  # fmt: skip


def test_several_processes_need_a_folder(records, tiny_model_dir, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused("several processes need a folder that all of them see -- give out=", tiny_model_dir,
            None, records, ["ce"])  # fmt: skip


def test_pictures_may_be_open_or_paths(tiny_model_dir, tmp_path):
    picture = Image.new("RGB", (64, 64), "red")
    picture.save(tmp_path / "a.png")
    said = [{"role": "user", "content": "what ?"}, {"role": "assistant", "content": "a red circle"}]
    losses = [
        mmkd.distill(
            tiny_model_dir,
            None,
            [{"images": [shown], "messages": said}] * 2,
            ["ce"],
            images=tmp_path,
            **SHORT,
        ).metrics["loss"]
        for shown in (picture, "a.png")
    ]
    assert losses[0] == losses[1]
