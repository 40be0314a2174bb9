"""Preference distillation: losses by hand, references live and stored."""

import json
import math
from contextlib import nullcontext

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from mmkd.data.encoder import Encoder
from mmkd.data.records import Records
from mmkd.errors import RecipeError
from mmkd.objectives import Signals, Targets, answer_logps, build_objective, preference_loss
from mmkd.objectives.language_modeling import CrossEntropyConfig
from mmkd.objectives.preference import PreferenceConfig
from mmkd.ops import token_logps
from mmkd.recipe import DataConfig, load_recipe
from mmkd.runs import pipeline
from tests.support.recipes import tiny_recipe

KINDS = ("kto_pair", "sigmoid", "ipo", "hinge", "margin_mse")


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def twin(kind, pairs, beta, smoothing=0.0):
    """Pairs of (policy chosen, policy rejected, reference chosen, reference rejected)."""
    chosen = [pc - rc for pc, _, rc, _ in pairs]
    rejected = [pr - rr for _, pr, _, rr in pairs]
    n = len(pairs)
    z_chosen, z_rejected = (max(0.0, sum(r.item() for r in rs) / n) for rs in (chosen, rejected))
    terms = []
    for c, r in zip(chosen, rejected, strict=True):
        if kind == "kto_pair":
            terms.append(1 - 1 / (1 + torch.exp(-beta * (c - z_rejected))))
            terms.append(1 - 1 / (1 + torch.exp(-beta * (z_chosen - r))))
        elif kind == "sigmoid":
            right, wrong = (1 / (1 + torch.exp(-s * beta * (c - r))) for s in (1, -1))
            terms.append(-(1 - smoothing) * right.log() - smoothing * wrong.log())
        elif kind == "ipo":
            terms.append((c - r - 1 / (2 * beta)) ** 2)
        elif kind == "margin_mse":
            terms.append((c - r) ** 2)
        else:
            terms.append(torch.clamp(1 - beta * (c - r), min=0))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_losses_equal_their_twins_with_gradients(kind, beta):
    g = torch.Generator().manual_seed(0)
    values = [3 * torch.randn(7, generator=g, dtype=torch.float64) - 5 for _ in range(4)]
    for v in values:
        v.requires_grad_()
    got = preference_loss(*values, kind=kind, beta=beta)
    want = twin(kind, list(zip(*values[:2], *(v.detach() for v in values[2:]), strict=True)), beta)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(x, values[:2], retain_graph=True) for x in (got, want)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert torch.autograd.grad(got, values[2], allow_unused=True) == (None,)


def pair(*values):
    return [torch.tensor([v], dtype=torch.float64) for v in values]


def test_losses_of_one_pair_by_hand():
    """r_c = 2, r_r = -1, beta 0.5."""
    one = pair(-3.0, -7.0, -5.0, -6.0)
    losses = {k: float(preference_loss(*one, kind=k, beta=0.5)) for k in KINDS}
    # z_c = 2, z_r = max(0, -1) = 0
    want = 0.5 * (1 - sigmoid(0.5 * 2)) + 0.5 * (1 - sigmoid(0.5 * 3))
    assert losses["kto_pair"] == pytest.approx(want, rel=1e-12)
    assert losses["sigmoid"] == pytest.approx(-math.log(sigmoid(1.5)), rel=1e-12)
    assert losses["ipo"] == pytest.approx((3 - 1) ** 2, rel=1e-12)
    assert losses["hinge"] == 0
    assert losses["margin_mse"] == pytest.approx(((-3 + 7) - (-5 + 6)) ** 2, rel=1e-12)
    smooth = float(preference_loss(*one, kind="sigmoid", beta=0.5, label_smoothing=0.1))
    by_hand = -0.9 * math.log(sigmoid(1.5)) - 0.1 * math.log(sigmoid(-1.5))
    assert smooth == pytest.approx(by_hand, rel=1e-12)


def test_a_student_that_is_its_reference_has_the_losses_of_no_preference():
    same = pair(-3.0, -7.0, -3.0, -7.0)
    losses = {k: float(preference_loss(*same, kind=k, beta=0.1)) for k in KINDS}
    assert losses == pytest.approx(
        {"kto_pair": 0.5, "sigmoid": math.log(2), "ipo": 25.0, "hinge": 1.0, "margin_mse": 0.0}
    )


def test_margins_know_neither_the_scale_of_a_model_nor_the_order_of_answers():
    chosen, rejected, reference_chosen, reference_rejected = pair(-3.0, -7.0, -5.0, -6.0)
    how = {"kind": "margin_mse", "beta": 0.1}
    want = preference_loss(chosen, rejected, reference_chosen, reference_rejected, **how)
    moved = (chosen + 4, rejected + 4, reference_chosen - 2, reference_rejected - 2)
    assert preference_loss(*moved, **how).item() == pytest.approx(want.item(), rel=1e-12)
    swapped = (rejected, chosen, reference_rejected, reference_chosen)
    assert preference_loss(*swapped, **how).item() == want.item()
    far = preference_loss(
        chosen, rejected, reference_chosen, reference_rejected, kind="ipo", beta=1e9
    )
    assert far.item() == pytest.approx(want.item(), rel=1e-6)  # ipo's limit


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reference": "none"}, "'loss: margin_mse' needs the margins of a reference"),
        ({"beta": 0.5}, "'loss: margin_mse' has no 'beta'"),
        ({"label_smoothing": 0.1}, "'label_smoothing' is for 'loss: sigmoid' only"),
    ],
)
def test_settings_that_margins_do_not_have(settings, message):
    with pytest.raises(ValidationError, match=message):
        PreferenceConfig(kind="preference", loss="margin_mse", **settings)


@pytest.mark.parametrize("kind", KINDS)
def test_no_pairs_are_zero(kind):
    empty = [torch.zeros(0, requires_grad=True) for _ in range(4)]
    loss = preference_loss(*empty, kind=kind, beta=0.1)
    assert loss.item() == 0
    loss.backward()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "dpo"}, "unknown preference loss 'dpo', known: kto_pair, sigmoid"),
        ({"kind": "ipo", "beta": 0.0}, "beta is 0.0, it must be positive"),
        ({"kind": "ipo", "label_smoothing": 0.1}, "it must be 0, or below 0.5 for sigmoid"),
        ({"kind": "sigmoid", "label_smoothing": 0.5}, "below 0.5 for sigmoid"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        preference_loss(*pair(1.0, 1.0, 1.0, 1.0), **{"beta": 0.1, **settings})
    with pytest.raises(ValueError, match=r"must be \[B\] each"):
        preference_loss(*pair(1.0, 1.0, 1.0), torch.zeros(2), kind="ipo", beta=0.1)


@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_token_logps_equal_their_twin_with_gradients(chunk):
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()

    hidden, weight, bias = normal(8, 5), normal(13, 5), normal(13)
    targets = torch.randint(0, 11, (8,), generator=g)
    got = token_logps(hidden, weight, targets, bias=bias, vocab_size=11, chunk_size=chunk)
    logits = (hidden @ weight.T + bias)[:, :11]
    want = torch.stack([row.log_softmax(0)[t] for row, t in zip(logits, targets, strict=True)])
    torch.testing.assert_close(got, want)
    upstream = normal(8).detach()
    inputs = (hidden, weight, bias)
    grads = [torch.autograd.grad((x * upstream).sum(), inputs) for x in (got, want)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.autograd.gradcheck(
        lambda h, w, b: token_logps(h, w, targets, bias=b, chunk_size=3), inputs
    )


def test_token_logps_of_no_rows():
    hidden, weight = torch.zeros(0, 5, requires_grad=True), torch.ones(13, 5, requires_grad=True)
    token_logps(hidden, weight, torch.zeros(0, dtype=torch.long)).sum().backward()
    assert weight.grad is not None
    assert weight.grad.abs().sum() == 0


def batch_of_pairs(seed=0):
    """Two pairs: rows 0 and 2 share a prompt, rows 1 and 3; answers of unequal length."""
    g = torch.Generator().manual_seed(seed)
    layout = ["pprr.", "ppprr", "prrr.", "pppr."]
    response = torch.tensor([[c == "r" for c in row] for row in layout])
    attention = torch.tensor([[c != "." for c in row] for row in layout])
    ids = torch.randint(0, 13, (4, 5), generator=g)
    nothing = torch.zeros_like(attention)
    targets = Targets(
        ids, attention, response, nothing,
        rejected=torch.tensor([False, False, True, True]),
        reference_logps=torch.tensor([-3.0, -4.0, -5.0, -2.0], dtype=torch.float64),
    )  # fmt: skip
    hidden = torch.randn(4, 5, 6, generator=g, dtype=torch.float64).requires_grad_()
    weight = torch.randn(13, 6, generator=g, dtype=torch.float64).requires_grad_()
    return Signals(hidden, weight), targets


def whole_answers(signals, targets):
    logp = (signals.hidden @ signals.head_weight.T).log_softmax(-1)
    sums = []
    for row in range(4):
        said = [t for t in range(5) if targets.response[row, t]]
        sums.append(sum(logp[row, t - 1, targets.input_ids[row, t]] for t in said))
    return torch.stack(sums)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize(
    ("kind", "reference"),
    [*((kind, "teacher") for kind in KINDS), *((kind, "none") for kind in KINDS[:-1])],
)
def test_the_objective_equals_its_twin(kind, reference, average):
    signals, targets = batch_of_pairs()
    scale = {"beta": 0.3} if kind != "margin_mse" else {}
    config = PreferenceConfig(
        kind="preference",
        loss=kind,
        **scale,
        reference=reference,
        average=average,
        lambda_sft=0.2,
    )
    objective = build_objective(config)
    assert objective.rows(targets).nonzero().tolist() == [[0, 1], [1, 2]]
    outcome = objective(signals, None, targets, 4)  # half of a global batch of four pairs
    logps = whole_answers(signals, targets)
    torch.testing.assert_close(answer_logps(signals, targets, None), logps)
    reference_logps = targets.reference_logps * (reference == "teacher")
    tokens = torch.tensor([2, 2, 3, 1])
    likelihood = (logps / tokens)[:2].mean()
    if average:
        logps, reference_logps = logps / tokens, reference_logps / tokens
    pairs = [(logps[i], logps[i + 2], reference_logps[i], reference_logps[i + 2]) for i in (0, 1)]
    want = (twin(kind, pairs, 0.3) - 0.2 * likelihood) / 2
    torch.testing.assert_close(outcome.loss, want)
    leaves = (signals.hidden, signals.head_weight)
    grads = [torch.autograd.grad(x, leaves, retain_graph=True) for x in (outcome.loss, want)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
    leads = [((pc - rc) - (pr - rr)).item() for pc, pr, rc, rr in pairs]
    assert float(outcome.metrics["accuracy"]) == sum(x > 0 for x in leads) / 4
    assert float(outcome.metrics["margin"]) == pytest.approx(
        scale.get("beta", 1.0) * sum(leads) / 4
    )


def test_other_objectives_see_the_chosen_answers_alone():
    signals, targets = batch_of_pairs()
    ce = build_objective(CrossEntropyConfig(kind="ce"))
    assert ce.rows(targets).sum(1).tolist() == [2, 2, 0, 0]
    got = ce(signals, None, targets, 4).loss
    torch.testing.assert_close(got, -whole_answers(signals, targets)[:2].sum() / 4)


@pytest.fixture
def run(scenes_dir, tiny_model_dir, tmp_path):
    def train(name, stage=None, teacher=True, **preference):
        raw = tiny_recipe(
            scenes_dir,
            tiny_model_dir,
            tmp_path,
            name=name,
            data={"train": str(scenes_dir / "preferences.parquet")},
            stage={
                "objectives": [{"kind": "preference", **preference}],
                "optimizer": {"kind": "sgd", "lr": 0.01},
                "steps": 3,
                **(stage or {}),
            },
            **({"teacher": {"model": str(tiny_model_dir)}} if teacher else {}),
        )
        folder = pipeline.run(load_recipe(raw)) / "01-mimic"
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines], folder

    return train


def test_a_student_starts_at_its_own_reference_and_learns_to_prefer(run):
    lines, _ = run("dpo", loss="sigmoid", reference="self", stage={"steps": 8}, teacher=False)
    assert lines[0]["preference"] == pytest.approx(math.log(2), abs=1e-5)
    assert lines[0]["preference/margin"] == pytest.approx(0, abs=1e-5)
    assert lines[-1]["preference"] < math.log(2) - 0.01
    assert lines[-1]["preference/accuracy"] > 0.5


def test_a_reference_runs_live_or_is_stored_once(run, monkeypatch):
    """Teacher and student begin equal, so teacher and self are one reference."""
    live, _ = run("live", reference="teacher")
    stored, folder = run("stored", reference="teacher", reference_logps="once")
    own, _ = run("own", reference="self", teacher=False)
    for other in (stored, own):
        for got, want in zip(other, live, strict=True):
            for key in ("preference", "preference/margin", "preference/chosen", "grad_norm"):
                assert got[key] == pytest.approx(want[key], rel=1e-4, abs=1e-4), key
    tensors = load_file(folder / "reference.safetensors")
    assert tensors["logps"].shape == (len(tensors["index"]), 2)
    assert len(tensors["index"]) == 12


def test_a_teacher_that_is_compared_too_runs_once(run, monkeypatch):
    from mmkd.teachers import LiveTeacher

    calls = []
    own = LiveTeacher.own_signals
    monkeypatch.setattr(
        LiveTeacher, "own_signals", lambda self, *a, **k: calls.append(1) or own(self, *a, **k)
    )
    alone, _ = run("alone")
    assert len(calls) == 3
    both, _ = run("both", stage={"objectives": [{"kind": "preference"}, {"kind": "kl"}]})
    assert len(calls) == 6
    assert both[0]["preference"] == pytest.approx(alone[0]["preference"], rel=1e-5)


def test_stored_references_are_read_again_or_made_anew(run, scenes_dir, tiny_model_dir, tmp_path):
    from mmkd.data.stream import BatchStream
    from mmkd.modeling.loading import load_model, load_processor
    from mmkd.recipe import BatchConfig, ModelConfig
    from mmkd.teachers import LiveReference, LiveTeacher, store

    source = ModelConfig(model=str(tiny_model_dir))
    device = torch.device("cpu")

    def stored(change=0.0, seed=0):
        config = DataConfig(train=str(scenes_dir / "preferences.parquet"))
        pairs = Encoder(Records(config), load_processor(source), config, pairs=True)
        stream = BatchStream(pairs, BatchConfig(size=2), seed=seed)
        model = load_model(source)
        with torch.no_grad():
            model.get_output_embeddings().weight[0] += change
        reference = LiveReference(LiveTeacher(model, device), None)
        return store(reference, stream, 2, tmp_path, nullcontext).found

    first = stored()
    path = tmp_path / "reference.safetensors"
    written = path.stat().st_mtime_ns
    again = stored()
    assert path.stat().st_mtime_ns == written
    assert all(torch.equal(again[i], first[i]) for i in first)
    path.write_bytes(path.read_bytes()[:100])  # a disk that was full
    repaired = stored()
    assert all(torch.equal(repaired[i], first[i]) for i in first)
    other = stored(change=1.0)  # other weights
    assert not all(torch.equal(other[i], first[i]) for i in first)
    assert stored(seed=3).keys() != first.keys()  # other records


def test_preference_metrics_do_not_depend_on_the_batch_layout(run):
    """But for kto_pair, whose baseline is the micro-batch's."""
    layouts = [
        run(f"layout-{size}", loss="ipo", stage={"batch": {"size": size, "accumulate": 4 // size}})
        for size in (4, 1)
    ]
    for got, want in zip(layouts[0][0], layouts[1][0], strict=True):
        for key in ("loss", "preference/margin", "preference/accuracy", "grad_norm"):
            assert got[key] == pytest.approx(want[key], rel=1e-3, abs=1e-4), key


def test_preferences_that_cannot_be(run, tmp_path):
    with pytest.raises(RecipeError, match="preference needs a teacher"):
        run("none", teacher=False)
    two = [{"kind": "preference"}, {"kind": "preference", "name": "b", "reference": "self"}]
    with pytest.raises(RecipeError, match="different references"):
        run("two", stage={"objectives": two})
    with pytest.raises(RecipeError, match="label_smoothing"):
        run("smooth", label_smoothing=0.1)
    assert not (tmp_path / "none").exists()
