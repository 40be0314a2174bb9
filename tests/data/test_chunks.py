"""Chunks of answers for two tokenizers, on difficult texts."""

import json
from functools import partial
from itertools import pairwise

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from mmkd.data.chat import Rendered
from mmkd.data.chunks import cut_answers, pair_chunks
from tests.support.processors import OTHER_WORDS, WORDS, smolvlm
from tests.support.spelling import SAID, answered, chunked, cut, spelled, two_families


@pytest.fixture(scope="module")
def families():
    return two_families()


@pytest.mark.parametrize("said", SAID)
def test_chunks_are_the_answer_for_both(families, said):
    found = chunked(*families, answered(said))
    mine, theirs = (
        spelled(p.tokenizer, t)
        for p, t in zip(families, (found.student, found.teacher), strict=True)
    )
    assert mine.pop() == "<end_of_utterance>"
    assert theirs.pop() == "</s>"
    assert [text.lstrip() for text in mine[:1]] == [text.lstrip() for text in theirs[:1]]
    assert mine[1:] == theirs[1:]
    assert "".join(mine).lstrip() == "".join(theirs).lstrip() == said
    assert "�" not in "".join(mine)


def test_chunks_are_the_finest(families):
    """Every place that both cut is the end of a chunk, and some chunks have several tokens."""
    messages = answered(SAID[0])
    found = chunked(*families, messages)
    answers = [cut(p, messages)[1][0][0] for p in families]
    shared = answers[0].cuts.keys() & answers[1].cuts.keys()
    assert found.student.count == len(shared) - 1 + 1  # between places, and the end of turn
    assert len(found.student.ids) > found.student.count
    assert len(found.teacher.ids) > found.teacher.count
    assert len(found.student.ids) != len(found.teacher.ids)


def test_a_character_that_one_splits_is_one_chunk(families):
    """The teacher has tokens for emoji and umlauts behind spaces, the student has bytes."""
    answers = [cut(p, answered("ä🎉ö"))[1][0][0] for p in families]
    assert [a.cuts.keys() for a in answers] == [{0, 1, 2, 3}] * 2
    found = chunked(*families, answered("ä🎉ö"))
    sizes = [torch.bincount(t.chunk).tolist() for t in (found.student, found.teacher)]
    assert sizes == [[2, 4, 2, 1], [1, 1, 2, 1]]


def test_answers_of_several_turns_and_what_is_cut_off(families):
    messages = answered("two cats", "a dog")
    found = chunked(*families, messages)
    assert spelled(families[0].tokenizer, found.student).count("<end_of_utterance>") == 1
    assert "".join(spelled(families[1].tokenizer, found.teacher)).replace(" ", "") == (
        "twocatsadog</s>"  # LLaVA's template closes the last turn alone
    )
    whole = cut(families[0], messages)[0].shape[1]
    for length in range(whole):
        part = chunked(*families, messages, length)
        assert part.student.count <= found.student.count
        assert torch.equal(part.student.ids, found.student.ids[: len(part.student.ids)])
        assert part.student.rows.max().item() < length - 1 if part.student.count else True


def test_one_tokenizer_has_a_chunk_a_token():
    ids, answers = cut(smolvlm(), answered("two cats and a dog"))
    found = pair_chunks(ids, ids, answers, answers, ["a"])
    assert torch.equal(found.student.chunk, torch.arange(len(found.student.ids)))
    assert torch.equal(found.student.rows, found.teacher.rows)
    assert torch.equal(ids.flatten()[found.student.rows + 1], found.student.ids)


def byte_level(trim):
    """As of GPT-2 or Llama 3, which leave white space out of a token's offsets (`trim`)."""
    words = Regex(r"[^\s\p{L}]+[\r\n]*|[^\r\n\p{L}]?\p{L}+|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*OTHER_WORDS, *WORDS, ".\n\n .\n\n .\n\n Two  spaces"], trainer)
    return tokenizer


def byte_fallback():
    """As of Llama 2 and Mistral: characters without a token are bytes, spaces are letters."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(
        OTHER_WORDS, trainers.BpeTrainer(vocab_size=90, show_progress=False)
    )
    facts = json.loads(trained.to_str())
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *facts["model"]["vocab"]]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    facts["model"] |= {"vocab": vocabulary, "byte_fallback": True, "unk_token": "<unk>"}
    tokenizer = Tokenizer.from_str(json.dumps(facts))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


@pytest.mark.parametrize(
    "make", [partial(byte_level, False), partial(byte_level, True), byte_fallback]
)
@pytest.mark.parametrize("said", SAID[:5])
def test_what_lies_between_cuts_is_what_its_tokens_say(said, make):
    tokenizer = make()
    text = f"A: {said}"
    rendered = Rendered(text, ((2, len(text)),), ((3, len(text)),))
    found = tokenizer.encode(text)
    (answer,) = cut_answers(rendered, [], found.offsets, found.ids, set())
    cuts = sorted(answer.cuts.items())
    assert cuts[0][0] == 0
    assert cuts[-1][0] == len(said)
    for (start, first), (stop, last) in pairwise(cuts):
        piece = tokenizer.decode(found.ids[first:last])
        assert (piece.lstrip() if start == 0 else piece) == said[start:stop]


def test_an_end_of_turn_that_swallows_the_line_break_is_a_chunk():
    """As Phi's `<|end|>`, which takes white space behind it into its offsets."""
    rendered = Rendered("ok<e>\nUSER", ((0, 5),), ((0, 2),))
    (answer,) = cut_answers(rendered, [], [(0, 2), (2, 6), (6, 10)], [5, 9, 5], {9})
    assert answer.cuts == {0: 0, 2: 1}
    assert answer.end == 1
    (answer,) = cut_answers(rendered, [], [(0, 2), (2, 5), (6, 10)], [5, 9, 9], {9})
    assert answer.end == 1


@pytest.mark.parametrize(
    ("words", "offsets", "cuts"),
    [
        ("a.\n\nb", [(0, 1), (1, 2), (4, 5)], {0: 0, 1: 1, 4: 2, 5: 3}),  # '.\n\n' is one
        ("a  b", [(0, 1), (2, 2), (3, 4)], {0: 0, 1: 1, 2: 2, 4: 3}),  # ' ' and ' b'
        ("ab", [(0, 1), (1, 1), (1, 2)], {0: 0, 1: 1, 2: 3}),  # a token that says nothing
        ("äb", [(0, 1), (0, 2)], {0: 0, 2: 2}),  # bytes of ä in both
    ],
)
def test_cuts_by_offsets(words, offsets, cuts):
    whole = ((0, len(words)),)
    rendered = Rendered(words, whole, whole)
    (answer,) = cut_answers(rendered, [], offsets, [0] * len(offsets), set())
    assert answer.cuts == cuts
    assert answer.end is None


def test_other_words_have_no_chunks(families):
    student, teacher = (cut(p, answered(s)) for p, s in zip(families, ("yes", "no"), strict=True))
    with pytest.raises(ValueError, match="the answers of a7 are not those of the teacher's row"):
        pair_chunks(student[0], teacher[0], student[1], teacher[1], ["a7"])
