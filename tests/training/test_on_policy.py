"""On-policy distillation: the sampled answers, and their reproducibility."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mmkd.data.answers import answered, answers_of, asked, sample
from mmkd.data.encoder import Encoder
from mmkd.data.records import Records
from mmkd.engines import TorchEngine
from mmkd.engines.root import Root
from mmkd.errors import RecipeError
from mmkd.modeling.loading import load_model, load_processor
from mmkd.objectives import build_objective
from mmkd.objectives.divergence import DivergenceConfig
from mmkd.recipe import DataConfig, ModelConfig, OnPolicyConfig, SamplingConfig, load_recipe
from mmkd.runs import pipeline
from mmkd.training.on_policy import AnswerCounts, OnPolicy
from tests.support.processors import llava, qwen
from tests.support.recipes import tiny_recipe

TURNS = [("human", "<image>\nTwo cats?"), ("gpt", "a dog"), ("human", "And a hat?"), ("gpt", "No")]


@pytest.fixture
def encoder(tmp_path):
    Image.new("RGB", (40, 24), "red").save(tmp_path / "red.png")
    row = {"id": "a", "image": "red.png",
           "conversations": [{"from": who, "value": what} for who, what in TURNS]}  # fmt: skip
    (tmp_path / "data.json").write_text(json.dumps([row]))

    def make(processor):
        config = DataConfig(train=str(tmp_path / "data.json"))
        return Encoder(Records(config), processor, config)

    return make


@pytest.mark.parametrize("family", [llava, qwen])
def test_a_conversation_ends_with_the_students_answer(encoder, family):
    processor = family()
    encode = encoder(processor)
    record = encode.records[0]
    assert answers_of(record) == [1, 3]
    for message, pictures in ((1, 1), (3, 1)):
        prompt = asked(record, message)
        assert len(prompt.images) == pictures
        batch = encode.encode_records([0], [answered(prompt, "two cats and a dog")])
        response = batch.targets.input_ids[0][batch.targets.response[0]]
        text = processor.tokenizer.decode(response)
        assert text.strip().startswith("two cats and a dog")
        assert "No" not in text
        # what the student is asked with is what its answer is trained behind
        asking = encode.prompts([prompt])["input_ids"][0]
        assert torch.equal(batch.targets.input_ids[0][: len(asking)], asking)


def test_a_response_may_be_empty_or_spell_a_placeholder(encoder):
    encode = encoder(llava())
    prompt = asked(encode.records[0], 1)
    assert encode.encode_records([0], [answered(prompt, "")]).targets.response.sum() == 1  # its end
    vocabulary = encode.processor.tokenizer

    def generate(inputs, **options):
        said = vocabulary("two <image> cats", add_special_tokens=False, return_tensors="pt")
        return torch.cat([inputs["input_ids"], said["input_ids"]], 1)

    texts = sample(generate, encode, [prompt], SamplingConfig(), seed=0, device=torch.device("cpu"))
    assert "<image>" not in texts[0]


def engine_of(folder, lmbda, scenes_dir, seed=0, temperature=1.0, tokens=5):
    source = ModelConfig(model=str(folder))
    model = load_model(source)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    engine = TorchEngine(Root(model), optimizer, schedule, device=torch.device("cpu"))
    config = DataConfig(train=str(scenes_dir / "train.parquet"))
    encoder = Encoder(Records(config), load_processor(source), config)
    settings = OnPolicyConfig(lmbda=lmbda, max_new_tokens=tokens, temperature=temperature)
    return OnPolicy(settings, encoder, engine, seed)


def test_a_scale_to_global_mean_the_answers_is_sampled(tiny_model_dir, scenes_dir):
    policy = engine_of(tiny_model_dir, 0.5, scenes_dir)
    before = policy.encoder.encode(list(range(32)))
    state = torch.get_rng_state()
    made, count = policy.batch(before, step=3, micro=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert 8 <= count.sampled <= 24
    own = made.targets.response.sum(1) != before.targets.response.sum(1)
    assert int(own.sum()) == count.sampled
    again, _ = policy.batch(before, step=3, micro=0)
    assert torch.equal(again.targets.input_ids, made.targets.input_ids)
    other, _ = policy.batch(before, step=4, micro=0)
    assert other.targets.input_ids.shape != made.targets.input_ids.shape or not torch.equal(
        other.targets.input_ids, made.targets.input_ids
    )
    untouched, none = engine_of(tiny_model_dir, 0.0, scenes_dir).batch(before, 3, 0)
    assert none == AnswerCounts()
    assert untouched is before


def test_greedy_answers_are_what_the_model_finds_likeliest(scenes_dir):
    """At every token of them, their end included; the model is one that was trained."""
    policy = engine_of("assets/scenes_teacher", 1.0, scenes_dir, temperature=0.0, tokens=64)
    batch, count = policy.batch(policy.encoder.encode(list(range(8))), 1, 0)
    assert count == AnswerCounts(sampled=8)
    with torch.no_grad():
        logits = policy.engine.model.eval()(**batch.inputs).logits
    rows = batch.targets.predicts("response")
    assert torch.equal(logits[rows].argmax(-1), batch.targets.next_ids()[rows])
    assert int(rows.sum()) >= 16


def run(scenes_dir, model_dir, out, name, teacher=None, **stage):
    raw = tiny_recipe(
        scenes_dir, model_dir, out, name=name,
        teacher={"model": str(teacher or model_dir)},
        stage={"objectives": [{"kind": "jsd"}], "on_policy": {"max_new_tokens": 4}, **stage},
    )  # fmt: skip
    folder = pipeline.run(load_recipe(raw)) / "01-mimic"
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    return lines, load_file(folder / "student" / "model.safetensors")


def test_a_stage_on_policy_resumes_with_the_same_answers(
    scenes_dir, tiny_model_dir, tmp_path, monkeypatch
):
    import mmkd.training.stage

    whole, weights = run(scenes_dir, tiny_model_dir, tmp_path, "whole")
    assert whole[0]["jsd"] == pytest.approx(0, abs=1e-6)  # the teacher is the student
    assert sum(line["sampled"] for line in whole) > 0

    step = mmkd.training.stage.Stage.step

    def stops(self, number, batches):
        if number == 3:
            raise KeyboardInterrupt
        return step(self, number, batches)

    monkeypatch.setattr(mmkd.training.stage.Stage, "step", stops)
    with pytest.raises(KeyboardInterrupt):
        run(scenes_dir, tiny_model_dir, tmp_path, "killed", checkpoint={"interval": 1})
    monkeypatch.undo()
    lines, resumed = run(scenes_dir, tiny_model_dir, tmp_path, "killed", checkpoint={"interval": 1})
    assert [(x["loss"], x["sampled"]) for x in lines] == [(x["loss"], x["sampled"]) for x in whole]
    assert all(torch.equal(resumed[n], w) for n, w in weights.items())


@pytest.mark.parametrize(
    "objective",
    [
        {"kind": "ce"},
        {"kind": "preference"},
        {"kind": "enhanced", "gamma": 1.5},
        {"kind": "exits", "layers": [0], "loss": "ce"},
        {"kind": "exits", "layers": [0], "loss": {"kind": "enhanced", "gamma": 1.5}},
        {"kind": "embedding"},
    ],
)
def test_labels_have_no_place_on_policy(scenes_dir, tiny_model_dir, tmp_path, objective):
    with pytest.raises(RecipeError, match="responses are sampled from the student"):
        run(scenes_dir, tiny_model_dir, tmp_path, "ce", objectives=[objective])
    assert not (tmp_path / "ce").exists()


def test_every_sampled_token_is_distilled_and_carries_no_gradient(tiny_model_dir, scenes_dir):
    policy = engine_of(tiny_model_dir, 1.0, scenes_dir)
    batch, _ = policy.batch(policy.encoder.encode([0, 1]), 1, 0)
    assert not any(t.requires_grad for t in batch.inputs.values())
    objective = build_objective(DivergenceConfig(kind="reverse_kl"))
    assert int(objective.rows(batch.targets).sum()) == int(batch.targets.response.sum())
