"""Rows of the standard benchmarks in the schema of their data sets on the Hub, with drawn images,
a model that says what it is told to, and its scores."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, List, Value
from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from PIL import Image as Pictures

from mmkd.evaluation.manager import find_tasks
from mmkd.evaluation.scored import collect_scores, simple_evaluate

Row = dict[str, Any]


def picture(colour: str = "orange") -> Pictures.Image:
    return Pictures.new("RGB", (64, 64), colour)


def put(rows: Sequence[Row], path: Path) -> Path:
    """Write rows as `datasets` writes them for the Hub; PIL images become the type Image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(list(rows), features=features(rows[0])).to_parquet(path)
    return path


def features(row: Row) -> Features:
    return Features({name: _kind(value) for name, value in row.items()})


def _kind(value: Any) -> Any:
    if isinstance(value, list):
        return List(_kind(value[0]))
    if isinstance(value, dict):
        return {name: _kind(inner) for name, inner in value.items()}
    if value is None or isinstance(value, Pictures.Image):
        return Image()
    return Value({str: "string", int: "int64"}[type(value)])


def pope(number: int, answer: str, category: str = "random") -> Row:
    return {
        "id": str(number),
        "question_id": str(number),
        "question": f"Is there a cat in the image {number}?",
        "answer": answer,
        "image_source": f"COCO_val2014_{number}",
        "image": picture(),
        "category": category,
    }


def mme(question_id: str, category: str, answer: str) -> Row:
    return {
        "question_id": question_id,
        "image": picture(),
        "question": f"Is the answer {answer}? Please answer yes or no.",
        "answer": answer,
        "category": category,
    }


def scienceqa(choices: list[str], answer: int, hint: str = "", image: Any = "drawn") -> Row:
    return {
        "image": picture() if image == "drawn" else image,
        "question": "Which of these is a bird?",
        "choices": choices,
        "answer": answer,
        "hint": hint,
        "task": "closed choice",
        "grade": "grade2",
        "subject": "natural science",
        "topic": "biology",
        "category": "Animals",
        "skill": "Identify birds",
        "lecture": "",
        "solution": "",
    }


def mmbench(number: int, answer: str) -> Row:
    return {
        "index": number,
        "question": f"What is shown in picture {number}?",
        "hint": "nan",
        "answer": answer,
        **{"A": "a lake", "B": "a mountain", "C": "a street", "D": "nan"},
        "category": "image_scene",
        "image": picture(),
        "source": "drawn",
        "L2-category": "coarse_perception",
        "comment": "nan",
        "split": "dev",
    }


def annotators(*answers: str) -> list[str]:
    """Ten answers of people, the last repeated."""
    return [*answers, *[answers[-1]] * (10 - len(answers))]


def textvqa(question_id: int, answers: list[str]) -> Row:
    return {
        "image_id": f"picture-{question_id}",
        "question_id": question_id,
        "question": "what does the sign say?",
        "question_tokens": ["what", "does", "the", "sign", "say"],
        "image": picture(),
        "image_width": 64,
        "image_height": 64,
        "flickr_original_url": "",
        "flickr_300k_url": "",
        "answers": answers,
        "image_classes": ["Sign"],
        "set_name": "val",
        "ocr_tokens": ["STOP"],
    }


def vqav2(question_id: int, answers: list[str]) -> Row:
    return {
        "question_type": "what",
        "multiple_choice_answer": answers[-1],
        "answers": [
            {"answer": text, "answer_confidence": "yes", "answer_id": number}
            for number, text in enumerate(answers, start=1)
        ],
        "image_id": question_id,
        "answer_type": "other",
        "question_id": question_id,
        "question": "What is on the table?",
        "image": picture(),
    }


def vizwiz(question_id: str, answers: list[str]) -> Row:
    return {
        "question_id": question_id,
        "image": picture(),
        "question": "What is this?",
        "answers": answers,
        "category": "other",
    }


def seed(question_id: str, data_type: str, answer: str) -> Row:
    return {
        "answer": answer,
        **{"choice_a": "One", "choice_b": "Two", "choice_c": "Three", "choice_d": "Four"},
        "data_id": question_id,
        "data_type": data_type,
        "question": "How many dogs are there?",
        "question_id": question_id,
        "question_type_id": 5,
        "image": [picture(), picture("blue")] if data_type == "video" else [picture()],
        "segment": ["0", "1"],
    }


def ai2d(answer: str) -> Row:
    return {
        "question": "Which letter marks the root?",
        "options": ["a", "b", "c", "d"],
        "answer": answer,
        "image": picture(),
    }


def chartqa(kind: str, answer: str) -> Row:
    question = "What is the largest value?"
    return {"type": kind, "question": question, "answer": answer, "image": picture()}


def mmmu(number: int, question_type: str, options: str, answer: str) -> Row:
    return {
        "id": f"validation_Art_{number}",
        "question": "In <image 1>, what is shown beside <image 2>?",
        "options": options,
        "explanation": "",
        "image_1": picture(),
        "image_2": picture("blue"),
        **{f"image_{i}": None for i in range(3, 8)},
        "img_type": "['Paintings']",
        "answer": answer,
        "topic_difficulty": "Easy",
        "question_type": question_type,
        "subfield": "Painting",
    }


class Scripted(lmms):
    """Says `answer(document)`, and keeps the messages that it was asked with.

    Args:
        answer: from a row to the words of the model; or words by position.
    """

    is_simple = False
    batch_size = 1

    def __init__(self, answer: Callable[[Mapping[str, Any]], str] | Sequence[str]) -> None:
        super().__init__()
        self.answer = answer
        self.asked: dict[int, list[dict[str, Any]]] = {}

    def generate_until(self, requests: list[Any]) -> list[GenerationResult]:
        found = []
        for _, to_messages, _, doc_id, task, split in (r.args for r in requests):
            document = self.task_dict[task][split][doc_id]
            self.asked[doc_id] = to_messages(document)
            said = self.answer(document) if callable(self.answer) else self.answer[doc_id]
            found.append(GenerationResult(said))
        return found

    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        raise NotImplementedError

    def generate_until_multi_round(self, requests: list[Any]) -> list[Any]:
        raise NotImplementedError


def scored(
    task: str, local: Path, answers: Sequence[str], limit: int | None = None
) -> tuple[dict[str, float], Scripted]:
    """Scores of a model that gives these answers, and the model."""
    manager = find_tasks([task], None, local)
    model = Scripted(answers)
    raw = simple_evaluate(model, manager.chosen.names, manager, limit)
    (scores,) = collect_scores(raw, manager.chosen.names).values()
    return scores, model


def texts(messages: list[dict[str, Any]]) -> str:
    return "".join(p["text"] for p in messages[0]["content"] if p["type"] == "text")


def pictures(messages: list[dict[str, Any]]) -> list[Any]:
    return [p["url"] for p in messages[0]["content"] if p["type"] == "image"]
