"""Several layer-wise objectives: each reads the kind of run that it needs."""

import copy
import itertools
import json

import pytest
import torch

from mmkd.errors import RecipeError
from mmkd.modeling.capture import capture
from mmkd.modeling.capture_layers import Recorder
from mmkd.modeling.capture_request import CaptureRequest, LayerPlan
from mmkd.objectives import LayerSignals, Targets, build_objective, score
from mmkd.objectives.divergence import DivergenceConfig
from mmkd.objectives.layerwise import (
    HiddenMseConfig,
    LayerL2Config,
    MatrixConfig,
    MixerMseConfig,
)
from mmkd.objectives.minilm import MiniLmConfig
from mmkd.recipe import MambaConfig, load_recipe
from mmkd.runs import pipeline
from mmkd.students import convert
from mmkd_models.parts import find_parts
from tests.support import families
from tests.support.recipes import tiny_recipe

LAYERS = {"layers": [1, 3]}
FORCED = {
    "mixer_mse": MixerMseConfig(kind="mixer_mse", **LAYERS),
    "block": LayerL2Config(kind="layer_l2", name="block", layers=[1]),
    "mixer": LayerL2Config(kind="layer_l2", name="mixer", at="mixer", **LAYERS),
    "matrix": MatrixConfig(kind="matrix", layers=[3]),
}
FREE = {
    "hidden_mse": HiddenMseConfig(kind="hidden_mse", layers=[1, 2]),
    "heads": MixerMseConfig(kind="mixer_mse", name="heads", teacher_forced=False, **LAYERS),
    "free_matrix": MatrixConfig(
        kind="matrix", name="free_matrix", teacher_forced=False, layers=[1]
    ),
    "minilm": MiniLmConfig(kind="minilm", heads=2, **LAYERS),
    "kl": DivergenceConfig(kind="kl"),
}
KINDS = FORCED | FREE
COMBINATIONS = [
    *itertools.product(FORCED, FREE),
    *itertools.combinations(FORCED, 2),
    tuple(FORCED),
    tuple(KINDS),
]
SOME = [("block", "hidden_mse"), ("block", "mixer_mse"), ("matrix", "minilm"), tuple(KINDS)]


def pair(family):
    teacher = families.make(family)
    teacher.set_attn_implementation("eager")
    student = copy.deepcopy(teacher)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        chosen = [3] if family == "gemma3" else [1, 3]
        convert(student, MambaConfig(kind="mamba", layers=chosen, init="inherit"))
        for parameter in student.parameters():  # norms too, so that blocks and mixers differ
            parameter.data += 0.05 * torch.randn_like(parameter)
    return teacher, student


def losses(teacher, student, batch, kinds):
    """Each objective's value, and the gradient of their sum."""
    said = said_of(teacher, student, batch, [KINDS[k] for k in kinds])
    gradients = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
    return said, gradients


def said_of(teacher, student, batch, settings):
    """Each objective's value, for `count` 20; the student has the gradients of their sum."""
    objectives = [build_objective(s) for s in settings]
    plan = LayerPlan.of(objectives)
    with torch.no_grad():
        theirs = capture(teacher, batch, plan.teacher_request())
    mine = capture(student, batch, plan.student_request(theirs.layers))
    real = batch["attention_mask"].bool()
    targets = Targets(batch["input_ids"], real, real, batch["input_ids"] == families.IMAGE_TOKEN)
    total, said = score(objectives, mine, theirs, targets, {o.name: 20.0 for o in objectives})
    student.zero_grad()
    total.backward()
    return {o.name: said[o.name].item() for o in objectives}


@pytest.mark.parametrize(
    ("family", "combinations"),
    [("llava", COMBINATIONS), ("qwen3_vl", SOME), ("gemma3", SOME), ("mistral3", SOME)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_objectives_together_are_the_sum_of_each_alone(family, combinations):
    """In value and gradient, for forced runs of mixers and blocks and the free run."""
    teacher, student = pair(family)
    batch = families.inputs(family, [5, 9], side="right")
    alone = {kind: losses(teacher, student, batch, [kind]) for kind in KINDS}
    for kinds in combinations:
        values, gradients = losses(teacher, student, batch, kinds)
        for kind in kinds:
            want = alone[kind][0][kind]
            assert want > 1e-4
            assert values[kind] == pytest.approx(want, rel=1e-5), (kinds, kind)
        for name, got in gradients.items():
            parts = [alone[k][1][name] for k in kinds if name in alone[k][1]]
            torch.testing.assert_close(got, sum(parts), rtol=1e-3, atol=1e-5, msg=f"{kinds} {name}")


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3"])
def test_activation_checkpointing_changes_no_objective(family):
    """What is computed from a layer's tensors stays out of what is run again."""
    teacher, student = pair(family)
    batch = families.inputs(family, [5, 9], side="right")
    kinds = ["hidden_mse", "heads", "minilm", "kl"]
    student.train()
    want = losses(teacher, student, batch, kinds)
    student.activation_checkpointing_enable()
    got = losses(teacher, student, batch, kinds)
    assert got[0] == pytest.approx(want[0], rel=1e-6)
    assert got[1].keys() == want[1].keys()
    for name, gradient in got[1].items():
        torch.testing.assert_close(gradient, want[1][name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("batch", [{"size": 4}, {"size": 4, "pack": 400}, {"size": 2, "total": 8}])
def test_a_stage_says_of_each_objective_what_it_says_alone(
    batch, scenes_dir, tiny_model_dir, tmp_path
):
    forced, free = {"kind": "layer_l2"}, {"kind": "hidden_mse", "layers": [0, 1]}
    blocks_and_mixers = {"kind": "mixer_mse"}
    first = []
    for objectives in ([forced], [free], [blocks_and_mixers], [forced, free, blocks_and_mixers]):
        raw = tiny_recipe(
            scenes_dir,
            tiny_model_dir,
            tmp_path,
            name=f"run-{len(first)}",
            teacher={"model": str(tiny_model_dir)},
            stage={"objectives": objectives, "steps": 1, "batch": batch},
        )
        raw["student"]["convert"] = [{"kind": "mamba", "layers": [1], "init": "inherit"}]
        folder = pipeline.run(load_recipe(raw))
        lines = (folder / "01-mimic" / "metrics.jsonl").read_text().splitlines()
        first.append(json.loads(lines[0]))
    *alone, together = first
    for kind, line in zip(("layer_l2", "hidden_mse", "mixer_mse"), alone, strict=True):
        assert together[kind] == pytest.approx(line[kind], rel=1e-5)
        assert line[kind] > 0
    assert together["loss"] == pytest.approx(sum(line["loss"] for line in alone), rel=1e-5)


def test_only_the_layers_that_objectives_force_are_forced():
    objectives = [build_objective(KINDS[k]) for k in ("block", "mixer_mse", "hidden_mse")]
    plan = LayerPlan.of(objectives)
    assert plan.free
    assert plan.forced_blocks == {1}
    assert plan.forced_mixers == {1, 3}
    assert plan.recorded == {1, 2}
    assert not LayerPlan.of(objectives[:2]).free


def test_a_plan_asks_the_teacher_and_then_the_student():
    objectives = [build_objective(KINDS[k]) for k in ("block", "mixer_mse", "minilm")]
    plan = LayerPlan.of(objectives)
    assert not plan.matrices
    assert plan.teacher_request() == CaptureRequest(frozenset({1, 3}), projections=True)
    x = torch.zeros(1)
    theirs = {layer: LayerSignals(x, x, x) for layer in (1, 3)}
    request = plan.student_request(theirs)
    assert request.layers == {1, 3}
    assert request.projections
    assert not request.matrices
    assert request.free
    assert request.forced_blocks == {1: theirs[1]}
    assert request.forced_mixers == theirs
    without = plan.student_request({})  # the teacher did not run on this batch
    assert without == CaptureRequest(frozenset({1, 3}), projections=True)


def test_matrices_are_recorded_of_the_layers_that_are_compared_by_them():
    matrix = MatrixConfig(kind="matrix", layers=[3], teacher_layers=[2])
    hidden = HiddenMseConfig(kind="hidden_mse", layers=[0, 1])
    plan = LayerPlan.of([build_objective(matrix), build_objective(hidden)])
    assert plan.teacher_request() == CaptureRequest(frozenset({0, 1, 2}), matrices=frozenset({2}))
    request = plan.student_request({})
    assert request == CaptureRequest(frozenset({0, 1}), matrices=frozenset({3}))


def test_a_matrix_beside_a_free_objective_on_attention_layers_equals_a_float64_twin():
    """The student's attention layers keep no probabilities: nothing reads a matrix of them."""
    teacher, student = (model.double() for model in pair("llava"))
    student.set_attn_implementation("sdpa")
    batch = families.inputs("llava", [5, 9], side="right")
    batch["pixel_values"] = batch["pixel_values"].double()
    heads = {"kind": "mixer_mse", "name": "attention", "teacher_forced": False}
    settings = [
        MatrixConfig(kind="matrix", layers=[3]),
        HiddenMseConfig(kind="hidden_mse", layers=[0, 2]),
        MixerMseConfig(**heads, layers=[0, 2]),
    ]
    together = said_of(teacher, student, batch, settings)
    for config in settings:
        alone = said_of(teacher, student, batch, [config])
        name = config.metric_name
        assert together[name] == pytest.approx(alone[name], rel=1e-6)
    rows = batch["attention_mask"].nonzero().tolist()
    theirs, mine = probed(teacher, batch), probed(student, batch)
    mixer = find_parts(student).decoder_layers[3].self_attn
    matrix = mixer.matrix(theirs[3]["entering"], theirs[3]["position_embeddings"])
    distance = (matrix - theirs[3]["probabilities"]).square().sum(-1).sqrt()  # [B, heads, T]
    want = {"matrix": sum(distance[b, :, t].mean() for b, t in rows)}
    for name, kept in (("hidden_mse", "leaving"), ("attention", "heads")):
        want[name] = sum(
            (mine[layer][kept][b, t] - theirs[layer][kept][b, t]).square().mean() / 2
            for layer in (0, 2)
            for b, t in rows
        )
    for name, value in want.items():
        assert value > 1e-3
        assert together[name] == pytest.approx(value.item() / 20.0, rel=1e-5), name


def probed(model, batch):
    """What goes through the decoder layers of a plain forward, by layer."""
    found, handles = {}, []
    for index, layer in enumerate(find_parts(model).decoder_layers):
        seen = found.setdefault(index, {})

        def mixed(module, args, kwargs, output, seen=seen):
            seen["entering"] = kwargs["hidden_states"]
            seen["position_embeddings"] = kwargs["position_embeddings"]
            seen["probabilities"] = output[1]

        def projected(module, args, seen=seen):
            seen["heads"] = args[0]

        def left(module, args, output, seen=seen):
            seen["leaving"] = output[0] if isinstance(output, tuple) else output

        handles += [
            layer.self_attn.register_forward_hook(mixed, with_kwargs=True),
            layer.self_attn.o_proj.register_forward_pre_hook(projected),
            layer.register_forward_hook(left),
        ]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return found


def test_a_run_is_never_written_twice():
    recorder = Recorder(first={0: "free"})
    recorder.keep(0, mixer_input=torch.zeros(1))
    recorder.extra_run = "block"
    recorder.keep(0, mixer_input=torch.ones(1))
    recorder.extra_run = None
    assert recorder.found["free"][0]["mixer_input"].item() == 0
    assert recorder.found["block"][0]["mixer_input"].item() == 1
    recorder.keep(1, mixer_input=torch.ones(1))  # nobody asked for layer 1
    assert 1 not in recorder.found["free"]
    with pytest.raises(RecipeError, match="decoder layer 0 more than once"):
        recorder.keep(0, mixer_input=torch.ones(1))


def test_signals_keep_their_rows():
    x = torch.arange(6.0).view(3, 2, 1)
    layer = LayerSignals(x, x, x)
    assert layer.block_input is None
    assert layer.truncate(2).mixer_heads.shape == (2, 2, 1)
    assert layer.truncate(2).block_output is None
