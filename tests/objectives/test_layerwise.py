"""Layer-wise objectives against float64 twins, and teacher forcing on real models."""

import copy
import json

import pytest
import torch

from mmkd.errors import RecipeError
from mmkd.modeling.capture import capture
from mmkd.modeling.capture_request import LayerPlan
from mmkd.objectives import REGISTRY, LayerSignals, Layerwise, Signals, Targets, build_objective
from mmkd.objectives.divergence import DivergenceConfig
from mmkd.objectives.layerwise import (
    HiddenMseConfig,
    LayerL2Config,
    MatrixConfig,
    MixerMseConfig,
)
from mmkd.recipe import MambaConfig, load_recipe
from mmkd.runs import pipeline, preflight
from mmkd.students import convert
from mmkd_models.parts import find_parts
from tests.support import families
from tests.support.recipes import tiny_recipe

B, T, H, W, HEADS = 2, 6, 5, 8, 2
REAL = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0]]).bool()
RESPONSE = torch.tensor([[0, 0, 0, 1, 1, 0], [0, 0, 1, 1, 0, 0]]).bool()
TARGETS = Targets(torch.zeros(B, T).long(), REAL, RESPONSE, torch.zeros(B, T).bool())
CONFIGS = [
    MixerMseConfig(kind="mixer_mse"),
    MixerMseConfig(kind="mixer_mse", teacher_forced=False, region="response"),
    LayerL2Config(kind="layer_l2"),
    LayerL2Config(kind="layer_l2", at="mixer"),
    HiddenMseConfig(kind="hidden_mse"),
    HiddenMseConfig(kind="hidden_mse", normalize="token"),
    MatrixConfig(kind="matrix"),
]


def layer(seed):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()

    return LayerSignals(
        normal(B, T, H), normal(B, T, W), normal(B, T, H), normal(B, T, H), normal(B, T, H),
        normal(B, HEADS, T, T),
    )  # fmt: skip


def of(layers, forced=None):
    nothing = torch.zeros(B, T, H)
    forced = forced or {}
    return Signals(nothing, nothing[0], layers=layers, forced_mixers=forced, forced_blocks=forced)


def twin(config, student, teacher, b, t):
    """One token's distance, from its definition."""
    if config.kind == "mixer_mse":
        pairs = zip(student.mixer_heads[b, t], teacher.mixer_heads[b, t], strict=True)
        return sum((x - y) ** 2 for x, y in pairs) / W
    if config.kind == "hidden_mse":
        pairs = zip(student.block_output[b, t], teacher.block_output[b, t], strict=True)
        total = sum((x - y) ** 2 for x, y in pairs)
        if config.normalize == "token":
            return total / sum(y.detach() ** 2 for y in teacher.block_output[b, t])
        return total / H
    if config.kind == "matrix":
        rows = [student.matrix[b, h, t] - teacher.matrix[b, h, t] for h in range(HEADS)]
        return sum((r**2).sum() ** 0.5 for r in rows) / HEADS
    name = f"{config.at}_output"
    return ((getattr(student, name)[b, t] - getattr(teacher, name)[b, t]) ** 2).sum() ** 0.5


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_values_and_gradients_equal_a_float64_twin(config):
    free, forced = ({1: layer(s), 3: layer(s + 1)} for s in (0, 10))
    teacher = {0: layer(20), 2: layer(21)}
    config = config.model_copy(update={"layers": [1, 3], "teacher_layers": [0, 2]})
    objective = build_objective(config)
    count = 11.0
    got = objective(of(free, forced), of(teacher), TARGETS, count).loss
    mine = forced if config.teacher_forced else free
    rows = objective.rows(TARGETS)
    want = sum(
        twin(config, mine[s], teacher[t], b, i)
        for s, t in ((1, 0), (3, 2))
        for b in range(B)
        for i in range(T)
        if rows[b, i]
    ) / (2 * count)
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    leaves = [
        v for x in (free, forced) for s in x.values() for v in vars(s).values() if v is not None
    ]
    gradients = zip(
        torch.autograd.grad(got, leaves, allow_unused=True, retain_graph=True),
        torch.autograd.grad(want, leaves, allow_unused=True),
        strict=True,
    )
    used = 0
    for a, b in gradients:
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
            used += 1
    assert used == 2


def test_every_layerwise_kind_is_tested_here():
    kinds = {kind for kind, cls in REGISTRY.items() if issubclass(cls, Layerwise)}
    elsewhere = {"minilm", "mutual"}  # they have files of their own
    assert kinds == elsewhere | {c.kind for c in CONFIGS}


def test_equal_layers_are_at_zero_with_zero_gradient():
    same = {1: layer(3)}
    for config in CONFIGS:
        config = config.model_copy(update={"layers": [1]})
        loss = build_objective(config)(of(same, same), of({1: copy.deepcopy(same[1])}), TARGETS, 4)
        assert loss.loss.item() == 0
        grads = torch.autograd.grad(
            loss.loss, [v for v in vars(same[1]).values() if v is not None], allow_unused=True
        )
        assert all(g is None or bool((g == 0).all()) for g in grads)


SQUARE_HEAD = HiddenMseConfig(kind="hidden_mse", normalize="token", layers=[1])


def hidden_loss(student, teacher):
    """Of two residual streams, [B, T, H]."""
    mine, theirs = (LayerSignals(x, x, x, x, x) for x in (student, teacher))
    return build_objective(SQUARE_HEAD)(of({1: mine}), of({1: theirs}), TARGETS, 9.0).loss


def test_a_normalized_error_does_not_depend_on_a_common_scale():
    student, teacher = layer(0).block_output.detach(), layer(1).block_output.detach()
    loss = hidden_loss(student, teacher)
    for scale in (1e-2, 300.0):
        other = hidden_loss(scale * student, scale * teacher)
        assert other.item() == pytest.approx(loss.item(), rel=1e-3)


def test_a_token_of_large_norm_does_not_change_the_normalized_error_of_others():
    student, teacher = layer(0).block_output.detach(), layer(1).block_output.detach()
    gradients = []
    for scale in (1.0, 300.0):
        mine, theirs = student.clone(), teacher.clone()
        mine[0, 1], theirs[0, 1] = scale * mine[0, 1], scale * theirs[0, 1]
        mine.requires_grad_()
        gradients.append(torch.autograd.grad(hidden_loss(mine, theirs), mine)[0])
    others = torch.ones(B, T).bool()
    others[0, 1] = False
    torch.testing.assert_close(gradients[1][others], gradients[0][others], rtol=0, atol=0)
    assert hidden_loss(mine, theirs).item() == pytest.approx(
        hidden_loss(student, teacher).item(), rel=1e-5
    )


def test_a_token_of_zero_norm_has_a_finite_normalized_error():
    student = torch.zeros(B, T, H, requires_grad=True)
    loss = hidden_loss(student, torch.zeros(B, T, H))
    assert loss.item() == 0
    assert bool((torch.autograd.grad(loss, student)[0] == 0).all())


def models(name="llava", layers=(1, 3), **form):
    teacher = families.make(name)
    student = copy.deepcopy(teacher)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        convert(student, MambaConfig(kind="mamba", layers=list(layers), **form))
    return teacher, student


def run(teacher, student, objectives, batch, eager=False):
    plan = LayerPlan.of(objectives)
    if eager:
        teacher.set_attn_implementation("eager")
    with torch.no_grad():
        theirs = capture(teacher, batch, plan.teacher_request())
    return theirs, capture(student, batch, plan.student_request(theirs.layers))


@pytest.mark.parametrize("kind", ["mixer_mse", "layer_l2", "mixer", "matrix"])
@pytest.mark.parametrize("with_kl", [False, True])
def test_teacher_forced_layers_are_the_student_layers_on_the_teachers_input(kind, with_kl):
    """In one forward; with another objective beside it the student's free run is what it was."""
    teacher, student = models(init="inherit")
    batch = families.inputs("llava", [5, 9])
    config = {
        "mixer_mse": MixerMseConfig(kind="mixer_mse"),
        "layer_l2": LayerL2Config(kind="layer_l2"),
        "mixer": LayerL2Config(kind="layer_l2", at="mixer"),
        "matrix": MatrixConfig(kind="matrix"),
    }[kind]
    objectives = [build_objective(config, mamba_layers=[1, 3])]
    if with_kl:
        objectives.append(build_objective(DivergenceConfig(kind="kl")))
    theirs, mine = run(teacher, student, objectives, batch, eager=kind == "matrix")
    forced = mine.forced_blocks if kind == "layer_l2" else mine.forced_mixers
    assert set(forced) == {1, 3}
    assert not (mine.forced_mixers if kind == "layer_l2" else mine.forced_blocks)
    whole = capture(student, batch).hidden
    assert torch.equal(mine.hidden, whole) == with_kl
    if not with_kl and kind == "layer_l2":  # the stream stayed the teacher's
        torch.testing.assert_close(mine.hidden, theirs.hidden)
    layers = find_parts(student).decoder_layers
    kwargs: dict = {}
    handle = layers[1].register_forward_pre_hook(lambda m, a, k: kwargs.update(k), with_kwargs=True)
    capture(student, batch)
    handle.remove()
    for index in (1, 3):
        got, want = forced[index], theirs.layers[index]
        if kind == "layer_l2":
            assert torch.equal(got.block_input, want.block_input)
            alone = layers[index](want.block_input, **kwargs)
            torch.testing.assert_close(got.block_output, alone)
        else:
            assert torch.equal(got.mixer_input, want.mixer_input)
            position = kwargs["position_embeddings"]
            alone = layers[index].self_attn.mix(want.mixer_input, position)
            torch.testing.assert_close(got.mixer_heads, alone)
        if kind == "matrix":
            real = batch["attention_mask"].bool()
            assert got.matrix.shape == want.matrix.shape == (2, 4, 13, 13)
            sums = want.matrix.sum(-1).transpose(1, 2)[real]
            torch.testing.assert_close(sums, torch.ones_like(sums))
    targets = Targets(batch["input_ids"], batch["attention_mask"].bool(), RESPONSE, RESPONSE)
    loss = objectives[0](mine, theirs, targets, 10).loss
    loss.backward()
    trained = {n for n, p in student.named_parameters() if p.grad is not None and p.grad.any()}
    assert any("layers.1.self_attn.dt_bias" in n for n in trained)
    if kind != "layer_l2":  # nothing but the mixers: no error travels
        assert all("self_attn" in n for n in trained)


def test_a_layer_learns_the_same_whatever_the_other_layers_are():
    """So mmMamba's hybrid need not convert the layers that keep their attention."""
    teacher, linear = models(layers=(0, 1, 2, 3), init="mimic")
    _, hybrid = models(layers=(1, 3), init="mimic")
    kept = [find_parts(m).decoder_layers for m in (linear, hybrid)]
    for i in (1, 3):
        kept[1][i].load_state_dict(kept[0][i].state_dict())
    batch = families.inputs("llava", [5, 9])
    targets = Targets(batch["input_ids"], batch["attention_mask"].bool(), RESPONSE, RESPONSE)
    for student, layers in ((linear, [0, 1, 2, 3]), (hybrid, [1, 3])):
        objective = build_objective(MixerMseConfig(kind="mixer_mse"), mamba_layers=layers)
        theirs, mine = run(teacher, student, [objective], batch)
        (len(layers) * objective(mine, theirs, targets, 10).loss).backward()
    for i in (1, 3):
        pairs = zip(kept[0][i].named_parameters(), kept[1][i].parameters(), strict=True)
        for (name, p), q in pairs:
            assert (p.grad is None) == (q.grad is None), name
            if p.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_an_exact_student_is_at_no_distance_from_linear_attention_only():
    """Softmax attention and its linear twin differ, so that there is something to learn."""
    teacher, student = models(init="exact")
    batch = families.inputs("llava", [5, 9])
    objective = build_objective(MixerMseConfig(kind="mixer_mse"), mamba_layers=[1, 3])
    theirs, mine = run(teacher, student, [objective], batch)
    real = batch["attention_mask"].bool()
    assert (mine.forced_mixers[1].mixer_heads - theirs.layers[1].mixer_heads)[
        real
    ].abs().max() > 0.1


def test_pairs_of_layers_are_checked_before_anything_runs(scenes_dir, tiny_model_dir, tmp_path):
    def check(objective, teacher=None, convert=None, **student):
        raw = tiny_recipe(scenes_dir, tiny_model_dir, tmp_path, stage={"objectives": [objective]})
        raw["teacher"] = {"model": str(tiny_model_dir), **(teacher or {})}
        raw["student"] |= {"convert": convert or [{"kind": "mamba", "layers": [1]}], **student}
        preflight.check(load_recipe(raw))

    check({"kind": "mixer_mse"})
    eager = {"attn_implementation": "eager"}
    check({"kind": "matrix"}, teacher=eager)
    attends = {"kind": "matrix", "layers": [0, 1]}  # layer 0 has attention
    with pytest.raises(RecipeError, match=r"student\.attn_implementation to eager"):
        check(attends, teacher=eager)
    check(attends, teacher=eager, **eager)
    cut = [{"kind": "depth_pruning", "decoder": [1]}, {"kind": "mamba", "layers": [0]}]
    check({"kind": "layer_l2", "layers": [0], "teacher_layers": [1]}, convert=cut)
    for objective, message in (
        ({"kind": "matrix"}, "attn_implementation to eager"),
        ({"kind": "hidden_mse", "layers": [2]}, "cannot pair student layer 2"),
        ({"kind": "layer_l2", "layers": [1], "teacher_layers": [4]}, "teacher layer 4"),
        ({"kind": "layer_l2", "teacher_layers": [1]}, "'teacher_layers' needs 'layers'"),
    ):
        with pytest.raises(RecipeError, match=message) as caught:
            check(objective)
        assert "\n" not in str(caught.value)
    raw = tiny_recipe(
        scenes_dir,
        tiny_model_dir,
        tmp_path,
        teacher={"model": str(tiny_model_dir)},
        stage={"objectives": [{"kind": "layer_l2"}], "activation_checkpointing": True},
    )
    raw["student"]["convert"] = [{"kind": "mamba", "layers": [1]}]
    with pytest.raises(RecipeError, match="does not work with activation checkpointing"):
        preflight.check(load_recipe(raw))
    with pytest.raises(RecipeError, match="no Mamba layers to compare"):
        check({"kind": "mixer_mse"}, convert=[{"kind": "depth_pruning", "decoder": [0]}])


STAGES = [
    {"kind": "mixer_mse"},
    {"kind": "layer_l2"},
    {"kind": "layer_l2", "at": "mixer"},
    {"kind": "hidden_mse"},
    {"kind": "matrix"},
]


@pytest.mark.parametrize("objective", STAGES, ids=lambda o: "-".join(map(str, o.values())))
def test_a_stage_lowers_its_objective(objective, scenes_dir, tiny_model_dir, tmp_path):
    raw = tiny_recipe(
        scenes_dir,
        tiny_model_dir,
        tmp_path,
        teacher={"model": str(tiny_model_dir), "attn_implementation": "eager"},
        stage={
            "objectives": [objective],
            "train": ["mamba"],
            "steps": 12,
            "optimizer": {"lr": 1e-2},
            "schedule": {"kind": "constant", "warmup": 0.0},
            "checkpoint": {"interval": 5},
        },
    )
    raw["student"]["convert"] = [{"kind": "mamba", "layers": [0, 1]}]
    folder = pipeline.run(load_recipe(raw))
    lines = (folder / "01-mimic" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert max(losses[-3:]) < min(losses[:3])


@pytest.mark.parametrize("objectives", [["kl"], ["mixer_mse"], ["kl", "layer_l2"]])
def test_bfloat16_autocast_stays_close_to_float32(objectives, scenes_dir, tiny_model_dir, tmp_path):
    losses = []
    for precision in ("float32", "bfloat16"):
        raw = tiny_recipe(
            scenes_dir,
            tiny_model_dir,
            tmp_path,
            name=precision,
            teacher={"model": str(tiny_model_dir)},
            stage={
                "objectives": [{"kind": kind} for kind in objectives],
                "train": ["mamba"],
                "precision": precision,
            },
        )
        raw["student"]["convert"] = [{"kind": "mamba", "layers": [1], "init": "inherit"}]
        folder = pipeline.run(load_recipe(raw))
        lines = (folder / "01-mimic" / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)


def test_losses_of_layers_do_not_depend_on_the_batch_layout(scenes_dir, tiny_model_dir, tmp_path):
    losses = []
    for size, accumulate in ((8, 1), (2, 4)):
        raw = tiny_recipe(
            scenes_dir,
            tiny_model_dir,
            tmp_path,
            name=f"layout-{size}",
            teacher={"model": str(tiny_model_dir)},
            stage={
                "objectives": [
                    {"kind": "kl"},
                    {"kind": "layer_l2"},
                    {"kind": "hidden_mse", "normalize": "token"},
                ],
                "train": ["mamba"],
                "steps": 3,
                "batch": {"size": size, "accumulate": accumulate},
                "optimizer": {"kind": "sgd", "lr": 0.1},
            },
        )
        raw["student"]["convert"] = [{"kind": "mamba", "layers": [1], "init": "inherit"}]
        folder = pipeline.run(load_recipe(raw))
        lines = (folder / "01-mimic" / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line) for line in lines])
    for a, b in zip(*losses, strict=True):
        for key in ("loss", "kl", "layer_l2", "hidden_mse"):
            assert a[key] == pytest.approx(b[key], rel=1e-4), key
