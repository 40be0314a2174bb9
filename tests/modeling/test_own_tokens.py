"""A processor from elsewhere has to have the model's own tokens: recipes, evaluation and Python."""

import shutil

import pytest

from mmkd.api.loaded import load
from mmkd.errors import CheckpointError
from mmkd.modeling.conversation import load_answering
from mmkd.recipe import ModelConfig, StudentConfig, TeacherConfig
from mmkd.students.check import check_student
from mmkd.teachers.check import check_teacher

SAID = "the processor has other tokens than the model: id .* is '<|human|>', and '<|user|>' in the"


@pytest.fixture
def other(tiny_model_dir, tmp_path):
    """The model's processor with one token renamed."""
    folder = shutil.copytree(tiny_model_dir, tmp_path / "other")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = folder / name
        path.write_text(path.read_text().replace("<|user|>", "<|human|>"))
    (folder / "model.safetensors").unlink()
    return folder


def ways(model, processor):
    source = StudentConfig(model=str(model), processor=str(processor))
    teacher = TeacherConfig(model=str(model), processor=str(processor))
    return {
        "student": lambda: check_student(source),
        "teacher": lambda: check_teacher(teacher, "teacher"),
        "answers": lambda: load_answering(str(model), processor=str(processor)),
        "python": lambda: load(
            str(model), str(processor), "student", ModelConfig(model=str(model))
        ),
    }


@pytest.mark.parametrize("way", ["student", "teacher", "answers", "python"])
def test_another_tokenizer_is_refused(way, tiny_model_dir, other):
    with pytest.raises(CheckpointError, match=SAID.replace("|", r"\|")):
        ways(tiny_model_dir, other)[way]()


@pytest.mark.parametrize("way", ["student", "teacher", "answers", "python"])
def test_the_same_tokens_of_another_folder_are_not(way, tiny_model_dir, tmp_path):
    folder = shutil.copytree(tiny_model_dir, tmp_path / "copy")
    ways(tiny_model_dir, folder)[way]()


def test_a_model_without_a_tokenizer_takes_any(tiny_model_dir, other, tmp_path):
    bare = shutil.copytree(tiny_model_dir, tmp_path / "bare")
    for path in [*bare.glob("*token*"), *bare.glob("*processor*")]:
        path.unlink()
    for check in ways(bare, other).values():
        check()


@pytest.mark.parametrize("way", ["student", "teacher", "answers", "python"])
def test_a_model_whose_own_processor_cannot_be_loaded_is_checked(
    way, tiny_model_dir, other, tmp_path
):
    """For example without torchvision, which many processors need."""
    model = shutil.copytree(tiny_model_dir, tmp_path / "model")
    for path in [*model.glob("*processor*"), *model.glob("chat_template*")]:
        path.unlink()
    with pytest.raises(CheckpointError, match=SAID.replace("|", r"\|")):
        ways(model, other)[way]()
