"""Sampled answers that the teacher corrects."""

import json

import pytest
import torch

from mmkd.data.encoder import Encoder
from mmkd.data.generation import end_tokens
from mmkd.data.records import Records
from mmkd.engines import TorchEngine
from mmkd.engines.root import Root
from mmkd.errors import RecipeError
from mmkd.modeling.loading import load_model, load_processor
from mmkd.objectives import build_objective
from mmkd.objectives.divergence import DivergenceConfig
from mmkd.recipe import DataConfig, ModelConfig, OnPolicyConfig, load_recipe
from mmkd.runs import pipeline
from mmkd.teachers import LiveTeacher, TeacherSet
from mmkd.training import correction, on_policy
from mmkd.training.correction import Corrector
from mmkd.training.on_policy import OnPolicy
from tests.support.recipes import tiny_recipe
from tests.support.tiny import write_tiny_model

CPU = torch.device("cpu")
TEACHER = "assets/scenes_teacher"
RECORDS = list(range(6))


def policy_of(folder, scenes_dir, teachers, *, sources=None, encoder=None, **settings):
    """An on-policy sampler of the student in `folder`.

    Args:
        teachers: folders by name, the primary one first.
        sources: by name of a teacher, the data sources on which it is used.
        encoder: further arguments of the encoder.
    """
    source = ModelConfig(model=str(folder))
    model = load_model(source)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    engine = TorchEngine(Root(model), optimizer, schedule, device=CPU)
    data = {"train": str(scenes_dir / "train.parquet")}
    if sources:
        data = {"sources": [{"name": n, "train": str(scenes_dir / f"{n}.parquet")}
                            for n in ("train", "validation")]}  # fmt: skip
    config = DataConfig(**data)
    encoder = Encoder(Records(config), load_processor(source), config, **(encoder or {}))
    members = {n: LiveTeacher(load_model(ModelConfig(model=str(f))), CPU)
               for n, f in teachers.items()}  # fmt: skip
    objective = build_objective(DivergenceConfig(kind="kl"))
    objectives = [objective]
    if len(members) > 1:
        objectives = [objective.for_teacher(n, 1.0, (sources or {}).get(n)) for n in members]
    settings = OnPolicyConfig(**{"lmbda": 1.0, "max_new_tokens": 8, "correct": 1, **settings})
    primary = next(iter(members))
    corrector = Corrector(settings, encoder, engine, TeacherSet(members, primary), objectives)
    return OnPolicy(settings, encoder, engine, 0, corrector=corrector)


@pytest.fixture
def answers(monkeypatch):
    """Answers before and after their correction, in a list."""
    found = []
    correct = Corrector.correct

    def keep(self, before, seeds):
        after = correct(self, before, seeds)
        found.append((before, after))
        return after

    monkeypatch.setattr(Corrector, "correct", keep)
    return found


def log_probs(model, encoder, prompt, said):
    """[tokens, V] float64, of one answer alone."""
    inputs = encoder.prompts([prompt])
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    ids = torch.cat([inputs["input_ids"], torch.tensor([said])], 1)
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        return model.double().eval()(**inputs).logits[0, -len(said) - 1 : -1].log_softmax(1)


def naive(policy, teacher, prompt, said):
    """Position and token of the correction of one answer, from whole logits in float64."""
    log_q = log_probs(policy.engine.model, policy.encoder, prompt, said)
    log_p = log_probs(teacher, policy.encoder.teacher or policy.encoder, prompt, said)
    divergence = (log_p.exp() * (log_p - log_q)).sum(1)
    ends = end_tokens(policy.encoder.processor)
    best = log_p.argmax(1).tolist()
    differing = [i for i, (a, b) in enumerate(zip(best, said, strict=True))
                 if a != b and not (a in ends and b in ends)]  # fmt: skip
    if not differing:
        return None
    at = max(differing, key=lambda i: float(divergence[i]))
    return at, best[at]


@pytest.mark.parametrize("prefix", ["", "There is a red book. "])
def test_the_worst_token_becomes_the_teachers(tiny_model_dir, scenes_dir, answers, prefix):
    """Also of a teacher whose processor has a longer chat template."""
    theirs = load_processor(ModelConfig(model=TEACHER))
    theirs.chat_template = prefix + theirs.chat_template
    settings = {"encoder": {"teacher_processor": theirs}}
    policy = policy_of(tiny_model_dir, scenes_dir, {"a": TEACHER}, **settings)
    assert (policy.encoder.teacher is None) == (prefix == "")
    state = torch.get_rng_state()
    made, count = policy.batch(policy.encoder.encode(RECORDS), 1, 0)
    assert torch.equal(torch.get_rng_state(), state)
    ((before, after),) = answers
    teacher = policy.corrector.teachers.members["a"].model
    places = []
    for prompt, old, new, replaced in zip(
        before.prompts, before.answers, after.answers, after.replaced, strict=True
    ):
        change = naive(policy, teacher, prompt, old.tokens)
        assert replaced == (() if change is None else (change[0],))
        if change is None:
            assert new == old
            continue
        at, token = change
        assert new.tokens[: at + 1] == (*old.tokens[:at], token)
        assert len(new.tokens) <= 8
        assert new.finished or len(new.tokens) == 8
        places.append(at)
    assert len(places) >= 4
    assert len(set(places)) > 1
    assert (count.sampled, count.corrected) == (len(RECORDS), len(places))
    assert (count.replaced, count.positions) == (len(places), sum(places))
    assert not any(t.requires_grad for t in made.inputs.values())
    texts = [a.text for a in after.answers]
    response = [made.targets.input_ids[i][made.targets.response[i]] for i in RECORDS]
    decode = policy.encoder.processor.tokenizer.decode
    assert all(t in decode(ids) for t, ids in zip(texts, response, strict=True))


def test_a_greedy_student_that_is_its_teacher_is_not_corrected(tiny_model_dir, scenes_dir):
    settings = {"temperature": 0, "correct": 3}
    policy = policy_of(tiny_model_dir, scenes_dir, {"a": tiny_model_dir}, **settings)
    batch = policy.encoder.encode(RECORDS)
    made, count = policy.batch(batch, 1, 0)
    assert (count.sampled, count.corrected, count.replaced) == (len(RECORDS), 0, 0)
    plain = OnPolicy(policy.config.model_copy(update={"correct": 0}), policy.encoder,
                     policy.engine, 0)  # fmt: skip
    assert torch.equal(made.targets.input_ids, plain.batch(batch, 1, 0)[0].targets.input_ids)


def test_a_student_is_corrected_until_it_says_what_its_teacher_says(
    tiny_model_dir, scenes_dir, answers
):
    """Each round corrects the answers of the round before."""
    settings = {"temperature": 0, "max_new_tokens": 3, "correct": 12}
    policy = policy_of(tiny_model_dir, scenes_dir, {"a": TEACHER}, **settings)
    _, count = policy.batch(policy.encoder.encode(RECORDS[:2]), 1, 0)
    assert count.replaced > count.corrected > 0
    ((_, after),) = answers
    teacher = policy.corrector.teachers.members["a"].model
    for prompt, answer, replaced in zip(after.prompts, after.answers, after.replaced, strict=True):
        assert len(replaced) < 12
        assert naive(policy, teacher, prompt, answer.tokens) is None


def test_draws_are_a_function_of_the_place(tiny_model_dir, scenes_dir):
    policy = policy_of(tiny_model_dir, scenes_dir, {"a": TEACHER}, lmbda=0.5, correct=2)
    batch = policy.encoder.encode(RECORDS)
    made, count = policy.batch(batch, 2, 1)
    again, same = policy.batch(batch, 2, 1)
    assert torch.equal(made.targets.input_ids, again.targets.input_ids)
    assert count == same
    other, _ = policy.batch(batch, 3, 1)
    a, b = made.targets.input_ids, other.targets.input_ids
    assert a.shape != b.shape or not torch.equal(a, b)


def test_tokens_of_images_and_unknown_ones_are_neither_read_nor_written(
    tiny_model_dir, scenes_dir, monkeypatch
):
    """A random student may sample an image token, and a random teacher may prefer one."""
    policy = policy_of(tiny_model_dir, scenes_dir, {"a": TEACHER})
    image = policy.encoder.processing.image_token_id
    sample = on_policy.sample_answers
    row_kl = correction.row_kl
    seen = []

    def with_image(*args, **options):
        found = sample(*args, **options)
        return [type(a)(a.text, a.finished, (image, *a.tokens)) for a in found]

    def likes_images(student, *args, **options):
        divergence, best = row_kl(student, *args, **options)
        seen.append(len(best))
        return divergence, torch.full_like(best, image)

    monkeypatch.setattr(on_policy, "sample_answers", with_image)
    _, count = policy.batch(policy.encoder.encode(RECORDS), 1, 0)
    assert count.corrected >= 4
    monkeypatch.setattr(correction, "row_kl", likes_images)
    _, count = policy.batch(policy.encoder.encode(RECORDS), 1, 0)
    assert seen
    assert count.corrected == 0


def test_only_tokens_that_max_length_keeps_are_corrected(tiny_model_dir, scenes_dir, answers):
    policy = policy_of(tiny_model_dir, scenes_dir, {"a": TEACHER}, max_new_tokens=12)
    prompts = max(policy.encoder.length(i) for i in RECORDS)
    policy.encoder.config.max_length = prompts
    policy.batch(policy.encoder.encode(RECORDS), 1, 0)
    ((_, after),) = answers
    room = [prompts - int(n) for n in after.inputs["attention_mask"].sum(1)]
    assert all(at < left for r, left in zip(after.replaced, room, strict=True) for at in r)
    assert any(after.replaced)


def test_packed_rows_are_corrected_like_others(tiny_model_dir, scenes_dir):
    texts = []
    for settings in ({}, {"pack": 2048}):
        policy = policy_of(tiny_model_dir, scenes_dir, {"a": TEACHER}, encoder=settings)
        made, count = policy.batch(policy.encoder.encode(RECORDS), 1, 0)
        ids = made.targets.input_ids[made.targets.response]
        texts.append((count, sorted(ids.tolist())))
    assert texts[0] == texts[1]


def test_the_teacher_of_a_records_source_corrects_it(tiny_model_dir, scenes_dir, tmp_path, answers):
    """With several teachers on one source the first corrects; without any the answer stays."""
    other = tmp_path / "other"
    write_tiny_model(tiny_model_dir, other)
    model = load_model(ModelConfig(model=str(other)))
    with torch.no_grad():
        model.get_output_embeddings().weight.neg_()
    model.save_pretrained(other)
    folders = {"a": TEACHER, "b": other}

    def corrected(teachers, sources):
        policy = policy_of(tiny_model_dir, scenes_dir, teachers, sources=sources)
        records = policy.encoder.records
        of = {s: [i for i in range(len(records)) if records.source_of(i) == s][:3] for s in (0, 1)}
        policy.batch(policy.encoder.encode([*of[0], *of[1]]), 1, 0)
        return answers[-1][1].replaced, answers[-1][1].answers

    one, two = ({"only": folders[n]} for n in ("a", "b"))
    by_a, by_b = (corrected(one, {"only": None}), corrected(two, {"only": None}))
    assert by_a[0] != by_b[0]
    split = corrected(folders, {"a": frozenset({0}), "b": frozenset({1})})
    assert split[0] == [*by_a[0][:3], *by_b[0][3:]]
    first = corrected(folders, {"a": frozenset({0, 1}), "b": None})
    assert first == by_a
    rest = corrected(folders, {"a": frozenset({1}), "b": frozenset({1})})
    assert rest[0] == [(), (), (), *by_a[0][3:]]


def run(scenes_dir, model_dir, out, name, *, teacher=None, correct=1, **stage):
    raw = tiny_recipe(
        scenes_dir, model_dir, out, name=name, teacher=teacher or {"model": TEACHER},
        stage={
            "objectives": [{"kind": "jsd"}],
            "on_policy": {"max_new_tokens": 4, "correct": correct},
            **stage,
        },
    )  # fmt: skip
    folder = pipeline.run(load_recipe(raw)) / "01-mimic"
    return [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_corrected_stage_resumes_with_the_same_answers(
    scenes_dir, tiny_model_dir, tmp_path, monkeypatch
):
    import mmkd.training.stage

    whole = run(scenes_dir, tiny_model_dir, tmp_path, "whole")
    assert all(0 < line["corrected"] <= 1 for line in whole if line["sampled"])
    assert all(0 <= line["corrected_at"] < 4 for line in whole if line["corrected"])
    step = mmkd.training.stage.Stage.step

    def stops(self, number, batches):
        if number == 3:
            raise KeyboardInterrupt
        return step(self, number, batches)

    monkeypatch.setattr(mmkd.training.stage.Stage, "step", stops)
    with pytest.raises(KeyboardInterrupt):
        run(scenes_dir, tiny_model_dir, tmp_path, "killed", checkpoint={"interval": 1})
    monkeypatch.undo()
    lines = run(scenes_dir, tiny_model_dir, tmp_path, "killed", checkpoint={"interval": 1})
    keys = ("loss", "sampled", "corrected", "corrected_at")
    assert [[x.get(k) for k in keys] for x in lines] == [[x.get(k) for k in keys] for x in whole]


def test_a_student_with_adapters_can_be_corrected_by_itself(scenes_dir, tiny_model_dir, tmp_path):
    """Its teacher is the student without its adapters, which do nothing in the first step."""
    lines = run(
        scenes_dir, tiny_model_dir, tmp_path, "own", teacher={"source": "self"},
        train={"lora": {"rank": 2}},
        on_policy={"lmbda": 1.0, "max_new_tokens": 4, "correct": 1, "temperature": 0},
    )  # fmt: skip
    assert lines[0]["corrected"] == 0
    assert lines[0]["sampled"] == 4


def test_corrections_are_logged_only_where_they_are_made(scenes_dir, tiny_model_dir, tmp_path):
    lines = run(scenes_dir, tiny_model_dir, tmp_path, "plain", correct=0, steps=1)
    assert not {"corrected", "corrected_at"} & lines[0].keys()


@pytest.mark.parametrize("kind", ["hidden_mse", "layer_l2"])
def test_some_objective_must_read_distributions(scenes_dir, tiny_model_dir, tmp_path, kind):
    with pytest.raises(RecipeError, match="no objective reads the teacher's distribution"):
        run(
            scenes_dir, tiny_model_dir, tmp_path, "none", teacher={"model": str(tiny_model_dir)},
            objectives=[{"kind": kind, "layers": [0]}],
        )  # fmt: skip
    assert not (tmp_path / "none").exists()


def test_no_answer_is_corrected_where_none_is_sampled():
    with pytest.raises(ValueError, match="set 'lmbda' above 0"):
        OnPolicyConfig(lmbda=0, correct=1)
