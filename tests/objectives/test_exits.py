"""Exits: the output head after decoder layers, in all families, and the objective on them."""

import copy

import pytest
import torch
import torch.nn.functional as F

from mmkd.errors import RecipeError
from mmkd.modeling.capture import capture
from mmkd.modeling.capture_request import CaptureRequest, LayerPlan
from mmkd.objectives import (
    Exit,
    ExitSignals,
    Signals,
    StoredSignals,
    Targets,
    build_objective,
    score,
)
from mmkd.objectives.divergence_settings import DivergenceConfig
from mmkd.objectives.exit_settings import ExitsConfig
from mmkd.ops import SparseRows
from mmkd.recipe import DepthPruningConfig, MambaConfig, MoeConfig, load_recipe
from mmkd.runs import preflight
from mmkd.students import convert
from mmkd.training.objective_modules import build_own
from mmkd_models.parts import find_parts
from tests.support import families
from tests.support.recipes import tiny_recipe

B, T, H, V = 2, 7, 5, 11
COUNT = 9.0
LOSSES = [
    "ce",
    "kl",
    {"kind": "enhanced", "gamma": 1.5},
    {"kind": "reverse_kl", "temperature": 2.0, "region": "all"},
    {"kind": "jsd", "region": "vision"},
]


def exits_of(model, objective):
    """The objective's own modules are made, and its exits are captured."""
    build_own([objective], model, None)
    places = objective.exits
    captured = {}

    def run(inputs):
        with torch.no_grad():
            captured.update(vars(capture(model, inputs, CaptureRequest(exits=tuple(places)))))
        return [captured["exits"][place] for place in places], captured["hidden"]

    return run


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("name", sorted(families.FAMILIES))
def test_an_exit_after_the_last_layer_is_the_output(name, own):
    model, inputs = families.make(name), families.inputs(name, [5, 9])
    config = ExitsConfig(kind="exits", layers=[3], norm="own" if own else "final")
    [last], hidden = exits_of(model, build_objective(config))(inputs)
    assert torch.equal(last.hidden, hidden)
    assert last.share == 1


@pytest.mark.parametrize("name", sorted(families.FAMILIES))
def test_an_exit_is_the_model_without_the_layers_after_it(name):
    model, inputs = families.make(name), families.inputs(name, [5, 9])
    config = ExitsConfig(kind="exits", layers=[1])
    [early], _ = exits_of(model, build_objective(config))(inputs)
    cut = copy.deepcopy(model)
    convert(cut, [DepthPruningConfig(kind="depth_pruning", decoder=[0, 1])])
    with torch.no_grad():
        want = capture(cut, inputs).hidden
    torch.testing.assert_close(early.hidden, want, rtol=0, atol=0)
    assert early.share == 0.5


@pytest.mark.parametrize("name", sorted(families.FAMILIES))
def test_a_fresh_block_is_the_next_layer(name):
    model, inputs = families.make(name), families.inputs(name, [5, 9])
    config = ExitsConfig(kind="exits", layers=[2], norm="own", block=True)
    [branch], hidden = exits_of(model, build_objective(config))(inputs)
    assert torch.equal(branch.hidden, hidden)


@pytest.mark.parametrize(
    "conversion",
    [
        MambaConfig(kind="mamba", layers=[1, 2], init="mimic"),
        MoeConfig(kind="moe", experts=4, top_k=2, layers="all"),
    ],
)
def test_exits_of_hybrid_and_sparse_students(conversion):
    model, inputs = families.make("llava"), families.inputs("llava", [5, 9], side="right")
    convert(model, [conversion])
    config = ExitsConfig(kind="exits", layers=[2], block=True)
    [branch], hidden = exits_of(model, build_objective(config))(inputs)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(branch.hidden[real], hidden[real])


def tensors(seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return normal


def targets():
    ids = torch.arange(B * T).reshape(B, T) % V
    attention = torch.ones(B, T).bool()
    response = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1]]).bool()
    vision = torch.tensor([[0, 1, 1, 0, 0, 0, 0]] * 2).bool()
    return Targets(ids, attention, response, vision)


def student(places, normal):
    exits = {p: ExitSignals(normal(B, T, H).requires_grad_(), (p.layer + 1) / 4) for p in places}
    return Signals(normal(B, T, H).requires_grad_(), normal(V, H).requires_grad_(), exits=exits)


@pytest.mark.parametrize("weighting", ["depth", "equal"])
@pytest.mark.parametrize("teacher", ["teacher", "self"])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss if isinstance(loss, str) else None)
def test_against_a_float64_twin(loss, teacher, weighting):
    """The loss of each exit is that of the objective alone, on the exit's hidden states."""
    if loss == "ce" and teacher == "self":
        teacher = "teacher"
    config = ExitsConfig(kind="exits", layers=[0, 2], loss=loss, teacher=teacher,
                         weighting=weighting)  # fmt: skip
    normal = tensors()
    mine = student([Exit(0), Exit(2)], normal)
    theirs = Signals(normal(B, T, H), normal(V, H))
    leaves = [mine.hidden, mine.head_weight, *(e.hidden for e in mine.exits.values())]
    got = build_objective(config)(mine, theirs, targets(), COUNT)
    found = torch.autograd.grad(got.loss, leaves, allow_unused=True)
    compared = Signals(mine.hidden.detach(), mine.head_weight.detach())
    compared = compared if teacher == "self" else theirs
    want = 0
    for place, share in ((Exit(0), 0.25), (Exit(2), 0.75)):
        logits = mine.exits[place].hidden @ mine.head_weight.T
        value = _plain(config.loss, logits, compared.hidden @ compared.head_weight.T) / COUNT
        assert got.metrics[f"layer_{place.layer}"].item() == pytest.approx(value.item(), rel=1e-9)
        want = want + value * (share if weighting == "depth" else 1)
    assert got.loss.item() == pytest.approx(want.item(), rel=1e-9)
    wanted = torch.autograd.grad(want, leaves, allow_unused=True)
    assert found[0] is None
    assert wanted[0] is None
    for a, b in zip(found[1:], wanted[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def _plain(loss, logits, theirs):
    """Sum of a loss over its rows, from logits [B, T, V] with autograd."""
    rows = targets().predicts(loss.region)
    temperature = getattr(loss, "temperature", 1.0)
    log_q = (logits / temperature).log_softmax(-1)[rows]
    log_p = (theirs / temperature).log_softmax(-1)[rows]
    gold = targets().next_ids()[rows]
    q, p = log_q.exp(), log_p.exp()
    if loss.kind == "ce":
        return F.nll_loss(log_q, gold, reduction="sum")
    if loss.kind == "kl":
        return (p * (log_p - log_q)).sum()
    if loss.kind == "reverse_kl":
        return (q * (log_q - log_p)).sum()
    if loss.kind == "jsd":
        m = ((p + q) / 2).log()
        return (p * (log_p - m)).sum() / 2 + (q * (log_q - m)).sum() / 2
    assert loss.kind == "enhanced"
    own = F.one_hot(gold, V).double()
    w = torch.where(own.bool(), (1 + p) ** loss.gamma - 1, p**loss.gamma)
    share = w.sum(-1, keepdim=True)
    return (w * ((w / share).log() - log_q)).sum()


def test_self_is_zero_after_the_last_layer_and_weights_add_up():
    model, inputs = families.make("llava"), families.inputs("llava", [5, 9])
    rows = targets_of(inputs)
    losses = {}
    for layers in ([1], [2], [3], [1, 2, 3]):
        objective = build_objective(ExitsConfig(kind="exits", layers=layers, teacher="self"))
        signals = capture(model, inputs, CaptureRequest(exits=tuple(objective.exits)))
        losses[tuple(layers)] = objective(signals, None, rows, 1.0).loss.item()
    assert losses[(3,)] == pytest.approx(0, abs=1e-6)
    assert losses[(1,)] > 1e-3
    assert losses[(1, 2, 3)] == pytest.approx(sum(losses[(i,)] for i in (1, 2, 3)), rel=1e-5)


def targets_of(inputs):
    real = inputs["attention_mask"].bool()
    return Targets(inputs["input_ids"], real, real, torch.zeros_like(real))


def test_a_cache_with_all_tokens_is_the_live_teacher():
    normal = tensors(3)
    mine = student([Exit(1)], normal)
    theirs = Signals(normal(B, T, H), normal(V, H))
    objective = build_objective(ExitsConfig(kind="exits", layers=[1]))
    live = objective(mine, theirs, targets(), COUNT).loss
    log_p = (theirs.hidden @ theirs.head_weight.T).log_softmax(-1).flatten(0, 1)
    ids = torch.arange(V).expand(B * T, V)
    rows = SparseRows(ids, log_p, torch.full((B * T,), -torch.inf), torch.arange(B * T))
    stored = objective(mine, StoredSignals(rows), targets(), COUNT).loss
    torch.testing.assert_close(stored, live)


def test_metrics_do_not_depend_on_which_teachers_a_batch_has():
    """Processes add metrics up by position."""
    normal = tensors(5)
    mine = student([Exit(1)], normal)
    theirs = Signals(normal(B, T, H), normal(V, H))
    exits = build_objective(ExitsConfig(kind="exits", layers=[1]))
    kl = build_objective(DivergenceConfig(kind="kl", acceptance=True))
    objectives = [o.for_teacher(name, 1.0, None) for o in (exits, kl) for name in "ab"]
    counts = {o.name: COUNT for o in objectives}
    both, one = (
        score(objectives, mine, dict.fromkeys(names, theirs), targets(), counts)[1]
        for names in ("ab", "b")
    )
    assert list(both) == list(one)
    assert one["exits.a/layer_1"] == 0 < one["exits.b/layer_1"]
    assert one["exits.b/layer_1"] == both["exits.b/layer_1"]


def test_gradients_do_not_depend_on_which_teachers_a_batch_has():
    """Processes exchange gradients of the same weights."""
    normal = tensors(5)
    theirs = Signals(normal(B, T, H), normal(V, H))
    exits = build_objective(ExitsConfig(kind="exits", layers=[1])).for_teacher("a", 1.0, None)
    for teachers in ({"a": theirs}, {}):
        mine = student([Exit(1)], normal)
        leaves = [mine.hidden, mine.head_weight, mine.exits[Exit(1)].hidden]
        loss, said = score([exits], mine, teachers, targets(), {exits.name: COUNT})
        loss.backward()
        assert all(leaf.grad is not None for leaf in leaves)
        assert torch.equal(leaves[0].grad, torch.zeros(B, T, H))
    assert loss == said[exits.name] == 0
    assert not any(leaf.grad.any() for leaf in leaves)


def test_modules_of_exits_run_in_the_order_of_the_objectives():
    """The same in all processes, which exchange weights and gradients when modules run."""
    model, inputs = families.make("llava"), families.inputs("llava", [5, 9])
    objectives = [
        build_objective(ExitsConfig(kind="exits", layers=[3, 0, 2, 1], norm="own", name=name))
        for name in "cab"
    ]
    build_own(objectives, model, None)
    request = LayerPlan.of(objectives).student_request({})
    ran = []
    for objective in objectives:
        for place in objective.exits:
            place.norm.register_forward_hook(lambda norm, *_: ran.append(norm))
    signals = capture(model, inputs, request)
    wanted = [place for o in objectives for place in o.exits]
    assert list(signals.exits) == wanted
    assert ran == [place.norm for place in wanted]


def test_copies_of_modules_have_no_hooks_of_the_model():
    model = families.make("llava")
    find_parts(model).decoder_layers[2].mlp.register_forward_pre_hook(lambda *_: None)
    objective = build_objective(ExitsConfig(kind="exits", layers=[1], block=True))
    build_own([objective], model, None)
    assert not any(m._forward_pre_hooks for m in objective.own.modules())


def test_a_block_with_a_state_is_refused_in_packed_rows(scenes_dir, tiny_model_dir, tmp_path):
    mamba = {"kind": "mamba", "layers": [1], "init": "mimic"}
    entry = {"kind": "exits", "layers": [0], "loss": "ce", "block": True}
    for pack in (None, 1024):
        stage = {"objectives": [entry], "batch": {"size": 4, "pack": pack}}
        student = {"model": str(tiny_model_dir), "convert": [mamba]}
        raw = tiny_recipe(scenes_dir, tiny_model_dir, tmp_path, student=student, stage=stage)
        if pack is None:
            preflight.check(load_recipe(raw))
            continue
        with pytest.raises(RecipeError, match="would run on from one record of a packed row"):
            preflight.check(load_recipe(raw))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"layers": [0, 0]}, "names a layer twice"),
        ({"layers": [0], "loss": "ce", "teacher": "self"}, "not for ce"),
        ({"layers": [0], "loss": {"kind": "kl", "weight": 2}}, "'loss' has no 'weight'"),
        ({"layers": [0], "loss": {"kind": "kl", "acceptance": True}}, "no 'acceptance'"),
        ({"layers": [0], "lr": 0.1}, "'lr' is for parameters of its own"),
        ({"layers": [9]}, "the student has no decoder layer 9, it has 2"),
        ({"layers": [0], "norm": "own", "name": "pop"}, "reserved for other modules"),
        ({"layers": [0], "norm": "own", "name": "training"}, "reserved for other modules"),
    ],
)
def test_what_cannot_be_is_refused(entry, message, scenes_dir, tiny_model_dir, tmp_path):
    teacher = {"model": str(tiny_model_dir)}
    stage = {"objectives": [{"kind": "exits", **entry}]}
    raw = tiny_recipe(scenes_dir, tiny_model_dir, tmp_path, teacher=teacher, stage=stage)
    with pytest.raises(RecipeError, match=message):
        preflight.check(load_recipe(raw))


def test_several_teachers_and_own_parameters_are_refused(scenes_dir, tiny_model_dir, tmp_path):
    teachers = [{"model": str(tiny_model_dir), "name": name} for name in "ab"]
    for norm in ("own", "final"):
        stage = {"objectives": [{"kind": "exits", "layers": [0], "norm": norm}]}
        raw = tiny_recipe(scenes_dir, tiny_model_dir, tmp_path, teacher=teachers, stage=stage)
        if norm == "final":
            preflight.check(load_recipe(raw))
            continue
        with pytest.raises(RecipeError, match="compares with one teacher"):
            preflight.check(load_recipe(raw))
