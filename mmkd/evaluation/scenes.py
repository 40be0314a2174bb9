"""Scoring of the scene tasks: what `mmkd/evaluation/tasks/*.yaml` points at.

lmms-eval calls a `process_*` function once per document. It returns `{metric name: verdict}`;
lmms-eval collects the verdicts per metric name and hands each list to the aggregation that the
YAML names for it. A document only contributes to the metrics of its own kind, so the aggregations
(`accuracy`, `precision`, ...) need not know kinds. A verdict is a plain dict with at least

    id, question, answer, prediction: str      correct: bool

and every score is a fraction between 0 and 1.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mmkd.data.images import picture_as_rgb
from mmkd.data.scenes.vocabulary import CLASSES
from mmkd.evaluation.refusals import Unanswered

Document = Mapping[str, Any]
Verdict = dict[str, Any]

POPE_MEASURES = ("accuracy", "precision", "recall", "f1", "yes_rate")
VQA_MEASURES = ("accuracy", "majority_accuracy")
CAPTION_MEASURES = ("chair_s", "chair_i", "object_recall", "bleu")

_WORD = re.compile(r"[a-z0-9]+")
_NUMBER = re.compile(r"\d+")
_LETTER = re.compile(r"\(?([a-d])(?:[.):]|$)")
_OBJECT_WORDS = {c.name: c.name for c in CLASSES} | {c.plural: c.name for c in CLASSES}


def with_pictures(dataset: Any) -> Any:
    """Give the column `image` its type: decoded on access, left out where no picture is needed."""
    import datasets

    return dataset.cast_column("image", datasets.Image())


def images(doc: Document) -> list[Any]:
    """The document's one picture, RGB."""
    return [picture_as_rgb(doc["image"])]


def normalise(text: str) -> str:
    """Lower case, single spaces, no punctuation around the text."""
    return " ".join(text.lower().split()).strip(" .,;:!?\"'`*")


def yes_or_no(text: str) -> str | None:
    """The answer when its first word is exactly yes or no, else None."""
    first = normalise(text).split(" ", 1)[0]
    word = normalise(first)
    return word if word in ("yes", "no") else None


def _read_answer(kind: str, prediction: str) -> str | None:
    if kind in ("existence", "relation"):
        return yes_or_no(prediction)
    text = normalise(prediction)
    if kind == "choice":
        letter = _LETTER.match(text)
        return letter and letter.group(1)
    return text


def _verdict(doc: Document, prediction: str, correct: bool, **more: Any) -> Verdict:
    return {
        "id": doc["id"],
        "question": doc["question"],
        "answer": doc["answer"],
        "prediction": prediction,
        "correct": correct,
        **more,
    }


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed) if listed else 0.0


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def process_pope(doc: Document, results: Sequence[str]) -> dict[str, Verdict]:
    """Judge one yes/no question; it counts for its kind of negatives and overall."""
    said = yes_or_no(results[0])
    verdict = _verdict(
        doc, results[0], said == normalise(doc["answer"]), category=doc["category"], said=said
    )
    prefixes = ("pope", f"pope_{doc['category']}")
    return {f"{prefix}_{measure}": verdict for prefix in prefixes for measure in POPE_MEASURES}


def accuracy(verdicts: Sequence[Verdict]) -> float:
    """Share of correct answers; an answer that is neither yes nor no is wrong."""
    return _mean(float(v["correct"]) for v in verdicts)


def _true_yes(verdicts: Sequence[Verdict]) -> int:
    return sum(v["said"] == "yes" and v["answer"] == "yes" for v in verdicts)


def precision(verdicts: Sequence[Verdict]) -> float:
    """Of the predicted yes, the share that is right; 0 when yes is never said."""
    return _ratio(_true_yes(verdicts), sum(v["said"] == "yes" for v in verdicts))


def recall(verdicts: Sequence[Verdict]) -> float:
    """Of the true yes, the share that was answered yes; 0 when there is no true yes."""
    return _ratio(_true_yes(verdicts), sum(v["answer"] == "yes" for v in verdicts))


def f1(verdicts: Sequence[Verdict]) -> float:
    """Harmonic mean of precision and recall; 0 when both are 0."""
    p, r = precision(verdicts), recall(verdicts)
    return _ratio(2 * p * r, p + r)


def yes_rate(verdicts: Sequence[Verdict]) -> float:
    """Share of predictions that say yes (the model's bias, not the ground truth's ratio)."""
    return _mean(float(v["said"] == "yes") for v in verdicts)


def process_vqa(doc: Document, results: Sequence[str]) -> dict[str, Verdict]:
    """Judge one short answer; it counts for its question kind and overall.

    Yes/no kinds are judged by their first word, choices by their letter ("D", "d." or "D. grape"),
    all others by equality after `normalise`.
    """
    kind = doc["kind"]
    correct = _read_answer(kind, results[0]) == normalise(doc["answer"])
    verdict = _verdict(doc, results[0], correct, kind=kind)
    prefixes = ("vqa", f"vqa_{kind}")
    return {f"{prefix}_{measure}": verdict for prefix in prefixes for measure in VQA_MEASURES}


def majority_accuracy(verdicts: Sequence[Verdict]) -> float:
    """Accuracy of a blind answerer who knows each kind's most frequent answer.

    Counted on the very documents that are scored, so it is the best any constant answer per kind
    can reach on them.
    """
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for v in verdicts:
        answers[v["kind"]][normalise(v["answer"])] += 1
    return _ratio(sum(max(c.values()) for c in answers.values()), len(verdicts))


def mentioned_objects(caption: str) -> list[str]:
    """Object classes a caption names, singular or plural, in order, repetitions included."""
    return [_OBJECT_WORDS[w] for w in _WORD.findall(caption.lower()) if w in _OBJECT_WORDS]


def process_caption(doc: Document, results: Sequence[str]) -> dict[str, Verdict]:
    """Compare the objects of one caption with the picture's.

    `correct` means that every object is named, none is invented, and numbers are right.
    """
    present = set(doc["objects"])
    mentioned = mentioned_objects(results[0])
    # An empty caption invents nothing, but a picture that could not be asked about is no success.
    unanswered = {"unanswered": True} if isinstance(results[0], Unanswered) else {}
    verdict = _verdict(
        doc,
        results[0],
        set(mentioned) == present
        and _NUMBER.findall(results[0]) == _NUMBER.findall(str(doc["answer"])),
        objects=sorted(present),
        mentioned=mentioned,
        hallucinated=[name for name in mentioned if name not in present],
        **unanswered,
    )
    return {f"caption_{measure}": verdict for measure in CAPTION_MEASURES}


def chair_s(verdicts: Sequence[Verdict]) -> float:
    """Share of captions with at least one hallucinated object (lower is better).

    A picture that could not be asked about counts as such a caption.
    """
    return _mean(float(bool(v["hallucinated"]) or v.get("unanswered", False)) for v in verdicts)


def chair_i(verdicts: Sequence[Verdict]) -> float:
    """Share of object mentions that are hallucinated (lower is better).

    Every mention counts, as in the authors' code; 0 when no caption names an object, which
    `object_recall` then shows.
    """
    return _ratio(
        sum(len(v["hallucinated"]) for v in verdicts), sum(len(v["mentioned"]) for v in verdicts)
    )


def object_recall(verdicts: Sequence[Verdict]) -> float:
    """Share of the pictures' object classes that their captions name, over all pictures."""
    found = sum(len(set(v["mentioned"]) & set(v["objects"])) for v in verdicts)
    return _ratio(found, sum(len(v["objects"]) for v in verdicts))


def bleu(verdicts: Sequence[Verdict]) -> float:
    """Corpus BLEU-4 of the captions against their one reference, sacrebleu's default, over 100."""
    import sacrebleu

    predictions = [v["prediction"] for v in verdicts]
    references = [v["answer"] for v in verdicts]
    return float(sacrebleu.corpus_bleu(predictions, [references]).score) / 100
