"""`mmkd data score --clusters`: parts of the data by their images, for several students."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from mmkd.commands import score_passes
from mmkd.commands.score_data import print_scores, score_data
from mmkd.data.encoder import Encoder
from mmkd.data.records import Records
from mmkd.errors import DataError, MmkdError, StoppedError
from mmkd.modeling.loading import load_model, load_processor
from mmkd.recipe import DataConfig, ModelConfig, load_recipe, to_yaml
from mmkd.teachers import LiveTeacher
from tests.support import warm
from tests.support.layouts import turns, write_numbers
from tests.support.recipes import tiny_recipe

COUNT = 3


@pytest.fixture(scope="module")
def recipe(scenes_dir, tiny_model_dir, tmp_path_factory):
    """Twelve records with images and two without."""
    folder = tmp_path_factory.mktemp("clusters")
    rows = pq.read_table(scenes_dir / "train.parquet").slice(0, 12).to_pylist()
    (folder / "images").mkdir()
    records = []
    for number, row in enumerate(rows):
        (folder / "images" / f"{number}.png").write_bytes(row["image"]["bytes"])
        records.append({"id": f"r{number}", "image": f"{number}.png",
                        "conversations": row["conversations"]})  # fmt: skip
    records[4:4] = [{"id": f"t{n}", "conversations": turns("?", f"a {n}")} for n in range(2)]
    (folder / "train.json").write_text(json.dumps(records))
    raw = tiny_recipe(scenes_dir, tiny_model_dir, folder, teacher={"model": str(tiny_model_dir)})
    raw["data"] = {"train": str(folder / "train.json"), "images": str(folder / "images")}
    return load_recipe(raw)


@pytest.fixture(scope="module")
def scored(recipe, tmp_path_factory):
    """A file with clusters, and its columns."""
    out = tmp_path_factory.mktemp("out") / "s.parquet"
    score_data(recipe, out, clusters=COUNT, batch_size=3, device="cpu")
    assert [file.name for file in out.parent.iterdir()] == ["s.parquet"]
    return out, pq.read_table(out).to_pydict()


def selected(recipe, out, part):
    select = {"kind": "cluster", "scores": str(out), "part": part}
    data = recipe.data.model_dump(exclude_none=True) | {"select": select}
    records = Records(DataConfig.model_validate(data))
    return [records[i].id for i in range(len(records))]


def test_parts_are_disjoint_and_cover_everything(recipe, scored):
    out, table = scored
    assert set(table) == {"id", "source", "index", "key", "cluster"}
    assert all(table["key"])
    parts = [selected(recipe, out, part) for part in range(COUNT + 1)]
    assert [len(part) for part in parts[:COUNT]] == sorted(map(len, parts[:COUNT]), reverse=True)
    assert parts[COUNT] == ["t0", "t1"]
    assert sorted(id for part in parts for id in part) == sorted(table["id"])
    assert selected(recipe, out, [0, COUNT]) == [
        id for id, part in zip(table["id"], table["cluster"], strict=True) if part in (0, COUNT)
    ]
    assert selected(recipe, out, [*range(COUNT + 1)]) == table["id"]
    with pytest.raises(DataError, match="it has no cluster 4 -- its clusters are 0 to 3"):
        selected(recipe, out, 4)


def test_features_are_the_models_image_features(recipe, tiny_model_dir, tmp_path, monkeypatch):
    """What vision tower and connector return, averaged over each record's images."""
    from mmkd.commands import score_data as module

    found = []
    monkeypatch.setattr(module, "cluster_records", lambda features, *_: found.append(features))
    monkeypatch.setattr(module, "summary", lambda out: {})
    score_data(recipe, tmp_path / "s.parquet", clusters=1, batch_size=5, device="cpu")
    [features] = found
    assert sorted(features.points) == [n for n in range(14) if n not in (4, 5)]
    config = ModelConfig(model=str(tiny_model_dir))
    model, processor = load_model(config).eval(), load_processor(config)
    encoder = Encoder(Records(recipe.data), processor, recipe.data)
    for index in (0, 7):
        batch = encoder.encode([index])
        with torch.no_grad():
            images = {k: v for k, v in batch.inputs.items() if k.startswith(("pixel", "image"))}
            own = model.get_image_features(**images)
        own = getattr(own, "pooler_output", own)
        own = torch.cat(list(own)) if isinstance(own, list | tuple) else own
        mean = own.reshape(-1, own.shape[-1]).double().mean(0)
        assert np.allclose(features.points[index], mean / mean.norm(), atol=1e-6)


def test_processes_and_models_beside_it_change_nothing(recipe, scored, tmp_path):
    path, out = tmp_path / "recipe.yaml", tmp_path / "s.parquet"
    path.write_text(to_yaml(recipe))
    words = ["data", "score", path, "--out", out, "--batch-size", 3, "--device", "cpu"]
    done = warm.run(*words, "--clusters", COUNT, "--nproc", 2)
    assert done.returncode == 0, done.stderr
    assert "cluster 3: 2 records without images" in done.stdout
    assert pq.read_table(out).to_pydict() == scored[1]
    both = tmp_path / "both.parquet"
    found = score_data(recipe, both, models=["student"], clusters=COUNT, batch_size=4, device="cpu")
    print_scores(found)
    assert sum(found["clusters"]["sizes"]) == 14
    table = pq.read_table(both).to_pydict()
    assert all(table["student.nll"])
    assert table["cluster"] == scored[1]["cluster"]  # the student has the same weights


def test_a_stopped_command_goes_on(recipe, scored, tmp_path, monkeypatch):
    out, asked = tmp_path / "s.parquet", iter([False, True])
    with monkeypatch.context() as patched:
        patched.setattr(score_passes, "asked", lambda device: next(asked))
        with pytest.raises(StoppedError, match="images of teacher stopped at block 2 of 5"):
            score_data(recipe, out, clusters=COUNT, batch_size=3, device="cpu")
    score_data(recipe, out, clusters=COUNT, batch_size=3, device="cpu")
    assert pq.read_table(out).to_pydict() == scored[1]


def test_refusals(recipe, scored, tmp_path):
    with pytest.raises(DataError, match="sorted into 13 clusters: fewer are different, 12"):
        score_data(recipe, tmp_path / "s.parquet", clusters=13, device="cpu")
    with pytest.raises(MmkdError, match=r"s.jpg: --sheet writes PNG"):
        score_data(recipe, tmp_path / "s.parquet", clusters=2, sheet=tmp_path / "s.jpg")
    write_numbers(tmp_path / "n.json", range(5))
    data = DataConfig(train=str(tmp_path / "n.json"))
    texts = recipe.model_copy(update={"data": data})
    with pytest.raises(DataError, match="into 1 clusters: no record has an image"):
        score_data(texts, tmp_path / "t.parquet", clusters=1, device="cpu")
    plain = tmp_path / "plain.parquet"
    score_data(texts, plain, models=["student"], device="cpu")
    with pytest.raises(DataError, match="it has no clusters -- make them: mmkd data score"):
        selected(texts, plain, 0)


def test_the_forward_pass_ends_after_the_first_layer(recipe, tiny_model_dir):
    """But for the first one, which shows that the layer runs once."""
    from mmkd.commands.cluster_records import FIRST_LAYER
    from mmkd_models.parts import find_parts

    config = ModelConfig(model=str(tiny_model_dir))
    teacher = LiveTeacher(load_model(config), torch.device("cpu"))
    encoder = Encoder(Records(recipe.data), load_processor(config), recipe.data)
    runs = []
    layers = find_parts(teacher.model).decoder_layers
    layers[-1].register_forward_hook(lambda *_: runs.append(1))
    for _ in range(3):
        teacher.signals(encoder.encode([0]), FIRST_LAYER)
    assert len(layers) > 1
    assert len(runs) == 1
