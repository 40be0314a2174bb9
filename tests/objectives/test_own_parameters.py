"""Objectives with parameters of their own, against float64 twins: maps between widths, critics."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from mmkd.engines import build_engine
from mmkd.errors import RecipeError
from mmkd.modeling.loading import load_model
from mmkd.objectives import (
    Chunks,
    ChunkTokens,
    DecoderParts,
    LayerSignals,
    Signals,
    Targets,
    build_objective,
)
from mmkd.objectives.cross_tokenizer import AlmConfig
from mmkd.objectives.embedding import EmbeddingConfig
from mmkd.objectives.layerwise import HiddenMseConfig
from mmkd.objectives.linear_maps import apply_map, linear_map
from mmkd.objectives.mutual import MutualConfig, evenly, interpolated_bound
from mmkd.recipe import ModelConfig, StageConfig, load_recipe
from mmkd.runs import pipeline, preflight
from mmkd.training.objective_modules import build_own
from tests.support.recipes import tiny_recipe

B, T, HS, HT = 2, 7, 3, 5
STUDENT, TEACHER = DecoderParts([], None, HS), DecoderParts([], None, HT)
RESPONSE = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1, 0]]).bool()
VISION = torch.tensor([[0, 1, 1, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0]]).bool()
REAL = torch.tensor([[1] * 7, [1] * 6 + [0]]).bool()
TARGETS = Targets(torch.zeros(B, T).long(), REAL, RESPONSE, VISION)
COUNT = 8.0


def normal(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def own_of(objective, student=STUDENT, teacher=TEACHER):
    torch.manual_seed(0)
    objective.own = objective.own_modules(student, teacher)
    return objective.own.double()


def at_layer(hidden):
    return LayerSignals(hidden, hidden, hidden, hidden, hidden)


def signals(width, seed, layers=()):
    made = {i: at_layer(normal(B, T, width, seed=seed + i).requires_grad_()) for i in layers}
    embeddings = normal(B, T, width, seed=seed + 50).requires_grad_()
    return Signals(normal(B, T, width, seed=seed), torch.zeros(2, width), embeddings=embeddings,
                   layers=made)  # fmt: skip


def compare(found, wanted, leaves):
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    pairs = zip(*(torch.autograd.grad(x, leaves) for x in (found, wanted)), strict=True)
    for got, want in pairs:
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("normalize", ["none", "token"])
def test_mapped_hidden_states(normalize):
    config = HiddenMseConfig(kind="hidden_mse", layers=[0, 2], teacher_layers=[1, 3],
                             linear_map=True, normalize=normalize)  # fmt: skip
    objective = build_objective(config)
    own = own_of(objective)
    mine, theirs = signals(HS, 1, [0, 2]), signals(HT, 2, [1, 3])
    got = objective(mine, theirs, TARGETS, COUNT).loss
    want = 0
    for s, t in ((0, 1), (2, 3)):
        for b, at in itertools.product(range(B), range(T)):
            if not REAL[b, at]:
                continue
            y = theirs.layers[t].block_output[b, at].detach()
            x = own[str(s)].weight @ mine.layers[s].block_output[b, at]
            value = ((x - y) ** 2).sum() / HT
            want = want + (value / ((y**2).sum() / HT + 1e-8) if normalize == "token" else value)
    leaves = [*own.parameters(), *(layer.block_output for layer in mine.layers.values())]
    compare(got, want / COUNT / 2, leaves)


def test_a_fresh_map_of_equal_widths_changes_nothing():
    plain = build_objective(HiddenMseConfig(kind="hidden_mse", layers=[1]))
    mapped = build_objective(HiddenMseConfig(kind="hidden_mse", layers=[1], linear_map=True))
    own_of(mapped, TEACHER, TEACHER)
    mine, theirs = signals(HT, 1, [1]), signals(HT, 2, [1])
    losses = [o(mine, theirs, TARGETS, COUNT).loss for o in (plain, mapped)]
    assert torch.equal(*losses)
    assert mapped(theirs, theirs, TARGETS, COUNT).loss == 0


@pytest.mark.parametrize(("width", "to"), [(3, 5), (5, 3)])
def test_a_fresh_map_keeps_the_inner_products_of_the_narrower_side(width, to):
    weight = linear_map(width, to).weight.detach()
    inner = weight.T @ weight if width < to else weight @ weight.T
    torch.testing.assert_close(inner, torch.eye(3), atol=1e-5, rtol=0)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_embedding(share):
    objective = build_objective(EmbeddingConfig(kind="embedding", image_weight=share))
    own = own_of(objective)
    mine, theirs = signals(HS, 1), signals(HT, 2)
    got = objective(mine, theirs, TARGETS, COUNT)
    want = 0
    for b in range(B):
        x = own.weight @ mine.embeddings[b, VISION[b]].mean(0)
        image = theirs.embeddings[b, VISION[b]].mean(0).detach()
        words = theirs.embeddings[b, RESPONSE[b]].mean(0).detach()
        for weight, y in ((share, image), (1 - share, words)):
            want = want + weight * (1 - x @ y / x.norm() / y.norm())
    compare(got.loss, want / COUNT, [*own.parameters(), mine.embeddings])
    assert objective.rows(TARGETS).sum(1).tolist() == [1, 1]
    if share == 1:
        own = own_of(objective, TEACHER, TEACHER)
        assert objective(theirs, theirs, TARGETS, COUNT).loss.item() == pytest.approx(0, abs=1e-12)


def bound_twin(f, b, alpha):
    K = len(f)
    total = 1.0
    for j in range(K):
        d = alpha * sum(math.exp(f[k][j]) for k in range(K)) / K + (1 - alpha) * math.exp(b)
        total += math.log(math.exp(f[j][j]) / d) / K
        total -= sum(math.exp(f[i][j]) / d for i in range(K)) / K**2
    return total


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.9, 1.0])
def test_the_interpolated_bound(alpha):
    f = normal(6, 6, seed=4).requires_grad_()
    b = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    got = interpolated_bound(f, b, alpha)
    assert got.item() == pytest.approx(bound_twin(f.tolist(), b.item(), alpha), rel=1e-9)
    constant = torch.full((6, 6), b.item(), dtype=torch.float64)
    assert interpolated_bound(constant, b.detach(), alpha).item() == pytest.approx(0, abs=1e-12)
    if alpha > 0:
        certain = 1e3 * torch.eye(6, dtype=torch.float64)
        limit = math.log(6) - math.log(alpha)
        assert interpolated_bound(certain, b.detach(), alpha).item() <= limit + 1
    if alpha == 1:
        assert interpolated_bound(certain, b.detach(), 1.0).item() == pytest.approx(math.log(6))
        assert torch.autograd.gradcheck(lambda x: interpolated_bound(x, b, 1.0), (f,))


def test_mutual_against_its_twin():
    config = MutualConfig(kind="mutual", layers=[0], teacher_layers=[1], width=4, tokens=5)
    objective = build_objective(config)
    own = own_of(objective)
    mine, theirs = signals(HS, 1, [0]), signals(HT, 2, [1])
    got = objective(mine, theirs, TARGETS, COUNT).loss
    rows = evenly(REAL.flatten().nonzero()[:, 0], 5)
    assert rows.tolist() == [0, 3, 6, 9, 12]
    x = mine.layers[0].block_output.flatten(0, 1)[rows] @ own["0"].student.weight.T
    y = theirs.layers[1].block_output.detach().flatten(0, 1)[rows] @ own["0"].teacher.weight.T
    cosines = torch.stack([F.cosine_similarity(row, y, dim=-1) for row in x])
    f = cosines * own["0"].log_factor.exp()
    want = -interpolated_bound(f, own["0"].log_baseline, 0.9) * REAL.sum() / COUNT
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    leaves = [*own.parameters(), mine.layers[0].block_output]
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves),
                    strict=True):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_all_parameters_of_a_critic_have_gradients(alpha):
    """Processes whose batches have rows exchange the same gradients as those without."""
    objective = build_objective(MutualConfig(kind="mutual", layers=[0], alpha=alpha))
    own = own_of(objective)
    objective(signals(HS, 1, [0]), signals(HT, 2, [0]), TARGETS, COUNT).loss.backward()
    assert all(p.grad is not None for p in own.parameters())


def test_parameters_without_dimensions_are_refused(tiny_model_dir):
    """DeepSpeed cannot send them to other processes."""
    model = load_model(ModelConfig(model=str(tiny_model_dir)))
    objective = build_objective(MutualConfig(kind="mutual", layers=[0]))
    build_own([objective], model, model)
    objective.own_modules = lambda *_: torch.nn.ParameterDict({"a": torch.zeros(())})
    with pytest.raises(RecipeError, match="objective mutual: its parameter a has no dimension"):
        build_own([objective], model, model)


def test_maps_keep_their_precision_under_autocast():
    module, hidden = linear_map(HS, HT), normal(4, HS).float()
    with torch.autocast("cpu", torch.bfloat16):
        found = apply_map(module, hidden)
    assert torch.equal(found, apply_map(module, hidden))


def test_a_critic_alone_finds_dependence():
    """States that are equal up to noise have a large bound after training the critic only."""
    found = {}
    for noise in (0.3, 30.0):
        objective = build_objective(MutualConfig(kind="mutual", layers=[0], width=8, tokens=256))
        torch.manual_seed(0)
        own = objective.own = objective.own_modules(STUDENT, TEACHER)
        optimizer = torch.optim.Adam(own.parameters(), lr=0.02)
        wide = torch.ones(1, 256).bool()
        targets = Targets(torch.zeros(1, 256).long(), wide, wide, ~wide)
        g = torch.Generator().manual_seed(0)
        to = torch.randn(HS, HT, generator=g)
        values = []
        for _ in range(60):
            x = torch.randn(1, 256, HS, generator=g)
            y = x @ to + noise * torch.randn(1, 256, HT, generator=g)
            mine = Signals(x, x[0], layers={0: at_layer(x)})
            theirs = Signals(y, y[0], layers={0: at_layer(y)})
            loss = objective(mine, theirs, targets, 256.0).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values.append(-loss.item())
        found[noise] = sum(values[-10:]) / 10
    assert found[0.3] > 1.5
    assert abs(found[30.0]) < 0.3


@pytest.mark.parametrize("rows", [0, 1])
def test_modules_run_in_a_batch_without_rows(rows):
    """Processes gather sharded weights together."""
    response = torch.zeros(B, T).bool()
    response[0, 3 : 3 + rows] = True
    nothing = torch.zeros(B, T).bool()
    targets = Targets(torch.zeros(B, T).long(), REAL, response, nothing)
    for config in (
        HiddenMseConfig(kind="hidden_mse", layers=[0], linear_map=True, region="vision"),
        EmbeddingConfig(kind="embedding"),
        MutualConfig(kind="mutual", layers=[0], region="response"),
        MutualConfig(kind="mutual", layers=[0], region="response", alpha=1.0),
    ):
        objective = build_objective(config)
        own = own_of(objective)
        loss = objective(signals(HS, 1, [0]), signals(HT, 2, [0]), targets, 1.0).loss
        gradients = torch.autograd.grad(loss, [*own.parameters()])
        assert loss.item() == 0
        assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients), config.kind


@pytest.mark.parametrize("engine", ["torch"])
def test_own_parameters_have_their_learning_rate(engine, tiny_model_dir):
    entries = [
        {"kind": "hidden_mse", "layers": [0], "linear_map": True, "lr": 0.5},
        {"kind": "exits", "layers": [0], "norm": "own"},
        {"kind": "ce"},
    ]
    config = StageConfig(name="x", objectives=entries, steps=4, optimizer={"lr": 0.25},
                         schedule={"kind": "constant", "warmup": 0.0},
                         engine={"device": "cpu", "kind": engine})  # fmt: skip
    model = load_model(ModelConfig(model=str(tiny_model_dir)))
    objectives = [build_objective(o) for o in config.objectives]
    own = build_own(objectives, model, model)
    assert set(own.keys()) == {"hidden_mse", "exits"}
    made = build_engine(config, model, 4, torch.device("cpu"), own)
    rates = {id(p): g["lr"] for g in made.optimizer.param_groups for p in g["params"]}
    assert {rates[id(p)] for p in own["hidden_mse"].parameters()} == {0.5}
    assert {rates[id(p)] for p in own["exits"].parameters()} == {0.25}
    assert {rates[id(p)] for p in model.parameters()} == {0.25}
    names = {key.split("/")[1] for key, _ in made.tensors()}
    assert "objectives.exits.0.norm.weight" in names
    assert not any("objectives" in name for name in made.weights())
    assert set(made.own_weights()) == {"hidden_mse.0.weight", "exits.0.norm.weight"}


def test_a_student_of_another_width_learns_layers(scenes_dir, tiny_model_dir, tmp_path):
    """A narrower student: its maps train, are written beside it, and a stopped run goes on."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig.from_pretrained(tiny_model_dir)
    text = config.text_config
    text.hidden_size, text.intermediate_size, text.head_dim = 16, 32, 8
    torch.manual_seed(0)
    narrow = tmp_path / "narrow"
    LlavaForConditionalGeneration(config).save_pretrained(narrow)
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json",
                 "chat_template.jinja", "preprocessor_config.json"):  # fmt: skip
        source = tiny_model_dir / name
        if source.exists():
            (narrow / name).write_bytes(source.read_bytes())
    entries = [
        {"kind": "hidden_mse", "layers": [0], "linear_map": True, "normalize": "token"},
        {"kind": "mutual", "layers": [1], "weight": 0.1},
        {"kind": "embedding"},
    ]

    def recipe(name, objectives, steps=40):
        stage = {"objectives": objectives, "steps": steps, "optimizer": {"lr": 1e-2}}
        return tiny_recipe(scenes_dir, narrow, tmp_path, name=name, stage=stage,
                           teacher={"model": str(tiny_model_dir)})  # fmt: skip

    folder = pipeline.run(load_recipe(recipe("narrow-run", entries))) / "01-mimic"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for name in ("hidden_mse", "mutual", "embedding"):
        assert lines[-1][name] < lines[0][name] - 0.05, name
    own = load_file(folder / "objectives.safetensors")
    assert own["hidden_mse.0.weight"].shape == (32, 16)
    assert own["embedding.weight"].shape == (32, 16)
    plain = [{"kind": "hidden_mse", "layers": [0]}]
    with pytest.raises(RecipeError, match="student layer 0 has widths"):
        preflight.check(load_recipe(recipe("refused", plain)))
    alone = pipeline.run(load_recipe(recipe("no-own", [{"kind": "ce"}], steps=1))) / "01-mimic"
    assert not (alone / "objectives.safetensors").exists()


def test_a_forced_layer_has_no_map(scenes_dir, tiny_model_dir, tmp_path):
    entry = {"kind": "hidden_mse", "layers": [0], "linear_map": True, "teacher_forced": True}
    raw = tiny_recipe(scenes_dir, tiny_model_dir, tmp_path, stage={"objectives": [entry]})
    with pytest.raises(RecipeError, match="exclude each other"):
        load_recipe(raw)


@pytest.mark.parametrize("chunks", [0, 2])
def test_hidden_states_at_the_ends_of_chunks(chunks):
    """The teacher has tokens of its own; the likelihoods' part is that of alm alone."""
    how = {"kind": "alm", "debias": "none", "temperature": 1.0}
    alone, objective = (build_objective(AlmConfig(**how, hidden=h)) for h in (0, 0.5))
    own = own_of(objective)
    rows, ids, chunk = [2, 3, 4], [1, 0, 1], [0, 0, 1]
    other, others, theirs = [1, 4], [0, 1], [0, 1]
    size = (3, 2) if chunks else (0, 0)
    made = Chunks(
        ChunkTokens(*(torch.tensor(x[: size[0]]).long() for x in (rows, ids, chunk))),
        ChunkTokens(*(torch.tensor(x[: size[1]]).long() for x in (other, others, theirs))),
    )
    targets = replace(TARGETS, chunks=made)
    mine = Signals(normal(B, T, HS, seed=1).requires_grad_(), normal(2, HS, seed=2))
    teacher = Signals(normal(B, T, HT, seed=3), normal(2, HT, seed=4),
                      own_hidden=normal(1, 6, HT, seed=5))  # fmt: skip
    got = objective(mine, teacher, targets, COUNT).loss
    want = alone(mine, teacher, targets, COUNT).loss
    for end, at in ((4, 2), (5, 5)) if chunks else ():
        y = teacher.own_hidden[0, at]
        x = own.weight @ mine.hidden[0, end]
        want = want + 0.5 * ((x - y) ** 2).sum() / (y**2).sum() / COUNT
    leaves = [mine.hidden, own.weight] if chunks else [mine.hidden]
    compare(got, want, leaves)
    if not chunks:
        assert torch.equal(torch.autograd.grad(
            objective(mine, teacher, targets, COUNT).loss, own.weight)[0],
            torch.zeros_like(own.weight))  # fmt: skip
