"""`convert`, `evaluate` and `generate` in Python, and a custom training loop."""

import pytest
import torch
from PIL import Image

import mmkd
from mmkd.modeling.loading import load_model, load_pretrained, load_pretrained_processor
from mmkd.recipe import ModelConfig


def model(folder):
    return load_model(ModelConfig(model=str(folder)))


def test_convert_changes_a_model_in_place_or_writes_a_folder(tiny_model_dir, tmp_path):
    kinds = [{"kind": "depth_pruning", "decoder": [1]}, {"kind": "mamba", "keep_attention": []}]
    student = model(tiny_model_dir)
    whole = student.num_parameters()
    assert mmkd.convert(student, kinds[:1]) is student
    assert student.num_parameters() < whole
    out = tmp_path / "student"
    written = mmkd.convert(tiny_model_dir, kinds, out=out, seed=3)
    again = load_pretrained(str(out)).state_dict()
    for name, tensor in written.state_dict().items():
        assert torch.equal(tensor, again[name])
    load_pretrained_processor(str(out))
    with pytest.raises(mmkd.MmkdError, match="it is there already -- name a new folder"):
        mmkd.convert(tiny_model_dir, kinds, out=out)
    with pytest.raises(
        mmkd.MmkdError, match="unknown kind 'depth' -- did you mean 'depth_pruning'"
    ):
        mmkd.convert(tiny_model_dir, [{"kind": "depth"}])


def test_generate_answers_by_name_and_in_memory(tiny_model_dir):
    picture = Image.new("RGB", (64, 64), "blue")
    pieces = []
    named = mmkd.generate(
        tiny_model_dir, "what is this ?", picture, max_new_tokens=8, on_text=pieces.append
    )
    assert named.text
    assert "".join(pieces).strip() == named.text
    loaded = model(tiny_model_dir).train()
    processor = load_pretrained_processor(str(tiny_model_dir))
    said = mmkd.generate(loaded, "what is this ?", [picture], processor=processor, max_new_tokens=8)
    assert (said.text, said.tokens, said.finished) == (named.text, named.tokens, named.finished)
    assert loaded.training


def test_evaluate_scores_a_model_in_memory(scenes_dir, tiny_model_dir):
    processor = load_pretrained_processor(str(tiny_model_dir))
    result = mmkd.evaluate(
        model(tiny_model_dir),
        ["scenes_pope"],
        processor=processor,
        include=scenes_dir / "tasks",
        limit=2,
        device="cpu",
    )
    assert 0 <= result.scores["scenes_pope"]["pope_accuracy"] <= 1


def test_the_pieces_make_a_loop_whose_first_loss_is_distills(scenes_dir, tiny_model_dir):
    processor = load_pretrained_processor(str(tiny_model_dir))
    student, teacher = model(tiny_model_dir), model(tiny_model_dir)
    with torch.no_grad():
        teacher.lm_head.weight += 0.3
    objectives = [mmkd.build_objective("ce"), mmkd.build_objective({"kind": "jsd", "weight": 2})]
    path = scenes_dir / "train.parquet"
    encoder = mmkd.build_encoder(path, processor, objectives)
    batch = encoder.encode([0, 1, 2, 3])
    with torch.no_grad():
        wanted = mmkd.capture(teacher, batch.inputs)
    counts = {o.name: float(o.rows(batch.targets).sum()) for o in objectives}
    signals = mmkd.capture(student, batch.inputs)
    loss, values = mmkd.score(objectives, signals, wanted, batch.targets, counts)
    loss.backward()
    assert student.lm_head.weight.grad.abs().sum() > 0
    torch.testing.assert_close(loss, values["ce"] + 2 * values["jsd"])
    table = [{**encoder.records.sources[0]._rows.row(i), "id": str(i)} for i in range(4)]
    made = mmkd.distill(
        student,
        teacher,
        table,
        ["ce", {"kind": "jsd", "weight": 2}],
        processor=processor,
        teacher_processor=processor,
        steps=1,
        batch={"size": 4},
        engine={"device": "cpu"},
    )
    assert made.metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_an_unknown_objective_is_named():
    with pytest.raises(mmkd.MmkdError, match="unknown kind 'kll' -- did you mean 'kl'"):
        mmkd.build_objective("kll")
    with pytest.raises(mmkd.MmkdError, match="regoin: unknown key -- did you mean 'region'"):
        mmkd.build_objective({"kind": "kl", "regoin": "vision"})


def test_run_takes_a_file_a_mapping_or_a_recipe(tmp_path, scenes_dir, tiny_model_dir):
    from tests.support.recipes import tiny_recipe

    raw = tiny_recipe(scenes_dir, tiny_model_dir, tmp_path, stage={"steps": 1})
    steps = []

    class Watch(mmkd.Callback):
        def on_step_end(self, step, metrics):
            steps.append(step)

    folder = mmkd.run(raw, ["name=other"], callbacks=[Watch()])
    assert folder == tmp_path / "other"
    assert (folder / "report.html").is_file()
    assert steps == [1]
    assert mmkd.run(mmkd.load_recipe(raw, ["name=other"]), report=False) == folder  # it is done
    assert steps == [1]
    with pytest.raises(TypeError, match="this recipe is loaded"):
        mmkd.run(mmkd.load_recipe(raw), ["name=x"])
