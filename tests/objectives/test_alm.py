"""`alm`: debiasing and merging of chunks, against naive float64 twins and on exact laws of text."""

import math
from functools import cache
from itertools import product

import pytest
import torch
from pydantic import ValidationError

from mmkd.objectives import Boundaries, Chunks, ChunkTokens, Signals, Targets, build_objective
from mmkd.objectives.settings import AlmConfig
from mmkd.recipe import load_recipe
from mmkd.recipe.load import to_yaml
from tests.support.places import CONFIGS

T = 16  # positions of a row


def tokens(*rows):
    """Tokens of chunks. A row is a list of chunks, which begin at position 1; a chunk is a list of
    ids."""
    at, ids, chunk, number = [], [], [], 0
    for row, chunks in enumerate(rows):
        place = row * T
        for piece in chunks:
            for token in piece:
                at.append(place)
                ids.append(token)
                chunk.append(number)
                place += 1
            number += 1
    return ChunkTokens(*map(torch.tensor, (at, ids, chunk)))


def logits_of(model):
    return model.hidden.flatten(0, 1) @ model.head_weight.t()


def loss_of(config, student, teacher, chunks, count):
    ids = torch.zeros(student.hidden.shape[:2], dtype=torch.long)
    mask = torch.ones_like(ids, dtype=torch.bool)
    targets = Targets(ids, mask, mask, ~mask, chunks=chunks)
    objective = build_objective(config)
    assert objective.rows(targets).sum() == chunks.student.count
    return objective(student, teacher, targets, count).loss


def alm(**settings):
    return AlmConfig(kind="alm", **settings)


# Two models of one law: the text is "a" or "ab", each with probability 1/2.
HALF, NEVER = math.log(0.5), -60.0
WHOLE = {"a": 0, "ab": 1, "end": 2}
LETTERS = {"a": 0, "b": 1, "end": 2}


def by_rows(*rows):
    """A model whose logits at the first positions are given."""
    hidden = torch.zeros(1, T, 3, dtype=torch.float64)
    hidden[0, : len(rows)] = torch.tensor(rows, dtype=torch.float64)
    return Signals(hidden.requires_grad_(), torch.eye(3, dtype=torch.float64))


def two_texts(gives_ab):
    """Student of letters, teacher of whole words, and the chunks of a text."""
    teacher = by_rows([HALF, HALF, NEVER], [NEVER, NEVER, 0])
    ends = torch.tensor([False, False, True])
    after_a = [NEVER, HALF, HALF]
    if gives_ab:
        student = by_rows([0, NEVER, NEVER], after_a, [NEVER, NEVER, 0])
        mine, theirs = tokens([[0, 1], [2]]), tokens([[1], [2]])
    else:
        student = by_rows([0, NEVER, NEVER], after_a)
        mine, theirs = tokens([[0], [2]]), tokens([[0], [2]])
    closing = torch.tensor([False, True])
    bounds = Boundaries(torch.zeros(2, dtype=torch.long), closing, ends, ends)
    return student, teacher, Chunks(mine, theirs, bounds)


@pytest.mark.parametrize(
    ("settings", "of_a"),
    [
        ({"temperature": 1, "debias": "none"}, 3.4539),
        ({"temperature": 100, "debias": "none"}, 0.0305),
        ({"temperature": 1, "debias": "outcome"}, math.log(2) / 2),  # the end of turn keeps a bias
        ({"temperature": 1, "debias": "both"}, 0),
        ({"temperature": 100, "debias": "both"}, 0),
        ({"debias": "both"}, 0),
        ({}, 0),
    ],
)
def test_two_models_of_one_law_differ_without_debiasing(settings, of_a):
    a = loss_of(alm(**settings), *two_texts(gives_ab=False), 2.0)
    ab = loss_of(alm(**settings), *two_texts(gives_ab=True), 2.0)
    assert a.item() == pytest.approx(of_a, abs=1e-4)
    assert ab.item() == pytest.approx(0, abs=1e-9)


# Random models of two tokenizers: three answers in two rows.
MINE = [[1, 2], [3], [4, 5, 6], [7], [0]], [[2], [8, 9], [3], [5], [6]]
THEIRS = [[3], [5, 1], [2], [9, 8, 4], [0]], [[7, 6], [1], [2, 2], [4], [3]]
ANSWER = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2, 2, 2])
CLOSING = torch.arange(10) == 4
SIZES = 11, 14


def random_models(seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()

    student, teacher = (Signals(normal(2, T, 6), normal(v, 6), normal(v)) for v in SIZES)
    masks = [torch.rand(v, generator=g) < 0.5 for v in SIZES]
    return student, teacher, masks


def chunks_with(masks, only=None):
    """The chunks of both rows, or of one."""
    rows = slice(None) if only is None else slice(only, only + 1)
    numbers = slice(None) if only is None else slice(5 * only, 5 * only + 5)
    bounds = Boundaries(ANSWER[numbers], CLOSING[numbers], *masks)
    return Chunks(tokens(*MINE[rows]), tokens(*THEIRS[rows]), bounds)


def twin(student, teacher, masks, *, temperature, debias, gamma):
    """Sum over merged chunks, by loops over chunks and tokens."""
    first = [mine[0] for row in MINE for mine in row], [t[0] for row in THEIRS for t in row]
    logps, before, after = ([[], []] for _ in range(3))
    for model, (signals, rows) in enumerate(((student, MINE), (teacher, THEIRS))):
        for row, pieces in enumerate(rows):
            at = 0
            for piece in pieces:
                total = 0.0
                for number, token in enumerate(piece):
                    z = signals.head_weight @ signals.hidden[row, at] + signals.head_bias
                    total = total + torch.log_softmax(z, -1)[token]
                    if number == 0:
                        before[model].append(torch.softmax(z, -1)[masks[model]].sum().log())
                    at += 1
                z = signals.head_weight @ signals.hidden[row, at] + signals.head_bias
                after[model].append(torch.softmax(z, -1)[masks[model]].sum().log())
                logps[model].append(total)
    loss, merged, start, sums = 0.0, 0, 0, [0.0, 0.0]
    for c in range(10):
        sums = [sums[model] + logps[model][c] for model in (0, 1)]
        ended = bool(CLOSING[c]) or after[1][c].exp() >= gamma
        if not ended and c < 9 and ANSWER[c + 1] == ANSWER[c]:
            merged += 1
            continue
        values = []
        given = all(bool(masks[model][first[model][start]]) for model in (0, 1))
        given = given and start > 0 and ANSWER[start] == ANSWER[start - 1]
        for model in (0, 1):
            value = sums[model]
            if debias != "none" and not CLOSING[c]:
                value = value + after[model][c]
            if debias == "both" and given:
                value = value - before[model][start]
            values.append(value)
        q, p = values[0], values[1].detach()
        if temperature == math.inf:
            p, q = p - 1e-6, q - 1e-6
            loss = loss + (p - q) + p * torch.log(q / p)
        else:
            p, q = (x / temperature - 1e-6 for x in (p, q))
            no_p, no_q = ((1 - x.exp()).log() for x in (p, q))
            loss = loss + p.exp() * (p - q) + (1 - p.exp()) * (no_p - no_q)
        start, sums = c + 1, [0.0, 0.0]
    return loss, merged


GAMMAS = (0.0, 0.1, 0.6, 0.99)


def test_more_chunks_are_merged_at_a_larger_gamma():
    how = {"temperature": math.inf, "debias": "both"}
    merged = [twin(*random_models(), gamma=gamma, **how)[1] for gamma in GAMMAS]
    assert merged[0] == 0 < merged[1] < merged[2] < merged[3] == 7  # one of each answer is left


@pytest.mark.parametrize("debias", ["outcome", "both"])
@pytest.mark.parametrize("temperature", [1.0, 100.0, math.inf])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_debiased_and_merged_chunks_equal_the_twin(debias, temperature, gamma):
    student, teacher, masks = random_models()
    settings = {"temperature": temperature, "debias": debias, "gamma": gamma}
    want, _ = twin(student, teacher, masks, **settings)
    got = loss_of(alm(**settings), student, teacher, chunks_with(masks), 7.0)
    torch.testing.assert_close(got, want / 7, rtol=1e-10, atol=0)
    leaves = [student.hidden, student.head_weight, student.head_bias]
    pairs = zip(*(torch.autograd.grad(x, leaves) for x in (got, want / 7)), strict=True)
    for mine, exact in pairs:
        torch.testing.assert_close(mine, exact, rtol=1e-8, atol=1e-13)


@pytest.mark.parametrize("gamma", [0.0, 0.6])
def test_each_micro_batch_has_its_part_of_the_loss(gamma):
    student, teacher, masks = random_models(1)
    config = alm(gamma=gamma)
    whole = loss_of(config, student, teacher, chunks_with(masks), 10.0)
    part = 0.0
    for row in (0, 1):
        mine, theirs = (
            Signals(s.hidden[row : row + 1], s.head_weight, s.head_bias) for s in (student, teacher)
        )
        part = part + loss_of(config, mine, theirs, chunks_with(masks, row), 10.0)
    torch.testing.assert_close(part, whole, rtol=1e-12, atol=0)
    leaves = [student.hidden, student.head_weight, student.head_bias]
    pairs = zip(*(torch.autograd.grad(x, leaves) for x in (part, whole)), strict=True)
    for mine, exact in pairs:
        torch.testing.assert_close(mine, exact, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("temperature", [1.0, math.inf])
@pytest.mark.parametrize("debias", ["outcome", "both"])
def test_where_every_token_is_a_boundary_debiasing_changes_nothing(temperature, debias):
    student, teacher, _ = random_models(2)
    masks = [torch.ones(v, dtype=torch.bool) for v in SIZES]
    chunks = chunks_with(masks)
    plain = loss_of(alm(temperature=temperature, debias="none"), student, teacher, chunks, 3.0)
    got = loss_of(alm(temperature=temperature, debias=debias), student, teacher, chunks, 3.0)
    assert got.item() == plain.item()
    leaves = [student.hidden, student.head_weight, student.head_bias]
    pairs = zip(*(torch.autograd.grad(x, leaves) for x in (got, plain)), strict=True)
    for mine, exact in pairs:
        torch.testing.assert_close(mine, exact, rtol=1e-12, atol=1e-15)


def test_one_model_has_no_loss_and_no_gradient():
    student, _, masks = random_models(3)
    mine = chunks_with(masks).student
    chunks = Chunks(mine, mine, Boundaries(ANSWER, CLOSING, masks[0], masks[0]))
    for settings in ({}, {"temperature": 5.0, "debias": "both"}, {"gamma": 0.9}):
        loss = loss_of(alm(**settings), student, student, chunks, 3.0)
        assert loss.item() == 0
        assert torch.autograd.grad(loss, student.hidden)[0].abs().max() < 1e-12


# A law of sentences of the words a, ab and b: which word comes next, or the end (3), after each
# word and at the start (3). Teacher: " a", " ab", " b", end. Student: " a", " b", "b", end.
LAW = torch.tensor(
    [[0.1, 0.5, 0.2, 0.2], [0.3, 0.1, 0.2, 0.4], [0.6, 0.1, 0.1, 0.2], [0.4, 0.4, 0.2, 0.0]],
    dtype=torch.float64,
)
SPELLED = {0: [0], 1: [0, 2], 2: [1], 3: [3]}  # in the student's tokens


def sentences():
    """All sentences of at most three words."""
    for length in (1, 2, 3):
        yield from product(range(3), repeat=length)


def state_of(word, before):
    """The student's state after a word. After " a" it does not know yet whether the word goes on,
    which depends on the word before."""
    return 4 + before if word == 0 else word


@cache
def law_batch():
    """Hidden states that name the context, for student and teacher, and the chunks of all sentences
    that end; each row with its probability."""
    mine, theirs, inputs, known = [], [], [], []
    for words in sentences():
        student, teacher = [], []
        before, previous = 3, 3
        for word in (*words, 3):
            student.append(state_of(previous, before))
            if word == 1:
                student.append(4 + previous)
            teacher.append(previous)
            before, previous = previous, word
        inputs.append(student)
        known.append(teacher)
        mine.append([SPELLED[w] for w in (*words, 3)])
        theirs.append([[w] for w in (*words, 3)])
    count = len(mine)
    hidden = torch.zeros(count, T, 8, dtype=torch.float64)
    own = torch.zeros(count, T, 4, dtype=torch.float64)
    for row in range(count):
        hidden[row, range(len(inputs[row])), inputs[row]] = 1
        own[row, range(len(known[row])), known[row]] = 1
    lengths = [len(row) for row in mine]
    answer = torch.repeat_interleave(torch.arange(count), torch.tensor(lengths))
    closing = torch.tensor([i == n - 1 for n in lengths for i in range(n)])
    masks = torch.tensor([True, True, False, True]), torch.ones(4, dtype=torch.bool)
    chunks = Chunks(tokens(*mine), tokens(*theirs), Boundaries(answer, closing, *masks))
    return hidden, Signals(own, LAW.clamp(min=1e-12).log().t()), chunks


def exact_student():
    """Logits [8, 4] of the student that has the teacher's law. States: a complete text after the
    word 1, 2 or at the start 3; 4 + w: after " a" that follows the word w. State 0 never occurs."""
    table = torch.zeros(8, 4, dtype=torch.float64)
    for state in (1, 2, 3):
        a, ab, b, end = LAW[state]
        table[state] = torch.stack([a + ab, b, 0 * b, end])
    for previous in range(4):
        a, ab = LAW[previous, :2]
        goes_on = ab / (a + ab)
        after_a = LAW[0]
        table[4 + previous] = torch.stack(
            [
                (1 - goes_on) * (after_a[0] + after_a[1]),
                (1 - goes_on) * after_a[2],
                goes_on,
                (1 - goes_on) * after_a[3],
            ]
        )
    return table.clamp(min=1e-12).log()


def law_loss(table, debias, **settings):
    hidden, teacher, chunks = law_batch()
    student = Signals(hidden, table.t())
    return loss_of(alm(debias=debias, **settings), student, teacher, chunks, 1.0)


def test_the_student_with_the_teachers_law_is_the_minimum_with_debiasing_alone():
    for temperature in (1.0, math.inf):
        table = exact_student().requires_grad_()
        loss = law_loss(table, "both", temperature=temperature)
        assert loss.item() == pytest.approx(0, abs=1e-9)
        assert torch.autograd.grad(loss, table)[0].abs().max() < 1e-6
        for debias in ("none", "outcome"):
            loss = law_loss(table, debias, temperature=temperature)
            assert loss.item() > 1
            assert torch.autograd.grad(loss, table)[0].abs().max() > 0.1


def distance_to_the_law(table):
    """Largest KL divergence of the student's next token from the law's, over states."""
    exact = exact_student()[1:].log_softmax(-1)
    found = table.detach()[1:].log_softmax(-1)
    return (exact.exp() * (exact - found)).sum(-1).max().item()


def trained(debias):
    table = torch.zeros(8, 4, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.Adam([table], lr=0.3)
    for _ in range(300):
        optimizer.zero_grad()
        law_loss(table, debias, temperature=math.inf).backward()
        optimizer.step()
    return distance_to_the_law(table)


def test_alm_alone_recovers_the_teachers_law_with_debiasing():
    distances = {debias: trained(debias) for debias in ("none", "outcome", "both")}
    assert distances["both"] < 0.02, distances  # what never follows vanishes slowly
    assert min(distances["none"], distances["outcome"]) > 0.08, distances


@pytest.mark.parametrize("written", [".inf", "inf", "'inf'"])
def test_an_infinite_temperature_in_a_recipe(written, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "name: x\nstudent: {model: a}\nteacher: {model: b}\ndata: {train: c}\nstages:\n"
        f"  - {{name: s, steps: 1, objectives: [{{kind: alm, temperature: {written}}}]}}\n"
    )
    recipe = load_recipe(file)
    (config,) = recipe.stages[0].objectives
    assert config == alm()
    assert config.temperature == math.inf
    file.write_text(to_yaml(recipe))
    assert load_recipe(file) == recipe


def test_the_shipped_recipe_has_the_defaults():
    _, config = load_recipe(CONFIGS / "cross_family.yaml").stages[0].objectives
    assert config == alm()


def test_a_written_temperature_means_what_it_meant():
    assert alm(temperature=100.0).debias == "none"
    assert alm().debias == alm(temperature="inf").debias == "both"
    assert alm(temperature=100.0, debias="outcome").debias == "outcome"
    assert AlmConfig.model_json_schema()["properties"]["temperature"]["default"] == "inf"


def test_gamma_without_debiasing_is_refused():
    with pytest.raises(ValidationError, match="'gamma' is for 'debias: outcome' or 'both' only"):
        alm(temperature=100.0, gamma=0.2)
    with pytest.raises(ValidationError, match="less than 1"):
        alm(gamma=1.0)


def test_chunks_without_boundaries_are_refused():
    student, teacher, masks = random_models()
    chunks = chunks_with(masks)
    with pytest.raises(ValueError, match="'alm' needs the boundaries of chunks"):
        loss_of(alm(), student, teacher, Chunks(chunks.student, chunks.teacher), 1.0)
