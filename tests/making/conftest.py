"""A folder of images and a recipe that has a tiny model answer about them."""

import json

import pyarrow.parquet as pq
import pytest
import yaml

PROMPTS = ["Describe the picture.", "How many objects are there?"]


@pytest.fixture(scope="session")
def photos(scenes_dir, tmp_path_factory):
    """A folder with six images, two of them in a folder below it."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    rows = pq.read_table(scenes_dir / "captions.parquet").slice(0, 6).to_pylist()
    for number, row in enumerate(rows):
        name = f"{number}.png" if number < 4 else f"more/{number}.PNG"
        (folder / name).write_bytes(row["image"]["bytes"])
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture
def recipe(photos, tiny_model_dir, tmp_path):
    """Writes a recipe with one entry of `make` and returns its path."""

    def write(**changes):
        entry = {
            "pictures": str(photos),
            "prompts": PROMPTS,
            "sampling": {"n": 3, "temperature": 1.0, "max_new_tokens": 6},
            "checks": ["empty"],
            "out": str(tmp_path / "made.jsonl"),
        }
        top = changes.pop("top", {})
        entry = {k: v for k, v in {**entry, **changes}.items() if v is not None}
        raw = {
            "name": "made",
            "output_dir": str(tmp_path / "runs"),
            "teacher": {"model": str(tiny_model_dir)},
            "student": {"model": str(tiny_model_dir)},
            "make": {"photos": entry},
            "data": {"train": "made:photos"},
            "stages": [
                {"name": "mimic", "objectives": [{"kind": "ce"}, {"kind": "kl"}], "steps": 2,
                 "batch": {"size": 2}}
            ],
            **top,
        }  # fmt: skip
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(raw))
        return path

    return write


@pytest.fixture
def rows(tmp_path):
    """Reads the records that were made."""

    def read(name="made.jsonl"):
        return [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]

    return read
