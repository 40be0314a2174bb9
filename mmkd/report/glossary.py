"""A description of each column of the score tables."""

from collections.abc import Iterable, Sequence

from mmkd.recipe import ANSWER_ECE, TOKEN_ECE
from mmkd.report.metrics import COST, Column

POPE = (
    "Share of right answers to yes/no questions whether an object is in the image. Where the "
    "answer is no, the object is drawn at random (random), is one of the most frequent objects of "
    "the training images (popular), or is one that often appears together with the image’s "
    "objects (adversarial)."
)
SHIFTED = "The same for drawings, or colours of objects, that the training images do not have."
OF_ECE = {
    ANSWER_ECE: "Expected calibration error of questions that are answered with yes or no, or with "
    "the letter of an option: the mean distance between the probability of the most likely option "
    "and the share of right ones. 0 is perfect.",
    TOKEN_ECE: "Expected calibration error of the tokens of the true answers: the mean distance "
    "between the probability of the most likely next token and the share of right ones.",
}
SIZE = (
    "Number of parameters, and size of the weight files; “16 bit” is two bytes per parameter, for "
    "models whose files have different dtypes."
)
ABOUT: dict[tuple[str, str], str] = {
    **{("scenes_pope", f"pope_{k}_accuracy"): POPE for k in ("random", "popular", "adversarial")},
    ("scenes_pope", "pope_yes_rate"): "Share of these questions that the model answers with yes. "
    "Yes is right for half of them, so a value far from 50 % is a bias.",
    **{(task, ANSWER_ECE): OF_ECE[ANSWER_ECE] for task in ("scenes_pope", "scenes_vqa")},
    ("scenes_caption", TOKEN_ECE): OF_ECE[TOKEN_ECE],
    ("scenes_vqa", "vqa_accuracy"): "Share of right short answers, over all kinds of questions.",
    ("scenes_vqa_assets", "vqa_accuracy"): SHIFTED,
    ("scenes_vqa_attributes", "vqa_accuracy"): SHIFTED,
    ("scenes_caption", "caption_chair_s"): "Share of captions that name at least one object that "
    "is not in the image.",
    ("scenes_caption", "caption_chair_i"): "Share of named objects that are not in the image.",
    ("scenes_caption", "caption_object_recall"): "Share of the images’ objects that the captions "
    "name.",
    (
        "scenes_caption",
        "caption_bleu",
    ): "BLEU-4: agreement of words and phrases of up to four "
    "words with the reference caption. A right caption in other words gets a low value.",
    (COST, "parameters"): SIZE,
    (COST, "weights_bytes"): SIZE,
    (COST, "tokens_per_second"): "Tokens that the model generated per second in its evaluation. "
    "They depend on the machine, its load and the length of the answers, so no model is marked as "
    "best.",
}
TASKS = {
    "pope": "Yes/no questions whether an object is in a photograph (POPE).",
    "mme": "Sum over categories of accuracy and accuracy+: at most 2,000 for perception and 800 "
    "for cognition.",
}


def glossary(columns: Iterable[Column]) -> list[tuple[str, str]]:
    """(columns, meaning); columns with the same meaning share an entry."""
    found: dict[str, list[Column]] = {}
    for column in columns:
        found.setdefault(meaning(column), []).append(column)
    return [(_names(some), text) for text, some in found.items()]


def meaning(column: Column) -> str:
    """The meaning of a column's numbers, or their origin if the task is unknown."""
    task, metric = column.key
    if column.key in ABOUT:
        return ABOUT[column.key]
    if metric in OF_ECE:
        return OF_ECE[metric]
    said = f"Metric {metric} of lmms-eval’s task {task}."
    return f"{TASKS[task]} {said}" if task in TASKS else said


def _names(columns: Sequence[Column]) -> str:
    """The names of columns, with the name of their group once, such as "POPE random, popular"."""
    group = f"{columns[0].group} " if len({c.group for c in columns}) == 1 else ""
    names = (c.title if group else c.name for c in columns)
    return f"{group.strip()} {', '.join(names)}".strip()
