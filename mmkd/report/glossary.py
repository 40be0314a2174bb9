"""What the columns of the score tables mean, in a sentence each."""

from collections.abc import Iterable, Sequence

from mmkd.report.metrics import COST, Column

POPE = (
    "Yes/no questions whether an object is in the picture, answered right. Objects that are not "
    "there are drawn at random, are the most frequent ones of the training pictures, or are those "
    "that most often stand beside what is there (adversarial)."
)
SHIFTED = "The same on drawings, and on colours of objects, that training did not show."
SIZE = "How many numbers the model consists of, and how large its weight files are."
ABOUT: dict[tuple[str, str], str] = {
    **{("scenes_pope", f"pope_{k}_accuracy"): POPE for k in ("random", "popular", "adversarial")},
    ("scenes_pope", "pope_yes_rate"): "How often the model answers yes to these questions. Yes is "
    "right for half of them: far more or far less than 50 % is a bias.",
    ("scenes_vqa", "vqa_accuracy"): "Short answers that are right, over all kinds of questions.",
    ("scenes_vqa_assets", "vqa_accuracy"): SHIFTED,
    ("scenes_vqa_attributes", "vqa_accuracy"): SHIFTED,
    ("scenes_caption", "caption_chair_s"): "Captions that name at least one object that is not "
    "in the picture.",
    ("scenes_caption", "caption_chair_i"): "Named objects that are not in the picture.",
    ("scenes_caption", "caption_object_recall"): "Objects of the pictures that captions name.",
    ("scenes_caption", "caption_bleu"): "BLEU-4: how far words and phrases of up to four words "
    "agree with the one true caption. Saying the same in other words lowers it.",
    (COST, "parameters"): SIZE,
    (COST, "weights_bytes"): SIZE,
    (COST, "tokens_per_second"): "Tokens that the model generated per second in its evaluation. It "
    "depends on the machine, on what else ran there and on how long the answers are: no model is "
    "marked as best.",
}
TASKS = {
    "pope": "Yes/no questions on photographs whether an object is there (POPE).",
    "mme": "Sum over categories of accuracy and accuracy+: at most 2,000 for perception and 800 "
    "for cognition.",
}


def glossary(columns: Iterable[Column]) -> list[tuple[str, str]]:
    """(column, what it means) of the columns, those of one meaning together."""
    found: dict[str, list[Column]] = {}
    for column in columns:
        found.setdefault(meaning(column), []).append(column)
    return [(_names(some), text) for text, some in found.items()]


def meaning(column: Column) -> str:
    """What a column's numbers are; of a task that is not known here, where they come from."""
    task, metric = column.key
    if column.key in ABOUT:
        return ABOUT[column.key]
    said = f"lmms-eval’s {metric} of its task {task}."
    return f"{TASKS[task]} {said}" if task in TASKS else said


def _names(columns: Sequence[Column]) -> str:
    """POPE random, popular: the group once."""
    group = f"{columns[0].group} " if len({c.group for c in columns}) == 1 else ""
    names = (c.title if group else c.name for c in columns)
    return f"{group.strip()} {', '.join(names)}".strip()
