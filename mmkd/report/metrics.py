"""The headline metrics, their names, and which direction is better."""

from dataclasses import dataclass
from typing import Literal

from mmkd.recipe import ANSWER_ECE, TOKEN_ECE

Better = Literal["higher", "lower"] | None
# percent: a share of 1; points: a share of 100
Unit = Literal["percent", "points", "number", "count", "bytes", "times"]
Key = tuple[str, str]  # task, metric
COST = ""  # the task of columns with costs of a model


@dataclass(frozen=True)
class Column:
    """One column of a score table; `better` is None if neither direction is better."""

    key: Key
    group: str
    title: str
    better: Better = "higher"
    unit: Unit = "percent"

    @property
    def name(self) -> str:
        return f"{self.group} {self.title}".strip()

    @property
    def is_share(self) -> bool:
        """Whether the value is shown with a percent sign."""
        return self.unit in ("percent", "points")


HEADLINE: dict[str, list[Column]] = {
    "scenes_pope": [
        Column(("scenes_pope", "pope_random_accuracy"), "POPE", "random"),
        Column(("scenes_pope", "pope_popular_accuracy"), "POPE", "popular"),
        Column(("scenes_pope", "pope_adversarial_accuracy"), "POPE", "adversarial"),
        Column(("scenes_pope", "pope_yes_rate"), "POPE", "says yes", None),
        Column(("scenes_pope", ANSWER_ECE), "POPE", "ECE", "lower"),
    ],
    "scenes_vqa": [
        Column(("scenes_vqa", "vqa_accuracy"), "VQA", "all kinds"),
        Column(("scenes_vqa", ANSWER_ECE), "VQA", "ECE", "lower"),
    ],
    "scenes_vqa_assets": [Column(("scenes_vqa_assets", "vqa_accuracy"), "VQA", "new drawings")],
    "scenes_vqa_attributes": [
        Column(("scenes_vqa_attributes", "vqa_accuracy"), "VQA", "new colours")
    ],
    "scenes_caption": [
        Column(("scenes_caption", "caption_chair_s"), "Caption", "CHAIR-s", "lower"),
        Column(("scenes_caption", "caption_chair_i"), "Caption", "CHAIR-i", "lower"),
        Column(("scenes_caption", "caption_object_recall"), "Caption", "objects named"),
        Column(("scenes_caption", "caption_bleu"), "Caption", "BLEU"),
        Column(("scenes_caption", TOKEN_ECE), "Caption", "token ECE", "lower"),
    ],
    # lmms-eval's own; its pope_yes_ratio is the data's share of yes, not the answers'
    "pope": [
        Column(("pope", "pope_accuracy"), "POPE", "accuracy"),
        Column(("pope", "pope_precision"), "POPE", "precision"),
        Column(("pope", "pope_recall"), "POPE", "recall"),
        Column(("pope", "pope_f1_score"), "POPE", "F1"),
    ],
    # sums over categories of accuracy and accuracy+, of at most 2000 and 800
    "mme": [
        Column(("mme", "mme_perception_score"), "MME", "perception", unit="number"),
        Column(("mme", "mme_cognition_score"), "MME", "cognition", unit="number"),
    ],
    "mmbench_en_dev_static": [
        Column(("mmbench_en_dev_static", "gpt_eval_score"), "MMBench", "EN dev", unit="points")
    ],
    "gqa": [Column(("gqa", "exact_match"), "GQA", "exact match")],
    "scienceqa": [Column(("scienceqa", "exact_match"), "ScienceQA", "all")],
    "scienceqa_img": [Column(("scienceqa_img", "exact_match"), "ScienceQA", "with image")],
    "textvqa_val": [Column(("textvqa_val", "exact_match"), "TextVQA", "val")],
    "vqav2_val": [Column(("vqav2_val", "exact_match"), "VQAv2", "val")],
    "vizwiz_vqa_val": [Column(("vizwiz_vqa_val", "exact_match"), "VizWiz", "val")],
    "seedbench": [
        Column(("seedbench", "seed_image"), "SEED", "image"),
        Column(("seedbench", "seed_video"), "SEED", "video"),
        Column(("seedbench", "seed_all"), "SEED", "all"),
    ],
    "ai2d": [Column(("ai2d", "exact_match_flexible-extract"), "AI2D", "exact match")],
    "chartqa": [
        Column(("chartqa", "relaxed_human_split"), "ChartQA", "human"),
        Column(("chartqa", "relaxed_augmented_split"), "ChartQA", "augmented"),
        Column(("chartqa", "relaxed_overall"), "ChartQA", "overall"),
    ],
    "mmmu_val": [Column(("mmmu_val", "mmmu_acc"), "MMMU", "val")],
}
# Speed is not ranked, because tokens/s differ between equal students too.
COSTS = [
    Column((COST, "parameters"), "Model", "parameters", "lower", "count"),
    Column((COST, "weights_bytes"), "Model", "weights", "lower", "bytes"),
    Column((COST, "tokens_per_second"), "Model", "tokens/s", None, "number"),
]
ECE = (ANSWER_ECE, TOKEN_ECE)
VQA_OVERALL, VQA_MAJORITY = "vqa_accuracy", "vqa_majority_accuracy"

_LOWER = ("chair", "hallucin", "error", "perplexity", "loss", "wer", "cer", "ece")
_HIGHER = ("acc", "exact_match", "f1", "precision", "recall", "bleu", "rouge", "cider", "anls",
           "score", "meteor", "spice", "relaxed")  # fmt: skip
_NEITHER = ("yes_rate", "majority", "invalid_rate")


def direction(metric: str) -> Better:
    """Whether larger values are better, from the metric's name; None if the name does not tell."""
    words = metric.lower().replace("-", "_").split("_")
    if any(part in metric for part in _NEITHER):
        return None
    if any(part in word if len(part) > 3 else part == word for word in words for part in _LOWER):
        return "lower"
    return "higher" if any(part in metric.lower() for part in _HIGHER) else None


def headline_columns(task: str, metrics: list[str]) -> list[Column]:
    """The columns of a task: its headline metrics, or all metrics if none are defined. Tasks with
    a calibration of answers also have its error, except for the harder splits of the scenes."""
    listed = HEADLINE.get(task, [])
    known = [c for c in listed if c.key[1] in metrics]
    if not known:
        return all_columns(task, metrics, unit="number")
    if ANSWER_ECE in metrics and not task.startswith("scenes_"):
        known.append(Column((task, ANSWER_ECE), known[0].group, "ECE", "lower"))
    return known


def all_columns(task: str, metrics: list[str], unit: Unit | None = None) -> list[Column]:
    """Every metric of a task as a column."""
    known = HEADLINE.get(task, [])
    unit = unit or (known[0].unit if known else "number")
    named = {c.key[1]: c.better for c in known}
    return [
        Column(
            (task, m),
            task,
            m.replace("_", " "),
            named.get(m, direction(m)),
            "percent" if m in ECE else unit,
        )
        for m in metrics
    ]


def vqa_kinds(metrics: list[str]) -> list[str]:
    """Question kinds that a VQA task reports, in its order."""
    if VQA_OVERALL not in metrics:
        return []
    kinds = [m.removeprefix("vqa_").removesuffix("_accuracy") for m in metrics if _is_kind(m)]
    return [kind for kind in kinds if f"vqa_{kind}_majority_accuracy" in metrics]


def _is_kind(metric: str) -> bool:
    ends = metric.startswith("vqa_") and metric.endswith("_accuracy")
    return ends and not metric.endswith("majority_accuracy") and metric != VQA_OVERALL
