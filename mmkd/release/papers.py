"""The papers of a recipe's methods, as cited in the modules of the methods."""

from typing import Any, NamedTuple

from mmkd.objectives import ObjectiveConfig
from mmkd.recipe import ConversionConfig, MambaConfig, MoeConfig, Recipe


class Paper(NamedTuple):
    name: str
    arxiv: str


ALM = Paper("ALM", "2503.20083")
F_DISTILL = Paper("f-distill", "2502.15681")
GKD = Paper("GKD", "2306.13649")
SCRG = Paper("SCRG", "2407.10068")
DISTILLM = Paper("DistiLLM", "2402.03898")
LLAVA_KD = Paper("LLaVA-KD", "2410.16236")
LLAVA_MOD = Paper("LLaVA-MoD", "2408.15881")
MOHAWK = Paper("MOHAWK", "2408.10189")
MATVLM = Paper("MaTVLM", "2503.13440")
MMMAMBA = Paper("mmMamba", "2502.13145")
MAMBA_2 = Paper("Mamba-2", "2405.21060")
MAMBA_IN_LLAMA = Paper("MambaInLlama", "2408.15237")
DMAE = Paper("DMAE", "2208.12256")
LORA = Paper("LoRA", "2106.09685")
DORA = Paper("DoRA", "2402.09353")
OFA_KD = Paper("OFA-KD", "2310.19444")
SQUARE_HEAD = Paper("SquareHead", "2310.06927")
UPCYCLING = Paper("Komatsuzaki et al.", "2212.05055")

_OBJECTIVES = {
    "kl": [Paper("knowledge distillation", "1503.02531")],
    "reverse_kl": [Paper("MiniLLM", "2306.08543")],
    "jsd": [GKD],
    "skew_kl": [DISTILLM],
    "skew_reverse_kl": [DISTILLM],
    "soft_reverse_kl": [F_DISTILL],
    "hellinger": [F_DISTILL],
    "neyman": [F_DISTILL],
    "tvd": [Paper("total variation", "2307.15190")],
    "sinkhorn": [Paper("SinKD", "2402.17110")],
    "alm": [ALM],
    "uld": [Paper("ULD", "2402.12030")],
    "relation": [LLAVA_KD],
    "minilm": [Paper("MiniLMv2", "2012.15828")],
    "enhanced": [OFA_KD],
    "exits": [Paper("MoSE", "2503.03008")],
    "embedding": [Paper("VL2V-ADiP", "2310.08255")],
    "mutual": [Paper("Poole et al.", "1905.06922"), Paper("Distiller", "2109.11105")],
    "affinity": [Paper("TinyCLIP", "2309.12314")],
    "token_labels": [Paper("token labelling", "2104.10858")],
    "balance": [Paper("Fedus et al.", "2101.03961")],
    "router_z": [Paper("router z-loss", "2202.08906")],
    "mixer_mse": [MMMAMBA],
    "hidden_mse": [Paper("TinyBERT", "1909.10351")],
    "matrix": [MOHAWK],
}
_PREFERENCES = {
    "kto_pair": [LLAVA_MOD, Paper("KTO", "2402.01306")],
    "sigmoid": [Paper("DPO", "2305.18290")],
    "ipo": [Paper("IPO", "2310.12036")],
    "hinge": [Paper("SLiC", "2305.10425")],
}
_SEEDING = {"default": [], "inherit": [MAMBA_IN_LLAMA, MATVLM], "mimic": [MMMAMBA], "exact": []}


def papers(recipe: Recipe) -> list[Paper]:
    """Each paper once, in the order in which the recipe meets them."""
    found: list[Paper] = []
    for conversions in (recipe.student.convert, *(s.convert for s in recipe.stages)):
        found += [p for conversion in conversions for p in _of_conversion(conversion)]
    for stage in recipe.stages:
        found += [p for objective in stage.objectives for p in _of_objective(objective)]
        if stage.on_policy is not None:
            found += [GKD, SCRG] if stage.on_policy.correct else [GKD]
        found += [DMAE] if stage.image_tokens else []
        found += [ALM] if stage.balance_gradients else []
        if stage.train.lora is not None:
            found += [LORA, DORA] if stage.train.lora.dora else [LORA]
    return list(dict.fromkeys(found))


def _of_conversion(conversion: ConversionConfig) -> list[Paper]:
    if isinstance(conversion, MambaConfig):
        return [MAMBA_2, *_SEEDING[conversion.init]]
    return [UPCYCLING] if isinstance(conversion, MoeConfig) else []


def _of_objective(objective: Any) -> list[Paper]:
    if objective.kind == "preference":
        return _PREFERENCES[objective.loss]
    if objective.kind == "layer_l2":
        return [MOHAWK if objective.at == "mixer" else MATVLM]
    if objective.kind == "kl" and objective.region == "vision":
        return [LLAVA_KD]
    if objective.kind == "hidden_mse" and objective.normalize == "token":
        return [SQUARE_HEAD]
    found = _OBJECTIVES.get(objective.kind, [])
    inner = getattr(objective, "loss", None)
    return found + _of_objective(inner) if isinstance(inner, ObjectiveConfig) else found
