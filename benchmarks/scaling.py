"""What distilling a 7B teacher takes on 1, 8 and 64 GPUs, by the formulas of `mmkd plan`.

    python -m benchmarks.scaling --json runs/bench/scaling.json

Computed, not run: sizes of real architectures, a mean record, memory of one GPU, and days for the
665,000 records of LLaVA-1.5's fine-tuning at a share of the GPU's peak.
"""

import argparse
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.measure import save
from mmkd.commands.plan import plan_stage
from mmkd.commands.plan.costs import Sample
from mmkd.modeling.loading import parameter_count, skeleton
from mmkd.recipe import load_recipe
from mmkd.runtime import distributed
from mmkd.runtime.progress import console

RECORDS = 665_000
TOTAL = 128
PEAK = {80: 989e12, 24: 165e12}
"""Dense bfloat16 FLOP/s of a GPU of so many GiB: H100 SXM, RTX 4090 (vendor's data sheets)."""

QWEN2_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
}
QWEN2_HALF_B = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
QWEN25_3B = {
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "vision_use_head": False,
}


def onevision(text: dict[str, Any]) -> dict[str, Any]:
    text = {"model_type": "qwen2", **text}
    return {"model_type": "llava_onevision", "vision_config": SIGLIP, "text_config": text}


def qwen25_vl(text: dict[str, Any]) -> dict[str, Any]:
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": text["hidden_size"],
    }
    tie = text.get("tie_word_embeddings", False)
    return {
        "model_type": "qwen2_5_vl",
        "vision_config": vision,
        "text_config": text,
        "tie_word_embeddings": tie,
    }


PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "LLaVA-OneVision 7B -> 0.5B": (onevision(QWEN2_7B), onevision(QWEN2_HALF_B)),
    "Qwen2.5-VL 7B -> 3B": (qwen25_vl(QWEN2_7B), qwen25_vl(QWEN25_3B)),
}
# One image, a question and an answer: image tokens, patches, pixel values of a patch.
PICTURES = {
    "LLaVA-OneVision 7B -> 0.5B": (5 * 729, 5 * 729, 3 * 14**2),  # four tiles and the whole
    "Qwen2.5-VL 7B -> 3B": (1024, 4096, 2 * 3 * 14**2),
}
WORDS, ANSWER = 256, 128
STAGE: dict[str, Any] = {
    "name": "distil",
    "train": ["connector", "language_model"],
    "objectives": [
        {"kind": "ce"},
        {"kind": "kl"},
        {"kind": "kl", "name": "kl_vision", "region": "vision"},
    ],
    "precision": "bfloat16",
    "activation_checkpointing": True,
}
TORCH: dict[str, Any] = {"kind": "torch"}


def zero(stage: int, offload: str = "none") -> dict[str, Any]:
    return {"kind": "deepspeed", "zero": stage, "offload": offload}


# pair, GPUs, GiB of each, engine, teacher
SETTINGS: list[tuple[str, int, int, dict[str, Any], str]] = [
    *[
        (pair, gpus, 80, engine, "replicated")
        for pair in PAIRS
        for gpus, engine in (
            (1, TORCH),
            (1, zero(2)),
            (1, zero(2, "optimizer")),
            (8, zero(2)),
            (64, zero(2)),
        )
    ],
    *[
        (pair, 8, 24, engine, teacher)
        for pair in PAIRS
        for engine, teacher in ((zero(2), "replicated"), (zero(2), "sharded"), (zero(3), "sharded"))
    ],
]


def sample(pair: str) -> Sample:
    tokens, patches, values = PICTURES[pair]
    length = float(tokens + WORDS)
    rows = {"ce": float(ANSWER), "kl": float(ANSWER), "kl_vision": float(tokens)}
    return Sample(length, length, float(ANSWER), float(tokens), float(patches * values), rows)


def size(
    pair: str, gpus: int, gib: int, engine: dict[str, Any], placement: str, share: float
) -> dict[str, Any]:
    """Memory of one GPU, FLOPs of a step, and days for all records at that share of the peak."""
    teacher, student = PAIRS[pair]
    micro = 2 if gib == 80 else 1
    recipe = load_recipe(
        {
            "name": "sized",
            "teacher": {
                "config": teacher,
                "processor": "-",
                "dtype": "bfloat16",
                "placement": placement,
            },
            "student": {"config": student, "processor": "-"},
            "data": {"train": "-"},
            "stages": [
                {
                    **STAGE,
                    "epochs": 1,
                    "batch": {"size": micro, "total": TOTAL},
                    "engine": engine,
                }
            ],
        }
    )
    assert recipe.teacher is not None
    with distributed.imagined(gpus, gib * 2**30):
        whole = skeleton(recipe.teacher)
        plan = plan_stage(
            recipe, recipe.stages[0], None, {recipe.teacher.name: whole}, (sample(pair), RECORDS)
        )
    flops = plan["flops_per_step"]["total"] / TOTAL * RECORDS
    memory = plan["memory_bytes"]
    name = "torch" if engine["kind"] == "torch" else f"ZeRO {engine['zero']}"
    if engine.get("offload", "none") != "none":
        name += f", {engine['offload']} on the CPU"
    return {
        "pair": pair,
        "gpus": gpus,
        "gib": gib,
        "engine": name,
        "teacher": placement,
        "records_at_once": micro,
        "teacher_parameters": parameter_count(whole),
        "student_parameters": plan["parameters"],
        "student_bytes": sum(memory[k] for k in ("student_weights", "gradients", "optimizer")),
        "teacher_bytes": memory["teacher_weights"],
        "other_bytes": sum(memory[k] for k in ("activations", "teacher_activations", "head_chunk")),
        "total_bytes": memory["total"],
        "cpu_bytes": memory["cpu"],
        "fits": memory["total"] <= gib * 2**30,
        "days": flops / (gpus * PEAK[gib] * share) / 86400,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=0.35, help="of the peak that is reached")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    sizes = [size(*setting, args.share) for setting in SETTINGS]
    report(sizes)
    save(args, sizes=sizes)


def report(sizes: list[dict[str, Any]]) -> None:
    for pair in PAIRS:
        mine = [s for s in sizes if s["pair"] == pair]
        counts = [mine[0][f"{who}_parameters"] / 1e9 for who in ("teacher", "student")]
        table = Table(title="{}: {:.2f} -> {:.2f} B parameters".format(pair, *counts))
        for name in ("GPUs", "engine", "teacher", "student", "teacher", "rest", "GiB of each",
                     "there", "CPU", "days"):  # fmt: skip
            table.add_column(name, justify="right")
        for s in mine:
            gib = [s[k] / 2**30 for k in ("student_bytes", "teacher_bytes", "other_bytes")]
            total = f"{s['total_bytes'] / 2**30:.1f}" + ("" if s["fits"] else " !")
            table.add_row(
                str(s["gpus"]),
                s["engine"],
                s["teacher"],
                *(f"{g:.1f}" for g in gib),
                total,
                str(s["gib"]),
                f"{s['cpu_bytes'] / 2**30:.0f}",
                f"{s['days']:.2g}",
            )
        console.print(table)


if __name__ == "__main__":
    main()
