"""Relations between tokens against float64 twins, in values and gradients."""

import json

import pytest
import torch

from mmkd.errors import RecipeError
from mmkd.objectives import LayerSignals, Signals, Targets, build_objective, visual_relation
from mmkd.objectives.relation import RelationConfig, logit_factor
from mmkd.ops import gram, gram_inner
from mmkd.recipe import load_recipe
from mmkd.runs import pipeline, preflight
from tests.support.recipes import tiny_recipe

B, T, DS, DT, V = 3, 9, 5, 7, 23
MASK = torch.tensor(
    [[0, 1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0, 1, 0]]
).bool()
WAYS = [
    {"center": c, "normalize": n, "diagonal": d}
    for c in (True, False)
    for n in (True, False)
    for d in (True, False)
]


def normal(*shape, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()


def twin_row(a, b, center, normalize, diagonal):
    """From the definition, with the whole matrices."""
    grams = []
    for y in (a, b):
        if center:
            y = y - y.mean(0)
        if normalize:
            y = y / y.norm(dim=1, keepdim=True)
        g = y @ y.T
        grams.append(g if diagonal else g - torch.diag(g.diag()))
    return 1 - (grams[0] * grams[1]).sum() / (grams[0].norm() * grams[1].norm())


@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("shape", [(30, 4, 6), (4, 30, 20), (1, 3, 3)])
@pytest.mark.parametrize("tile", [1, 25, 2**22])
def test_inner_products_of_grams(shape, tile, diagonal, monkeypatch):
    """By features and by tokens, in tiles of any size."""
    monkeypatch.setattr(gram, "TILE_ELEMENTS", tile)
    n, da, db = shape
    a, b = normal(n, da), normal(n, db, seed=1)
    whole = (a @ a.T) * (b @ b.T)
    want = whole.sum() if diagonal else whole.sum() - whole.diag().sum()
    got = gram_inner(a, b, diagonal=diagonal)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, (a, b)), torch.autograd.grad(want, (a, b)))
    own = gram_inner(a, a)  # the same tensor twice gets both gradients
    torch.testing.assert_close(
        torch.autograd.grad(own, a), torch.autograd.grad((a @ a.T).square().sum(), a)
    )


@pytest.mark.parametrize("how", WAYS, ids=lambda w: "-".join(k for k, v in w.items() if v))
def test_the_relation_equals_its_definition(how):
    student, teacher = normal(B, T, DS), normal(B, T, DT, seed=1)
    got = visual_relation(student, teacher, MASK, **how)
    want = sum(twin_row(student[i][MASK[i]], teacher[i][MASK[i]], **how) for i in (0, 2)) / 2
    torch.testing.assert_close(got, want)
    (mine,), (theirs,) = (torch.autograd.grad(x, student) for x in (got, want))
    torch.testing.assert_close(mine, theirs)
    assert bool((mine[~MASK] == 0).all())
    assert bool((mine[1] == 0).all())  # one token has no relations
    half = visual_relation(student.float(), teacher.float(), MASK, **how)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(want.item(), rel=1e-4)


def test_equal_relations_are_at_zero_whatever_the_basis():
    """A rotation and a scale of the features change no relation, a padded width neither."""
    features = normal(B, T, DS)
    rotation = torch.linalg.qr(normal(DT, DS, seed=2)).Q.detach()  # [DT, DS], orthonormal columns
    loss = visual_relation(features, 3 * features.detach() @ rotation.T, MASK)
    assert abs(loss.item()) < 1e-12
    assert torch.autograd.grad(loss, features)[0].abs().max() < 1e-12


def test_without_centring_a_shared_mean_hides_all_differences():
    """Why `center` is on: two independent sets of features."""
    g = torch.Generator().manual_seed(0)
    mask = torch.ones(1, 100).bool()
    a, b = (torch.randn(1, 100, 2000, generator=g) + 3 for _ in range(2))
    assert visual_relation(a, b, mask, center=False) < 1e-3
    assert visual_relation(a, b, mask, diagonal=False) > 0.5


def test_extremes_stay_finite():
    big = (1e15 * normal(1, 4, 6, dtype=torch.float32)).detach().requires_grad_()
    small = (1e-15 * normal(1, 4, 6, seed=1, dtype=torch.float32)).detach()
    loss = visual_relation(big, small, torch.ones(1, 4).bool())
    assert 0 <= loss.item() <= 2
    assert bool(torch.isfinite(torch.autograd.grad(loss, big)[0]).all())
    equal = torch.ones(1, 4, 6, requires_grad=True)  # no relations left after centring
    nothing = visual_relation(equal, small, torch.ones(1, 4).bool())
    assert bool(torch.isfinite(nothing))
    assert bool(torch.isfinite(torch.autograd.grad(nothing, equal)[0]).all())


def test_no_row_with_two_tokens_is_zero():
    student = normal(B, T, DS)
    loss = visual_relation(student, normal(B, T, DT), torch.zeros(B, T).bool())
    assert loss.item() == 0
    assert bool((torch.autograd.grad(loss, student)[0] == 0).all())


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="batch and tokens must agree"):
        visual_relation(normal(B, T, DS), normal(B, T + 1, DT), MASK)
    with pytest.raises(ValueError, match=r"must be \[n, D\]"):
        gram_inner(normal(3, 4), normal(4, 4))


def signals(width, seed, bias):
    hidden = normal(B, T, width, seed=seed)
    head = normal(V + seed, width, seed=seed + 10)
    return Signals(hidden, head, normal(V + seed, seed=seed + 20) if bias else None)


def targets():
    nothing = torch.zeros(B, T).bool()
    return Targets(torch.zeros(B, T).long(), torch.ones(B, T).bool(), nothing, MASK)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("center", [True, False])
def test_logits_are_related_without_being_built(bias, center):
    student, teacher = signals(DS, 0, bias), signals(DT, 1, bias)
    config = RelationConfig(kind="relation", center=center)
    objective = build_objective(config, shared_vocabulary=V)
    rows = objective.rows(targets())
    assert rows.sum().item() == 4 + 7
    count = 30.0
    got = objective(student, teacher, targets(), count).loss
    logits = []
    for s in (student, teacher):
        y = s.hidden @ s.head_weight[:V].T
        logits.append(y if s.head_bias is None else y + s.head_bias[:V])
    want = sum(
        int(MASK[i].sum()) * twin_row(logits[0][i][MASK[i]], logits[1][i][MASK[i]], center, 0, 1)
        for i in (0, 2)
    )
    leaves = (student.hidden, student.head_weight)
    torch.testing.assert_close(got.double(), want / count, rtol=1e-5, atol=1e-6)
    pairs = zip(
        torch.autograd.grad(got, leaves), torch.autograd.grad(want / count, leaves), strict=True
    )
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)


def test_the_factor_of_a_wide_head_reproduces_its_products():
    """Also where the head has less rows than columns, and no factor exists without help."""
    for rows in (40, 3):
        weight = normal(rows, 8)
        factor = logit_factor(weight)
        torch.testing.assert_close(factor @ factor.T, weight.T @ weight, rtol=1e-6, atol=1e-6)


def test_hidden_states_can_be_related_instead():
    student, teacher = signals(DS, 0, False), signals(DT, 1, False)
    objective = build_objective(RelationConfig(kind="relation", features="hidden"))
    loss = objective(student, teacher, targets(), 11.0).loss
    parts = [
        int(MASK[i].sum())
        * twin_row(student.hidden[i][MASK[i]], teacher.hidden[i][MASK[i]], True, False, True)
        for i in (0, 2)
    ]
    assert loss.item() == pytest.approx((sum(parts) / 11).item(), rel=1e-5)


def after_layers(widths, seed):
    """Signals with hidden states after layers, by layer, of these widths."""
    layers = {}
    for number, (layer, width) in enumerate(widths.items()):
        x = normal(B, T, width, seed=seed + number)
        layers[layer] = LayerSignals(x, x, x, x, x)
    return Signals(torch.zeros(B, T, 1), torch.zeros(1, 1), layers=layers)


@pytest.mark.parametrize("how", [{}, {"center": False}, {"normalize": True, "diagonal": False}])
def test_hidden_states_after_layers_can_be_related(how):
    """The mean over pairs of layers; widths differ, and the teacher's output is not read."""
    student, teacher = after_layers({1: 5, 2: 4}, 0), after_layers({0: 7, 3: 6}, 10)
    config = RelationConfig(
        kind="relation", features="hidden", layers=[1, 2], teacher_layers=[3, 0], **how
    )
    assert config.needs == {"teacher", "layers"}
    assert config.reads_hidden == ()
    objective = build_objective(config)
    assert objective.pairs == [(1, 3), (2, 0)]
    got = objective(student, teacher, targets(), 30.0).loss
    way = {"center": True, "normalize": False, "diagonal": True, **how}
    want = sum(
        int(MASK[i].sum())
        * twin_row(
            student.layers[s].block_output[i][MASK[i]],
            teacher.layers[t].block_output[i][MASK[i]],
            **way,
        )
        for s, t in ((1, 3), (2, 0))
        for i in (0, 2)
    ) / (2 * 30.0)
    torch.testing.assert_close(got, want)
    leaves = [student.layers[i].block_output for i in (1, 2)]
    for mine, theirs in zip(
        torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True
    ):
        torch.testing.assert_close(mine, theirs)
    same = build_objective(config.model_copy(update={"teacher_layers": None}))
    assert same(student, student, targets(), 30.0).loss.item() == pytest.approx(0, abs=1e-12)


def test_a_stage_relates_layers_of_a_teacher_that_stops_early(scenes_dir, tiny_model_dir, tmp_path):
    """In any layout, beside an objective that forces another layer."""
    lines = []
    for size, accumulate in ((8, 1), (2, 4)):
        raw = tiny_recipe(
            scenes_dir, tiny_model_dir, tmp_path, name=f"size-{size}",
            teacher={"model": str(tiny_model_dir)},
            student={"model": str(tiny_model_dir),
                     "convert": [{"kind": "mamba", "layers": [0]}]},
            stage={
                "objectives": [{"kind": "relation", "features": "hidden", "layers": [0]},
                               {"kind": "mixer_mse"}],
                "steps": 3, "batch": {"size": size, "accumulate": accumulate},
                "optimizer": {"kind": "sgd", "lr": 0.1},
            },
        )  # fmt: skip
        folder = pipeline.run(load_recipe(raw)) / "01-mimic"
        lines.append([json.loads(x) for x in (folder / "metrics.jsonl").open()])
    assert lines[0][0]["relation"] > 1e-4
    for whole, parts in zip(*lines, strict=True):
        for key in ("relation", "mixer_mse"):
            assert parts[key] == pytest.approx(whole[key], rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": [0]}, "'layers' have hidden states, no logits -- add 'features: hidden'"),
        ({"features": "hidden", "teacher_layers": [0]}, "'teacher_layers' needs 'layers'"),
        ({"features": "hidden", "layers": [2]}, "cannot pair student layer 2"),
    ],
)
def test_layers_that_cannot_be_related_are_refused(
    scenes_dir, tiny_model_dir, tmp_path, settings, message
):
    raw = tiny_recipe(
        scenes_dir, tiny_model_dir, tmp_path, teacher={"model": str(tiny_model_dir)},
        stage={"objectives": [{"kind": "relation", **settings}]},
    )  # fmt: skip
    with pytest.raises(RecipeError, match=message):
        preflight.check(load_recipe(raw))
