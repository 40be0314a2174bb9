"""Steps of a realistic size on a GPU, compared with the predictions of `mmkd plan`.

    mmkd data build scenes --out data/scenes --seed 0
    python -m benchmarks.large --json runs/bench/large.json

Random weights: LLaVA with Qwen2 7B and SigLIP so400m (729 image tokens) as teacher in bfloat16, one
with Qwen2 0.5B as student, float32 weights, autocast to bfloat16; CE + KL + KL over the image
tokens, vocabulary of 151,936; connector and language model train. Records are the scenes', their
processor made to cut images as SigLIP does and given the words that a vocabulary of that size has
more. Parts and floor: `mmkd bench` says of what. FLOPs, and memory that was planned: `mmkd plan`.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks.measure import save
from benchmarks.scaling import QWEN2_7B, QWEN2_HALF_B, SIGLIP, STAGE
from mmkd.commands.bench import prepare, time_stage
from mmkd.commands.plan import make_plan
from mmkd.errors import MmkdError
from mmkd.modeling.loading import parameter_count
from mmkd.recipe import Recipe, load_recipe
from mmkd.runtime.progress import console
from mmkd.teachers import LoadedTeachers, load_teachers

WORDS = 151_936
# What the models are made of; `tiny` tries this script on a CPU.
SIZES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "7b": (SIGLIP, {**QWEN2_7B, "vocab_size": WORDS}, QWEN2_HALF_B),
    "tiny": (
        {**SIGLIP, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 2},
        {**QWEN2_7B, "hidden_size": 56, "intermediate_size": 64, "num_hidden_layers": 4,
         "vocab_size": WORDS},
        {**QWEN2_HALF_B, "hidden_size": 28, "intermediate_size": 64, "num_hidden_layers": 4},
    ),
}  # fmt: skip
SPARSE = {"kind": "moe", "experts": 4, "top_k": 2, "layers": {"every": 2}}
HYBRID = {"kind": "mamba", "keep_attention": {"every": 4}, "init": "mimic"}
# name -> conversions of the student, changes of the stage
SETTINGS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "dense": ([], {}),
    "dense, head by torch": ([], {"engine": {"head_backend": "torch"}}),
    "dense, 1 GiB head chunks": ([], {"engine": {"head_memory": 1024}}),
    "dense, no checkpointing": ([], {"activation_checkpointing": False}),
    "sparse": ([SPARSE], {}),
    "hybrid": ([HYBRID], {}),
    "dense, cross-entropy": ([], {"objectives": [{"kind": "ce"}]}),
}


def write_processor(source: Path, out: Path) -> None:
    """The scenes' processor with SigLIP's images and a vocabulary of `WORDS` tokens."""
    out.mkdir()
    for path in source.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    config = json.loads((out / "processor_config.json").read_text())
    side = SIGLIP["image_size"]
    config["image_processor"]["size"] = {"height": side, "width": side}
    config["patch_size"] = SIGLIP["patch_size"]
    (out / "processor_config.json").write_text(json.dumps(config))
    tokenizer = json.loads((out / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words |= {f"unused{number}": number for number in range(len(words), WORDS)}
    (out / "tokenizer.json").write_text(json.dumps(tokenizer))


def llava(vision: dict[str, Any], text: dict[str, Any]) -> dict[str, Any]:
    return {
        "model_type": "llava",
        "vision_config": vision,
        "text_config": {"model_type": "qwen2", **text},
        "image_token_index": 4,
        "image_seq_length": 729,
        "vision_feature_select_strategy": "full",
        "vision_feature_layer": -1,
    }


def make_recipe(args: argparse.Namespace, folder: Path, name: str) -> Recipe:
    conversions, changes = SETTINGS[name]
    vision, teacher, student = SIZES[args.size]
    models = {"processor": str(folder / "processor")}
    return load_recipe(
        {
            "name": "large",
            "teacher": {"config": llava(vision, teacher), "dtype": "bfloat16", **models},
            "student": {"config": llava(vision, student), "convert": conversions, **models},
            "data": {"train": "data/scenes/train.parquet"},
            "stages": [
                {
                    **STAGE,
                    "steps": 1000,
                    "batch": {"size": args.batch},
                    **changes,
                    "engine": {"device": args.device, **changes.get("engine", {})},
                }
            ],
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=list(SIZES), default="7b")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_processor(Path("data/scenes/processor"), folder / "processor")
        first = make_recipe(args, folder, "dense")
        with torch.device(args.device):  # where weights are drawn in a moment
            teachers = load_teachers(first, first.stages[0])
        parameters = parameter_count(teachers.members["teacher"].model)
        for setting in args.settings:
            recipe = make_recipe(args, folder, setting)
            try:
                results.append(measure(recipe, setting, teachers, args.steps))
            except (MmkdError, torch.OutOfMemoryError) as error:
                console.print(f"{setting}: {error}", highlight=False)
            save(args, teacher_parameters=parameters, results=results)  # one may take long
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    report(results)


def measure(recipe: Recipe, setting: str, teachers: LoadedTeachers, steps: int) -> dict[str, Any]:
    (planned,) = make_plan(recipe)["members"]["student"]["stages"]
    with tempfile.TemporaryDirectory() as name:
        stage, student = prepare(recipe, 0, Path(name), teachers)
        found = time_stage(stage, student, setting, steps)
    keys = ("parameters", "tokens_per_step", "flops_per_step", "memory_bytes")
    return {"setting": setting, **found, "planned": {k: planned[k] for k in keys}}


def report(results: list[dict[str, Any]]) -> None:
    table = Table(title="steps of a real size")
    for name in ("student", "ms", "of the floor", "tokens/s", "TFLOP/s", "peak GiB", "planned GiB"):
        table.add_column(name, justify="left" if name == "student" else "right")
    for r in results:
        seconds, planned = r["seconds"], r["planned"]
        table.add_row(
            r["setting"],
            f"{1e3 * seconds:.0f}",
            f"{seconds / r['floor_seconds']:.2f}x",
            f"{planned['tokens_per_step'] / seconds:,.0f}",
            f"{planned['flops_per_step']['total'] / seconds / 1e12:.0f}",
            f"{r['peak_bytes'] / 2**30:.1f}",
            f"{planned['memory_bytes']['total'] / 2**30:.1f}",
        )
    console.print(table)
    parts = Table(title="ms by part")
    names = list(results[0]["parts"]) if results else []
    for name in ("student", *names):
        parts.add_column(name, justify="left" if name == "student" else "right")
    for r in results:
        parts.add_row(r["setting"], *(f"{1e3 * r['parts'][name]:.0f}" for name in names))
    console.print(parts)


if __name__ == "__main__":
    main()
