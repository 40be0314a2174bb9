"""Self-relations of layers and image-text affinities, against float64 twins and on real models."""

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
from mmkd.objectives.affinity import AffinityConfig
from mmkd.objectives.minilm import MiniLmConfig
from mmkd.recipe import MambaConfig, load_recipe
from mmkd.runs import pipeline, preflight
from mmkd.students import convert
from tests.support import families
from tests.support.recipes import tiny_recipe

B, T = 3, 7
LAYOUT = ["vvpprr.", "vpprrrr", "pprrr.."]


def mask(letters):
    return torch.tensor([[c in letters for c in row] for row in LAYOUT])


TARGETS = Targets(torch.zeros(B, T, dtype=torch.long), mask("vpr"), mask("r"), mask("v"))


def normal(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()


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


def affinity_twin(student, teacher, center, temperatures):
    """Rows 0 and 1 have images."""
    tables = []
    for hidden, temperature in zip((student, teacher), temperatures, strict=True):
        pictures, answers = [], []
        for b in (0, 1):
            said = [t - 1 for t in range(T) if LAYOUT[b][t] == "r"]
            pictures.append(hidden[b, [t for t in range(T) if LAYOUT[b][t] == "v"]].mean(0))
            answers.append(hidden[b, said].mean(0))
        for group in (pictures, answers):
            mean = sum(group) / 2 * center
            group[:] = [(x - mean) / (x - mean).norm() for x in group]
        tables.append(
            torch.stack([torch.stack([i @ t / temperature for t in answers]) for i in pictures])
        )
    mine, theirs = tables
    total = 0.0
    for k in (0, 1):
        for m, t in ((mine[k], theirs[k]), (mine[:, k], theirs[:, k])):
            p, q = t.softmax(0), m.softmax(0)
            total = total + (p * (p / q).log()).sum()
    return total / 2


@pytest.mark.parametrize("theirs", [None, 0.2])
@pytest.mark.parametrize("center", [True, False])
def test_affinities_equal_their_twin(center, theirs):
    student, teacher = normal(B, T, 5), normal(B, T, 8, seed=1)
    config = AffinityConfig(
        kind="affinity", temperature=0.5, teacher_temperature=theirs, center=center
    )
    objective = build_objective(config)
    assert objective.rows(TARGETS).nonzero().tolist() == [[0, 3], [1, 2]]
    head = torch.zeros(1, 1)
    got = objective(Signals(student, head), Signals(teacher, head), TARGETS, 2.0).loss
    want = affinity_twin(student, teacher.detach(), center, (0.5, theirs or 0.5))
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(x, student)[0] for x in (got, want)]
    torch.testing.assert_close(*grads)
    same = objective(Signals(student, head), Signals(student, head), TARGETS, 2.0).loss
    if theirs is None:
        assert same.item() == pytest.approx(0, abs=1e-12)
    else:
        assert same.item() > 1e-3


def test_a_batch_without_pictures_has_no_affinity():
    text = Targets(TARGETS.input_ids, TARGETS.attention, TARGETS.response, mask("x"))
    student = normal(B, T, 5)
    objective = build_objective(AffinityConfig(kind="affinity"))
    loss = objective(*[Signals(student, torch.zeros(1, 1))] * 2, text, 1.0).loss
    assert loss.item() == 0
    loss.backward()


@pytest.mark.parametrize("center", [True, False])
def test_a_sample_alone_has_nothing_to_tell_apart_and_does_not_count(center):
    objective = build_objective(AffinityConfig(kind="affinity", center=center))
    alone = Targets(
        TARGETS.input_ids[:1], TARGETS.attention[:1], TARGETS.response[:1], TARGETS.vision[:1]
    )
    assert objective.rows(TARGETS).sum() == 2
    assert objective.rows(alone).sum() == 0
    signals = [Signals(normal(1, T, 5, seed=s), torch.zeros(1, 1)) for s in (0, 1)]
    loss = objective(*signals, alone, 2.0).loss
    assert loss.item() == 0
    loss.backward()
    # a micro-batch with one image among texts is no other case
    vision = TARGETS.vision.clone()
    vision[1:] = False
    mixed = Targets(TARGETS.input_ids, TARGETS.attention, TARGETS.response, vision)
    assert objective.rows(mixed).sum() == 0


def affinity_means(scenes_dir, model, tmp_path, batch):
    """The objective's value in the first step, and whether the recipe is refused."""
    raw = tiny_recipe(
        scenes_dir, model, tmp_path, name="-".join(map(str, batch.values())),
        teacher={"model": str(model)},
        student={"model": str(model), "convert": [{"kind": "width_pruning", "decoder": 16}]},
        stage={"objectives": [{"kind": "affinity"}], "batch": batch, "steps": 1},
    )  # fmt: skip
    lines = (pipeline.run(load_recipe(raw)) / "01-mimic" / "metrics.jsonl").read_text()
    return json.loads(lines.splitlines()[0])["affinity"]


def test_micro_batches_without_contrast_are_left_out_of_the_mean(
    scenes_dir, tiny_model_dir, tmp_path, monkeypatch
):
    """With a third micro-batch of one record the step's value is that of the two others."""
    stream = importlib.import_module("mmkd.data.stream")

    def cut(sizes):
        def by_size(records, size):
            ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
            return [list(records[e - n : e]) for e, n in zip(ends, sizes, strict=True)]

        return by_size

    values = []
    for number, sizes in enumerate(([3, 3], [3, 3, 1])):
        monkeypatch.setattr(stream, "by_size", cut(sizes))
        batch = {"size": 3, "accumulate": 3 - (number == 0), "group_by_length": False}
        values.append(affinity_means(scenes_dir, tiny_model_dir, tmp_path, batch))
    assert values[0] > 0
    assert values[1] == pytest.approx(values[0], rel=1e-5)


@pytest.mark.parametrize(
    "batch", [{"size": 1}, {"size": 1, "accumulate": 8}, {"size": 1, "total": 4},
              {"tokens": 4096, "total": 1}],
)  # fmt: skip
def test_a_layout_without_contrast_is_refused(scenes_dir, tiny_model_dir, tmp_path, batch):
    with pytest.raises(RecipeError, match="objective affinity: it compares the records"):
        affinity_means(scenes_dir, tiny_model_dir, tmp_path, batch)


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
        {"kind": "affinity"},
    ],
    ids=["minilm", "minilm-query_key", "affinity"],
)  # fmt: skip
def test_both_train_a_student(scenes_dir, tiny_model_dir, tmp_path, objective):
    # every step sees all records
    stage = {"objectives": [objective], "batch": {"size": 64}, "steps": 5}
    student = {"model": str(tiny_model_dir),
               "convert": [{"kind": "width_pruning", "decoder": 16},
                           {"kind": "mamba", "layers": [1], "init": "mimic"}]}  # fmt: skip
    raw = tiny_recipe(
        scenes_dir, tiny_model_dir, tmp_path, student=student,
        teacher={"model": str(tiny_model_dir)}, stage=stage,
    )  # fmt: skip
    folder = pipeline.run(load_recipe(raw)) / "01-mimic"
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["loss"] > lines[-1]["loss"] > 0


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
