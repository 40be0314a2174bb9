"""Objectives that cover the records of some data sources only."""

from dataclasses import replace

import pytest
import torch

from mmkd.errors import RecipeError
from mmkd.objectives import LayerSignals, RouterSignals, Signals, Targets, build_objective, score
from mmkd.objectives.chunks import Boundaries, Chunks, ChunkTokens
from mmkd.objectives.settings import SETTINGS
from mmkd.recipe import DataConfig, TeacherConfig
from mmkd.teachers import ask_each
from tests.support.relating import LAYOUT, TARGETS, B, T, normal

V, H = 12, 6
IDS = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(4))
LABELS = torch.where(TARGETS.vision, IDS, -100)
DATA = DataConfig.model_validate({"sources": [{"train": n, "name": n} for n in ("a", "b")]})
SOURCES = torch.tensor([[0] * T, [0] * T, [1] * T])
KEPT = [0, 1]


def chunks(rows):
    """Two tokens in each chunk of the answers of some records, which are `rows` of the batch."""
    places, numbers, answers = [], [], []
    for number, record in enumerate(rows):
        said = [t for t, letter in enumerate(LAYOUT[record]) if letter == "r"]
        for start in range(0, len(said), 2):
            part = said[start : start + 2]
            numbers += [len(answers)] * len(part)
            answers.append(number)
            places += [number * T + t - 1 for t in part]
    at = torch.tensor(places)
    tokens = ChunkTokens(at, IDS[list(rows)].flatten()[at + 1], torch.tensor(numbers))
    spaces = torch.arange(V) % 2 == 0
    closing = torch.zeros(len(answers), dtype=torch.bool)
    return Chunks(tokens, tokens, Boundaries(torch.tensor(answers), closing, spaces, spaces))


WHOLE = replace(
    TARGETS, input_ids=IDS, vision_labels=LABELS, sources=SOURCES, chunks=chunks(range(B))
)
ALONE = Targets(
    *(x[KEPT] for x in (IDS, TARGETS.attention, TARGETS.response, TARGETS.vision, LABELS)),
    chunks=chunks(KEPT),
)


def signals(seed):
    def layer(number):
        own = (normal(B, T, H, seed=seed + 10 * number + n) for n in range(8))
        mixer, heads, out, before, after, queries, keys, values = own
        matrix = normal(B, 2, T, T, seed=seed + number)
        return LayerSignals(
            mixer, heads, out, before, after, matrix, queries, keys, values, heads=2
        )

    layers = {n: layer(n + 1) for n in range(2)}
    return Signals(
        normal(B, T, H, seed=seed),
        normal(V, H, seed=seed + 1),
        embeddings=normal(B, T, H, seed=seed + 2),
        layers=layers,
        forced_mixers=layers,
        forced_blocks=layers,
        routers={0: RouterSignals(normal(B, T, 4, seed=seed + 3), 2)},
    )


def of_records(found, records):
    """The signals of some records."""
    fields = {
        name: {n: s.map(lambda x: x[records]) for n, s in getattr(found, name).items()}
        for name in ("layers", "forced_mixers", "forced_blocks")
    }
    routers = {n: replace(r, logits=r.logits[records]) for n, r in found.routers.items()}
    tensors = {"hidden": found.hidden[records], "embeddings": found.embeddings[records]}
    return replace(found, **tensors, **fields, routers=routers)


def leaves(found):
    layers = [x for s in found.layers.values() for x in vars(s).values() if torch.is_tensor(x)]
    routers = [r.logits for r in found.routers.values()]
    return [found.hidden, found.head_weight, found.embeddings, *layers, *routers]


COVERING = [
    {"kind": "ce"},
    {"kind": "kl", "region": "all"},
    {"kind": "jsd", "region": "vision"},
    {"kind": "sinkhorn"},
    {"kind": "relation", "region": "all"},
    {"kind": "affinity", "gather": False},
    {"kind": "token_labels"},
    {"kind": "balance"},
    {"kind": "router_z"},
    {"kind": "alm"},
    {"kind": "uld"},
    {"kind": "hidden_mse"},
    {"kind": "mixer_mse"},
    {"kind": "matrix"},
    {"kind": "minilm", "heads": 2, "layers": [1]},
]


def built(raw):
    kind = next(c for c in SETTINGS if f"'{raw['kind']}'" in str(c.model_fields["kind"].annotation))
    config = kind.model_validate(raw)
    layers = {"mamba_layers": [0, 1], "attention_layers": [0, 1]}
    return build_objective(config, **layers, teacher_attention_layers=[0, 1])


def scored(objective, student, teacher, targets):
    rows = objective.rows(targets.of(objective.sources))
    counts = {objective.name: float(rows.sum())}
    assert counts[objective.name] > 1
    return score([objective], student, teacher, targets, counts)[0]


@pytest.mark.parametrize("raw", COVERING, ids=lambda raw: raw["kind"])
def test_an_objective_of_a_source_is_that_of_a_batch_of_its_records(raw):
    """Value, and gradients by all tensors, which are 0 at the records of other sources."""
    student, teacher = signals(0), signals(100)
    (limited,) = ask_each([built({**raw, "sources": ["a"]})], [], DATA)
    mine = scored(limited, student, teacher, WHOLE)
    alone = scored(built(raw), of_records(student, KEPT), of_records(teacher, KEPT), ALONE)
    exact = {"rtol": 1e-10, "atol": 1e-12} if mine.dtype == alone.dtype == torch.float64 else {}
    torch.testing.assert_close(mine, alone, **exact, check_dtype=False)
    pairs = (
        torch.autograd.grad(x, leaves(student), allow_unused=True, materialize_grads=True)
        for x in (mine, alone)
    )
    for got, want in zip(*pairs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


PER_TOKEN = [raw for raw in COVERING if raw["kind"] not in ("affinity", "balance", "alm", "uld")]


@pytest.mark.parametrize("raw", PER_TOKEN, ids=lambda raw: raw["kind"])
def test_processes_and_micro_batches_of_one_record_sum_to_the_batch(raw):
    """With the count of the global batch, though one of them has no record of the source."""
    student, teacher = signals(0), signals(100)
    (limited,) = ask_each([built({**raw, "sources": ["a"]})], [], DATA)
    counts = {limited.name: float(limited.counted_rows(WHOLE).sum())}
    whole = score([limited], student, teacher, WHOLE, counts)[0]
    parts = []
    for record in range(B):
        own = {
            name: value[[record]] for name, value in vars(WHOLE).items() if torch.is_tensor(value)
        }
        mine, theirs = (of_records(found, [record]) for found in (student, teacher))
        targets = replace(WHOLE, **own, chunks=None)
        parts.append(score([limited], mine, theirs, targets, counts)[0])
    total = torch.stack(parts).sum()
    torch.testing.assert_close(total, whole, rtol=1e-6, atol=1e-9)
    pairs = (
        torch.autograd.grad(x, leaves(student), allow_unused=True, materialize_grads=True)
        for x in (total, whole)
    )
    for got, want in zip(*pairs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("raw", COVERING, ids=lambda raw: raw["kind"])
def test_a_batch_without_the_source_has_no_loss(raw):
    """And a gradient, because processes exchange those of the same weights."""
    student = signals(0)
    (limited,) = ask_each([built({**raw, "sources": ["a"]})], [], DATA)
    other = replace(WHOLE, sources=torch.ones_like(SOURCES))
    loss, _ = score([limited], student, signals(100), other, {limited.name: 5.0})
    gradient, *_ = torch.autograd.grad(loss, [student.hidden])
    assert loss == 0
    assert not gradient.any()


def test_parts_weighted_by_their_tokens_are_one_objective():
    """Two objectives `ce`, of one source each, and one of both."""
    student = signals(0)
    whole = built({"kind": "ce"})
    count = float(whole.rows(WHOLE).sum())
    shares = {n: float(whole.rows(WHOLE.of(frozenset({i}))).sum()) for i, n in enumerate("ab")}
    assert sum(shares.values()) == count
    parts = [
        built({"kind": "ce", "name": n, "sources": [n], "weight": rows / count})
        for n, rows in shares.items()
    ]
    losses = [
        score([whole], student, None, WHOLE, {"ce": count})[0],
        score(ask_each(parts, [], DATA), student, None, WHOLE, shares)[0],
    ]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=1e-12)
    inputs = [student.hidden, student.head_weight]
    gradients = [torch.autograd.grad(loss, inputs) for loss in losses]
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)


def teacher(name, sources=()):
    return TeacherConfig(model=name, name=name, sources=list(sources))


@pytest.mark.parametrize(
    ("own", "routes", "covered"),
    [
        ([], [[], ["b"]], {"kl.x": None, "kl.y": {1}}),
        (["a"], [[], ["b"]], {"kl.x": {0}}),
        (["a", "b"], [["a"], ["b"]], {"kl.x": {0}, "kl.y": {1}}),
        (["b"], [["a", "b"]], {"kl.x": {1}}),
        (["b"], [[]], {"kl": {1}}),
    ],
)
def test_sources_of_objective_and_teacher_intersect(own, routes, covered):
    teachers = [teacher(n, sources) for n, sources in zip("xy", routes, strict=False)]
    made = ask_each([built({"kind": "kl", "sources": own})], teachers, DATA)
    found = {o.name: None if o.sources is None else set(o.sources) for o in made}
    assert found == covered


def test_sources_in_common_with_no_teacher_are_refused():
    with pytest.raises(RecipeError, match=r"objective kl: sources: it has no data source in com"):
        ask_each([built({"kind": "kl", "sources": ["a"]})], [teacher("x", ["b"])], DATA)
