"""Token boundaries of answers, and two families with different tokenizers."""

import copy
from functools import lru_cache

import torch

from mmkd.data.boundaries import boundary_tokens
from mmkd.data.chat import render_chat, special_tokens
from mmkd.data.chunks import cut_answers, pair_chunks
from mmkd.data.vocabulary import same_vocabulary
from tests.support.processors import OTHER_WORDS, llava, smolvlm

SAID = [
    "There is a red book, two cats and a dog.",
    "Zwölf Bücher – äöü ÄÖÜ ß",
    "🎉🎉 two 👩‍👩‍👧 cats 🎉",
    "e\u0301 and é, 日本語。",
    "Lines.\n\n  Two  spaces\tand a tab.\nDone",
    "",
]


def answered(*said):
    messages = []
    for text in said:
        for role, words in (("user", "How many?"), ("assistant", text)):
            messages.append({"role": role, "content": [{"type": "text", "text": words}]})
    return messages


def cut(processor, messages):
    """Tokens [1, T] and the answers in them."""
    rendered = render_chat(processor, messages)
    tokenizer = processor.tokenizer
    found = tokenizer(rendered.text, return_offsets_mapping=True, add_special_tokens=False)
    specials = set(special_tokens(tokenizer).values())
    ids = found["input_ids"]
    answers = cut_answers(rendered, [], found["offset_mapping"], ids, specials)
    return torch.tensor([ids]), [answers]


def spelled(tokenizer, tokens):
    """What each chunk's tokens say."""
    return [
        tokenizer.decode(tokens.ids[tokens.chunk == i], clean_up_tokenization_spaces=False)
        for i in range(tokens.count)
    ]


def chunked(mine, theirs, messages, length=None):
    student, teacher = (cut(p, messages) for p in (mine, theirs))
    ids = [x[0][:, :length] for x in (student, teacher)]
    masks = boundary_tokens(mine.tokenizer), boundary_tokens(theirs.tokenizer)
    return pair_chunks(*ids, student[1], teacher[1], ["a7"], masks)


@lru_cache
def two_families():
    """Processors of a SmolVLM-like student and a LLaVA-like teacher."""
    student, teacher = copy.deepcopy(smolvlm()), llava(OTHER_WORDS)
    student.image_processor.do_image_splitting = False
    assert not same_vocabulary(student.tokenizer, teacher.tokenizer)
    return student, teacher
