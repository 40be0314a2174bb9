"""Tokens that begin with white space or are special, of several kinds of tokenizers."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mmkd.data.boundaries import boundary_tokens
from mmkd.data.chat import special_tokens
from mmkd.errors import CheckpointError
from tests.data.test_chunks import byte_fallback, byte_level
from tests.support.processors import OTHER_WORDS
from tests.support.spelling import SAID, answered, chunked, cut, two_families


def wordpiece():
    """Tokens inside of words begin with ##, and all others begin with a space but the first."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(
        vocab_size=120, special_tokens=["[UNK]"], show_progress=False
    )
    tokenizer.train_from_iterator(OTHER_WORDS, trainer)
    return tokenizer


def metaspace():
    """As of Llama 2, whose decoder removes a space at the start of a text."""
    tokenizer = byte_fallback()
    tokenizer.decoder = decoders.Sequence([tokenizer.decoder, decoders.Strip(" ", 1, 0)])
    return tokenizer


def marked(tokenizer, named="<end>"):
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=named)
    mask = boundary_tokens(made)
    assert mask.shape == (max(made.get_vocab().values()) + 1,)
    return {made.convert_ids_to_tokens(i) for i in mask.nonzero()[:, 0].tolist()}, made


def test_byte_level_tokens():
    found, made = marked(byte_level(False))
    assert found - {"<end>"} == {t for t in made.get_vocab() if t[0] in "ĠĊĉċČčĜĝĞğ"}
    assert "<end>" in found


def test_tokens_with_spaces_as_letters():
    for tokenizer in (byte_fallback(), metaspace()):
        found, made = marked(tokenizer)
        bytes_of_white_space = {"<0x09>", "<0x0A>", "<0x0B>", "<0x0C>", "<0x0D>", "<0x20>"}
        controls = {f"<0x{number:02X}>" for number in range(0x1C, 0x20)}  # white space for Python
        words = {t for t in made.get_vocab() if t[0] == "▁"}
        assert words
        assert found == {"<end>"} | bytes_of_white_space | controls | words


def test_tokens_that_continue_words():
    found, made = marked(wordpiece(), "[UNK]")
    assert found == {t for t in made.get_vocab() if not t.startswith("##")}
    assert len(found) < len(made.get_vocab())


def test_special_tokens_are_in_and_the_mask_is_computed_once():
    for processor in two_families():
        mask = boundary_tokens(processor.tokenizer)
        assert mask[list(special_tokens(processor.tokenizer).values())].all()
        assert boundary_tokens(processor.tokenizer) is mask


def test_a_tokenizer_without_white_space_is_refused():
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    tokenizer.decoder = decoders.Fuse()  # without a decoder, tokens are joined by spaces
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    with pytest.raises(CheckpointError, match="no token begins with white space or is special"):
        boundary_tokens(plain)


@pytest.mark.parametrize("said", SAID)
def test_boundaries_of_chunks(said):
    families = two_families()
    messages = answered(said, "Two\ncats")
    found = chunked(*families, messages)
    bounds, count = found.boundaries, found.student.count
    assert bounds.answer.shape == bounds.closing.shape == (count,)
    answers = [cut(p, messages)[1][0] for p in families]
    sizes = [
        max(len(mine.cuts.keys() & theirs.cuts.keys()) - 1, 0)
        + (None not in (mine.end, theirs.end))
        for mine, theirs in zip(*answers, strict=True)
    ]
    assert torch.bincount(bounds.answer, minlength=2).tolist() == sizes
    assert bounds.answer.equal(bounds.answer.sort().values)
    specials = families[0].tokenizer.all_special_ids
    assert bounds.closing.tolist() == [i in specials for i in found.student.first_ids.tolist()]
    for processor, own in zip(families, (found.student, found.teacher), strict=True):
        ids = cut(processor, messages)[0].flatten()
        assert ids[own.first_rows + 1].equal(own.first_ids)
        lasts = [own.ids[own.chunk == c][-1] for c in range(count)]
        assert ids[own.last_rows].tolist() == [int(i) for i in lasts]
