"""Make the folder that ships from a finished run: bf16 safetensors, processor, recipe, scores.

python -m scripts.ship_teacher runs/scenes-teacher assets/scenes_teacher
"""

import argparse
import shutil
from pathlib import Path

import torch

from mmkd.modeling.loading import load_model, load_processor, parameter_count
from mmkd.recipe import ModelConfig, load_recipe
from mmkd.runs.members import members
from mmkd.runtime.files import read_json, write_folder, write_json
from mmkd.runtime.progress import console
from mmkd.runtime.run_folder import RunFolder

MOST_BYTES = 10_000_000


def ship(run: Path, out: Path) -> None:
    """Write `out` from the only member of `run`."""
    files = RunFolder(run)
    recipe = load_recipe(files.recipe)
    (member,) = members(recipe)
    source = ModelConfig(model=str(member.student))
    model, processor = load_model(source), load_processor(source)
    results = read_json(files.evaluation(member.label).results)
    record = {
        "parameters": parameter_count(model),
        "scores": results["scores"],
        "provenance": read_json(files.provenance),
    }

    def write(folder: Path) -> None:
        model.to(torch.bfloat16).save_pretrained(folder)
        processor.save_pretrained(folder)
        shutil.copy(files.recipe, folder)
        write_json(folder / "training.json", record)

    write_folder(out, write)
    size = sum(f.stat().st_size for f in out.glob("*.safetensors"))
    if size > MOST_BYTES:
        raise SystemExit(f"{out}: {size:,} bytes of weights, at most {MOST_BYTES:,} may ship")
    console.print(f"wrote {out}: {size:,} bytes of weights", highlight=False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    ship(arguments.run, arguments.out)
