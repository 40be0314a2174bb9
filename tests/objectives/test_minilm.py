"""Self-relations and query-key relations of layers, against float64 twins and on real models."""

import copy
import importlib
import json
import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from mmkd.errors import RecipeError
from mmkd.modeling.capture import capture
from mmkd.modeling.capture_request import CaptureRequest, LayerPlan
from mmkd.modeling.layer_projections import attention_layers
from mmkd.objectives import LayerSignals, Signals, Targets, build_objective, minilm
from mmkd.objectives.minilm import MiniLmConfig
from mmkd.recipe import MambaConfig, load_recipe
from mmkd.runs import pipeline, preflight
from mmkd.students import convert
from tests.support import families
from tests.support.recipes import tiny_recipe
from tests.support.relating import TARGETS, B, T, losses_of_training, mask, normal


def layer(seed, queries, keys):
    x = normal(B, T, 4, seed=seed)
    widths = {"queries": queries, "keys": keys, "values": keys}
    made = {k: normal(B, T, w, seed=seed + i) for i, (k, w) in enumerate(widths.items())}
    return LayerSignals(x, x, x, x, x, **made)


def signals(layers):
    return Signals(torch.zeros(B, T, 1), torch.zeros(1, 1), layers=layers)


def relation_twin(student, teacher, rows, heads, causal=False):
    """By loops over rows, heads and tokens, for one kind."""
    sides = ((student, student), (teacher, teacher))
    return pairs_twin(*sides, rows, heads, heads, causal)


def pairs_twin(student, teacher, rows, heads, key_heads, causal):
    """The same for two tensors of each model; key heads are shared by groups of heads."""
    total = 0.0
    for b in range(B):
        seen = [t for t in range(T) if rows[b, t]]
        for a in range(heads):
            shared = a // (heads // key_heads)
            for t in seen:
                others = [u for u in seen if not causal or u <= t]
                p, q = (
                    torch.stack(
                        [head(x, a, heads)[b, t] @ head(y, shared, key_heads)[b, u] for u in others]
                    )
                    .div(math.sqrt(x.shape[2] // heads))
                    .softmax(0)
                    for x, y in (teacher, student)
                )
                total = total + (p * (p / q).log()).sum() / heads
    return total


def head(x, a, heads):
    width = x.shape[2] // heads
    return x[..., a * width : (a + 1) * width]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("region", ["all", "response", "vision"])
@pytest.mark.parametrize("tile", [1, 12, 2**22])
def test_relations_equal_their_twin(region, tile, causal, monkeypatch):
    """The student has other widths and, split its own way, other heads."""
    monkeypatch.setattr(minilm, "TILE_ELEMENTS", tile)
    student = {1: layer(0, 8, 4), 2: layer(10, 8, 4)}
    teacher = {0: layer(20, 12, 6), 3: layer(30, 12, 6)}
    config = MiniLmConfig(
        kind="minilm",
        layers=[1, 2],
        teacher_layers=[0, 3],
        heads=2,
        region=region,
        causal=causal,
    )
    objective = build_objective(config)
    got = objective(signals(student), signals(teacher), TARGETS, 9.0).loss
    rows = objective.rows(TARGETS)
    want = sum(
        relation_twin(getattr(student[s], kind), getattr(teacher[t], kind), rows, 2, causal)
        for s, t in ((1, 0), (2, 3))
        for kind in ("queries", "keys", "values")
    ) / (2 * 9.0)
    torch.testing.assert_close(got, want)
    leaves = [getattr(x, k) for x in student.values() for k in ("queries", "keys", "values")]
    grads = [torch.autograd.grad(x, leaves, retain_graph=True) for x in (got, want)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("tile", [1, 12, 2**22])
@pytest.mark.parametrize("region", ["all", "response"])
def test_query_key_relations_equal_their_twin(region, tile, monkeypatch):
    """Four heads of both models share two key heads; the heads have different widths."""
    monkeypatch.setattr(minilm, "TILE_ELEMENTS", tile)
    student, teacher = (replace(layer(s, q, q // 2), heads=4) for s, q in ((0, 8), (20, 12)))
    config = MiniLmConfig(kind="minilm", layers=[1], relations=["query_key"], region=region)
    objective = build_objective(config)
    got = objective(signals({1: student}), signals({1: teacher}), TARGETS, 9.0).loss
    sides = ((x.queries, x.keys) for x in (student, teacher))
    want = pairs_twin(*sides, objective.rows(TARGETS), 4, 2, True) / 9.0
    torch.testing.assert_close(got, want)
    leaves = [student.queries, student.keys]
    grads = [torch.autograd.grad(x, leaves, retain_graph=True) for x in (got, want)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
        assert bool(a.isfinite().all())
    same = objective(signals({1: student}), signals({1: student}), TARGETS, 9.0).loss
    assert same.item() == 0
    fewer = replace(student, heads=2)
    with pytest.raises(ValueError, match="2 heads of the student, 4 of the teacher"):
        objective(signals({1: fewer}), signals({1: teacher}), TARGETS, 9.0)


def test_query_key_relations_are_the_attention_of_a_model_without_rotation(monkeypatch):
    """Of the model's own code, with key heads for two query heads each."""
    modeling = importlib.import_module("transformers.models.llama.modeling_llama")
    monkeypatch.setattr(modeling, "apply_rotary_pos_emb", lambda q, k, *args, **kwargs: (q, k))
    model = families.make("llava")
    model.set_attn_implementation("eager")
    batch = families.inputs("llava", [5, 9], side="right")
    request = CaptureRequest(frozenset({1}), matrices=frozenset({1}), projections=True)
    with torch.no_grad():
        found = capture(model, batch, request).layers[1]
    assert found.heads == 4
    queries, keys = minilm._attention_heads(found)
    n = int(batch["attention_mask"][0].sum())
    relation = minilm._log_relation(
        *(x[0, :n].transpose(0, 1) for x in (queries, keys)), slice(0, n), True
    )
    torch.testing.assert_close(relation.exp(), found.matrix[0, :, :n, :n])


def test_equal_and_rotated_layers_are_at_zero():
    one = layer(0, 8, 4)
    rotation = torch.linalg.qr(normal(4, 4, seed=9).detach())[0]
    turned = copy.copy(one)
    for kind in ("queries", "keys", "values"):
        x = getattr(one, kind).detach().unflatten(2, (-1, 4)) @ rotation
        object.__setattr__(turned, kind, x.flatten(2))
    objective = build_objective(MiniLmConfig(kind="minilm", layers=[0], heads=1))
    heads = build_objective(
        MiniLmConfig(kind="minilm", layers=[0], heads=1, relations=["keys", "values"])
    )
    assert objective(signals({0: one}), signals({0: one}), TARGETS, 1.0).loss.item() == 0
    loss = heads(signals({0: one}), signals({0: turned}), TARGETS, 1.0).loss
    assert loss.item() == pytest.approx(0, abs=1e-12)


def test_what_a_model_projects_is_read(tmp_path):
    """An attention's q, k and v, and a mixer's, which began as the same."""
    teacher = families.make("llava")
    student = copy.deepcopy(teacher)
    convert(student, MambaConfig(kind="mamba", layers=[1], init="inherit"))
    batch = families.inputs("llava", [5, 9], side="right")
    objective = build_objective(MiniLmConfig(kind="minilm", layers=[0, 1], heads=2))
    plan = LayerPlan.of([objective])
    assert plan.projections
    request = plan.teacher_request()
    assert request == CaptureRequest(frozenset({0, 1}), projections=True)
    with torch.no_grad():
        found = [capture(m, batch, request) for m in (student, teacher)]
    targets = Targets(
        batch["input_ids"],
        batch["attention_mask"].bool(),
        batch["attention_mask"].bool(),
        torch.zeros_like(batch["input_ids"]).bool(),
    )
    one = build_objective(MiniLmConfig(kind="minilm", layers=[0], heads=2))
    assert one(*found, targets, 14.0).loss.item() == 0
    # layer 1's input is the same in both: what it projects too
    assert objective(*found, targets, 14.0).loss.item() == pytest.approx(0, abs=1e-10)
    attention = teacher.model.language_model.layers[0].self_attn
    want = attention.q_proj(found[1].layers[0].mixer_input)
    torch.testing.assert_close(found[1].layers[0].queries, want)
    with torch.no_grad():
        assert capture(teacher, batch, CaptureRequest(frozenset({0}))).layers[0].queries is None


def test_a_row_of_one_token_has_no_relations_and_does_not_count():
    config = MiniLmConfig(kind="minilm", layers=[0], heads=2, region="response")
    objective = build_objective(config)
    response = torch.zeros(B, T, dtype=torch.bool)
    response[0, 3:5] = response[1, 4] = True
    targets = Targets(TARGETS.input_ids, TARGETS.attention, response, mask("x"))
    assert objective.rows(targets).any(1).tolist() == [True, *[False] * (B - 1)]


def last(**settings):
    config = MiniLmConfig(kind="minilm", layers="last", **settings)
    return build_objective(config, attention_layers=[0, 2], teacher_attention_layers=[1, 3, 5])


def test_the_last_layers_with_attention_can_be_compared():
    assert last().pairs == [(2, 5)]
    assert last(teacher_layers=[3]).pairs == [(2, 3)]
    teacher = families.make("llava")
    assert attention_layers(teacher) == [0, 1, 2, 3]
    convert(teacher, MambaConfig(kind="mamba", layers=[1, 3], init="inherit"))
    assert attention_layers(teacher) == [0, 2]
    with pytest.raises(ValueError, match="built without attention layers"):
        build_objective(last().config)(signals({}), signals({}), TARGETS, 1.0)
    with pytest.raises(ValueError, match="'teacher_layers' needs 'layers'"):
        MiniLmConfig(kind="minilm", layers="last", teacher_layers=[1, 2])


@pytest.mark.parametrize("source", ["live", "self"])
def test_last_layers_train(source, scenes_dir, tiny_model_dir, tmp_path):
    """The values are those of the layers by their numbers. A pruned student has only one layer."""
    values = []
    own = source == "self"
    for number, layers in enumerate(
        ({"layers": "last"}, {"layers": [int(own)], "teacher_layers": [1]})
    ):
        cut = [] if own else [{"kind": "depth_pruning", "decoder": [0]}]
        raw = tiny_recipe(
            scenes_dir, tiny_model_dir, tmp_path, name=str(number),
            student={"model": str(tiny_model_dir), "convert": cut},
            teacher={"source": "self"} if own else {"model": str(tiny_model_dir)},
            stage={"objectives": [{"kind": "minilm", "heads": 4, **layers}], "steps": 2},
        )  # fmt: skip
        lines = (pipeline.run(load_recipe(raw)) / "01-mimic" / "metrics.jsonl").read_text()
        values.append([json.loads(line)["minilm"] for line in lines.splitlines()])
    assert own or sum(values[0]) > 0
    assert values[0] == values[1]


@pytest.mark.parametrize(
    "objective",
    [
        {"kind": "minilm", "layers": [1], "heads": 4},
        {"kind": "minilm", "layers": [1], "relations": ["query_key", "values"], "heads": 4,
         "causal": True},
    ],
    ids=["minilm", "minilm-query_key"],
)  # fmt: skip
def test_it_trains_a_student(scenes_dir, tiny_model_dir, tmp_path, objective):
    losses = losses_of_training(scenes_dir, tiny_model_dir, tmp_path, objective)
    assert losses[0] > losses[-1] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": [0], "heads": 5}, "5 relation heads do not divide the student's q_proj"),
        ({"layers": [9]}, "cannot pair student layer 9"),
        ({}, "layers: this key is missing"),
        ({"layers": [0], "teacher_forced": True}, "teacher_forced"),
        ({"layers": "first"}, "layers"),
    ],
)
def test_what_does_not_fit_is_refused(scenes_dir, tiny_model_dir, tmp_path, settings, message):
    stage = {"objectives": [{"kind": "minilm", **settings}]}
    raw = tiny_recipe(
        scenes_dir, tiny_model_dir, tmp_path / "runs", stage=stage,
        teacher={"model": str(tiny_model_dir)},
    )  # fmt: skip
    with pytest.raises(RecipeError, match=message):
        pipeline.run(load_recipe(raw))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("objective", "conversion", "message"),
    [
        ({"layers": "last"}, {"kind": "mamba", "layers": [0, 1]},
         "the student has no layer with attention for 'layers: last'"),
        ({"layers": [1], "relations": ["query_key"]}, None,
         "equal numbers of attention heads, and the student has 4, the teacher has 2"),
    ],
)  # fmt: skip
def test_models_that_do_not_fit_are_refused(
    scenes_dir, tiny_model_dir, tmp_path, objective, conversion, message
):
    config = AutoConfig.from_pretrained(tiny_model_dir)
    student = tiny_model_dir
    if conversion is None:
        text = config.text_config
        text.num_attention_heads, text.num_key_value_heads, text.head_dim = 4, 4, 8
        student = tmp_path / "student"
        AutoModelForImageTextToText.from_config(config).save_pretrained(student)
        AutoProcessor.from_pretrained(tiny_model_dir).save_pretrained(student)
    convert = [] if conversion is None else [conversion]
    raw = tiny_recipe(
        scenes_dir, tiny_model_dir, tmp_path / "runs",
        student={"model": str(student), "convert": convert},
        teacher={"model": str(tiny_model_dir)},
        stage={"objectives": [{"kind": "minilm", **objective}]},
    )  # fmt: skip
    with pytest.raises(RecipeError, match=message):
        preflight.check(load_recipe(raw))
