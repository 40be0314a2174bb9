"""Alignment with a teacher that has another processor: other image tokens, the same answers."""

import json

import pytest
import torch
from torch.nn.functional import interpolate
from transformers import AutoConfig, AutoModelForImageTextToText

from mmkd.data.alignment import align, resized, same_processor
from mmkd.data.encoder import Encoder
from mmkd.data.records import Records
from mmkd.errors import DataError, RecipeError
from mmkd.modeling.loading import load_model, load_processor
from mmkd.objectives import Targets
from mmkd.recipe import DataConfig, ModelConfig, load_recipe
from mmkd.runs import pipeline
from mmkd.teachers import LiveTeacher
from tests.support.processors import llava, qwen
from tests.support.recipes import tiny_recipe


def matrix(source, target):
    to, at, weights = resized(source, target)
    made = torch.zeros(target[0] * target[1], source[0] * source[1])
    made[to, at] = weights
    return made


@pytest.mark.parametrize("source", [(4, 4), (3, 5), (8, 2)])
@pytest.mark.parametrize("target", [(4, 4), (7, 3), (2, 2)])
def test_grids_are_resized_as_pictures_are(source, target):
    x = torch.randn(1, 6, *source, dtype=torch.float64)
    want = interpolate(x, size=target, mode="bilinear", antialias=True)[0].flatten(1).T
    got = matrix(source, target).double() @ x[0].flatten(1).T
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_equal_grids_are_the_identity():
    assert torch.equal(matrix((3, 4), (3, 4)), torch.eye(12))


def targets_of(*rows):
    """v: image, p: prompt, a letter from A: that response token, '.': padding."""
    ids = torch.tensor([[ord(c) for c in row] for row in rows])
    vision, prompt, pad = (ids == ord(c) for c in "vp.")
    response = ~(vision | prompt | pad)
    return Targets(ids, ~pad, response, vision)


def test_tokens_match_by_answer_and_by_place():
    student = targets_of("vvvvpABpC.", "ppA.......")
    teacher = targets_of("pvppABpC", "ppppA...")
    alignment = align(student, teacher, [[((2, 2), (1, 1))], []], ["a", "b"])
    x = torch.randn(2, 8, 3)
    got = alignment(x)
    want = torch.zeros(2, 10, 3)
    want[0, :4] = x[0, 1]  # one token becomes four
    want[0, 4:6], want[0, 7] = x[0, 3:5], x[0, 6]  # the rows before A, B and C
    want[1, 1] = x[1, 3]
    torch.testing.assert_close(got, want)


def test_as_many_image_tokens_match_one_by_one():
    """Also where an image is cut into tiles, and no grid is known."""
    student, teacher = targets_of("vvvpA"), targets_of("pvvvA")
    x = torch.randn(1, 5, 2)
    got = align(student, teacher, [[((2, 2), (2, 2))]], ["a"])(x)
    torch.testing.assert_close(got[0, :3], x[0, 1:4])


def test_what_cannot_be_aligned_is_one_line():
    one, other = targets_of("vvpAB"), targets_of("vpAC")
    with pytest.raises(DataError, match="tokenize the response of a7 differently"):
        align(one, other, [[((1, 2), (1, 1))]], ["a7"])
    with pytest.raises(DataError, match="2 image tokens for the student and 1 for the teacher"):
        align(one, targets_of("vpAB"), [[((1, 1), (1, 1))]], ["a7"])


def test_processors_are_compared_by_what_they_do():
    assert same_processor(llava(), llava())
    assert not same_processor(llava(), qwen())


@pytest.fixture(scope="module")
def coarse_teacher(tiny_model_dir, tmp_path_factory):
    """The tiny model at half the image size: 16 image tokens instead of 64."""
    folder = tmp_path_factory.mktemp("coarse")
    config = AutoConfig.from_pretrained(tiny_model_dir)
    config.vision_config.image_size = 32
    config.image_seq_length = 16
    with torch.random.fork_rng():
        torch.manual_seed(1)
        AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    processor = load_processor(ModelConfig(model=str(tiny_model_dir)))
    processor.image_processor.size = {"height": 32, "width": 32}
    processor.save_pretrained(folder)
    return folder


def test_signals_of_a_coarse_teacher(scenes_dir, tiny_model_dir, coarse_teacher):
    config = DataConfig(train=str(scenes_dir / "train.parquet"))
    mine, theirs = (load_processor(ModelConfig(model=str(d)))
                    for d in (tiny_model_dir, coarse_teacher))  # fmt: skip
    records = Records(config)
    batch = Encoder(records, mine, config, teacher_processor=theirs).encode([0, 1, 2])
    assert Encoder(records, mine, config, teacher_processor=mine).encode([0]).teacher is None
    teacher = LiveTeacher(load_model(ModelConfig(model=str(coarse_teacher))), torch.device("cpu"))
    own, aligned = teacher.own_signals(batch), teacher.signals(batch)
    assert aligned.hidden.shape[:2] == batch.targets.input_ids.shape
    answers = own.hidden[batch.teacher.targets.predicts("response")]
    torch.testing.assert_close(aligned.hidden[batch.targets.predicts("response")], answers)
    for row in range(3):
        # logits of the interpolated states are the interpolated logits
        states = own.hidden[row][batch.teacher.targets.vision[row]]  # [16, H]
        logits = (states @ own.head_weight.T).T.unflatten(1, (4, 4))[None]
        want = interpolate(logits, size=(8, 8), mode="bilinear")[0].flatten(1).T
        got = aligned.hidden[row][batch.targets.vision[row]] @ own.head_weight.T
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.fixture
def recipe(scenes_dir, tiny_model_dir, coarse_teacher, tmp_path):
    def make(name, objectives, data="train"):
        return tiny_recipe(
            scenes_dir,
            tiny_model_dir,
            tmp_path,
            name=name,
            teacher={"model": str(coarse_teacher)},
            data={"train": str(scenes_dir / f"{data}.parquet")},
            stage={"objectives": objectives, "steps": 3},
        )

    return make


def test_a_student_learns_from_a_coarse_teacher(recipe):
    objectives = [
        {"kind": "kl"},
        {"kind": "kl", "region": "vision", "name": "vision"},
        {"kind": "relation"},
    ]
    folder = pipeline.run(load_recipe(recipe("coarse", objectives)))
    lines = (folder / "01-mimic" / "metrics.jsonl").read_text().splitlines()
    first, last = json.loads(lines[0]), json.loads(lines[-1])
    assert all(first[name] > 0 for name in ("kl", "vision", "relation"))
    assert last["kl"] < first["kl"]


def test_a_coarse_teacher_is_a_reference_too(recipe):
    logs = []
    for kind in ("live", "once"):
        objectives = [{"kind": "preference", "reference_logps": kind}]
        folder = pipeline.run(load_recipe(recipe(kind, objectives, data="preferences")))
        lines = (folder / "01-mimic" / "metrics.jsonl").read_text().splitlines()
        logs.append([json.loads(line)["preference"] for line in lines])
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)


@pytest.mark.parametrize("objective", [{"kind": "kl", "region": "all"},
                                       {"kind": "hidden_mse", "layers": [0]}])  # fmt: skip
def test_what_two_processors_do_not_share_is_refused(recipe, objective, tmp_path):
    with pytest.raises(RecipeError, match="different processors"):
        pipeline.run(load_recipe(recipe("refused", [objective])))
    assert not (tmp_path / "refused").exists()
