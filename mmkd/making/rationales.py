"""Rationales of answers.

Distilling step-by-step (Hsieh et al. 2023, arXiv 2305.02301, section 3) trains on answers and on
rationales as two tasks, which a prefix tells apart. Here a sentence after the question does. The
weight of the rationales is that of an objective with `sources`.
"""

from dataclasses import replace
from typing import Any

from mmkd.making.questions import Question
from mmkd.recipe import RationaleConfig


def ask_why(config: RationaleConfig, question: Question, answer: str) -> Question:
    """The conversation that asks for a rationale: question, answer, and the request to explain it.

    Args:
        config: settings.
        question: of the answer.
        answer: that is explained.
    """
    said = {"role": "assistant", "content": [_text(answer)]}
    asked = {"role": "user", "content": [_text(config.prompt)]}
    return replace(question, messages=[*question.messages, said, asked])


def rationale_row(
    config: RationaleConfig, question: Question, row: dict[str, Any], text: str, finished: bool
) -> dict[str, Any]:
    """A record of a rationale.

    Args:
        config: settings.
        question: of the answer.
        row: the answer's record.
        text: the rationale.
        finished: the model ended it.
    """
    *before, last = question.messages
    asked = {**last, "content": [*last["content"], _text(f"\n{config.question}")]}
    said = {"role": "assistant", "content": [_text(text)]}
    made = {
        "id": f"{question.id}-why",
        "images": row["images"],
        "messages": [*before, asked, said],
        "made": row["made"],
    }
    return made if finished else made | {"unfinished": True}


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}
