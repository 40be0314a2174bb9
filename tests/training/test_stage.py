"""The training loop: normalisation, distillation signals, failures."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mmkd.data.vocabulary import shared_vocabulary
from mmkd.engines.cpu_attention import prefer_float32_attention
from mmkd.errors import CheckpointError, NonFiniteLossError, RecipeError
from mmkd.modeling.loading import load_model, load_processor
from mmkd.ops import DIVERGENCES, head_losses
from mmkd.recipe import STEP_METRICS, ModelConfig, load_recipe
from mmkd.runs import pipeline
from tests.support.recipes import tiny_recipe

PARTS = [
    {"kind": "kl", "name": "kl_top", "top_k": 5},
    {"kind": "reverse_kl", "name": "nucleus", "top_p": 0.9, "rest": "drop", "region": "prompt"},
    {"kind": "jsd", "name": "cooler", "teacher_temperature": 0.5, "region": "all"},
    {"kind": "balanced_kl"},
    {"kind": "enhanced", "gamma": 1.5},
    {"kind": "exits", "layers": [0, 1], "norm": "own", "loss": {"kind": "jsd", "region": "all"}},
    {"kind": "embedding"},
]
NAMES = ("kl_top", "nucleus", "cooler", "balanced_kl", "enhanced", "exits", "embedding")


def train(raw):
    folder = pipeline.run(load_recipe(raw))
    lines = (folder / "01-mimic" / "metrics.jsonl").read_text().splitlines()
    weights = load_file(folder / "01-mimic" / "student" / "model.safetensors")
    return [json.loads(line) for line in lines], weights


@pytest.fixture
def recipe(scenes_dir, tiny_model_dir, tmp_path):
    def make(name="tiny", **changes):
        return tiny_recipe(scenes_dir, tiny_model_dir, tmp_path, name=name, **changes)

    return make


def test_losses_and_weights_do_not_depend_on_the_batch_layout(recipe, scenes_dir, tiny_model_dir):
    """Responses differ in length, so a mean of per-batch means would differ."""
    objectives = [
        {"kind": "ce"},
        {"kind": "kl", "weight": 0.5},
        {"kind": "tvd", "region": "vision"},
        {"kind": "relation"},
        {"kind": "affinity"},
    ]
    objectives += PARTS
    results = []
    layouts = [{"size": 8}, {"size": 2, "accumulate": 4}, {"size": 1, "accumulate": 8}]
    for number, batch in enumerate([*layouts, {"total": 8, "tokens": 260}]):
        raw = recipe(
            name=f"layout-{number}",
            data={"train": str(scenes_dir / "train.parquet"), "max_length": 128},
            # A teacher with another seed's weights would do; the student after 0 steps is it.
            teacher={"model": str(tiny_model_dir)},
            stage={
                "objectives": objectives,
                "steps": 3,
                "batch": batch,
                # Adam would blow up the rounding of gradients that are zero.
                "optimizer": {"kind": "sgd", "lr": 0.5},
            },
        )
        results.append(train(raw))
    for metrics, weights in results[1:]:
        for got, want in zip(metrics, results[0][0], strict=True):
            for key in ("loss", "ce", "kl", "tvd", "relation", "affinity", "grad_norm", *NAMES):
                assert got[key] == pytest.approx(want[key], rel=1e-4, abs=1e-6), key
            assert got["supervised_tokens"] == want["supervised_tokens"]
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, results[0][1][name], rtol=1e-3, atol=2e-5)


def test_the_loss_is_the_models_own_loss(recipe, scenes_dir, tiny_model_dir):
    """One micro-batch: mean over supervised tokens, as transformers computes it from labels."""
    from mmkd.data.encoder import Encoder
    from mmkd.data.records import Records
    from mmkd.data.stream import BatchStream

    raw = recipe()
    config = load_recipe(raw)
    metrics, _ = train(raw)
    source = ModelConfig(model=str(tiny_model_dir))
    model, processor = load_model(source), load_processor(source)
    encoder = Encoder(Records(config.data), processor, config.data)
    batch = BatchStream(encoder, config.stages[0].batch, seed=config.seed).batches(0)[0]
    labels = batch.targets.input_ids.masked_fill(~batch.targets.response, -100)
    with torch.no_grad():
        want = model(**batch.inputs, labels=labels).loss.item()
    assert metrics[0]["ce"] == pytest.approx(want, rel=1e-5)


def test_a_student_that_is_its_teacher_has_nothing_to_learn(recipe, tiny_model_dir):
    kinds = [*DIVERGENCES, "relation"]
    raw = recipe(
        teacher={"model": str(tiny_model_dir)},
        stage={"objectives": [{"kind": k} for k in kinds], "steps": 1},
    )
    metrics, _ = train(raw)
    for kind in kinds:
        assert abs(metrics[0][kind]) < 1e-6, kind


def test_training_lowers_every_objective(recipe, tiny_model_dir):
    teacher = recipe(name="teacher", stage={"steps": 30, "optimizer": {"lr": 1e-2}})
    train(teacher)
    folder = pipeline.run_folder(load_recipe(teacher)).path / "01-mimic" / "student"
    raw = recipe(
        teacher={"model": str(folder)},
        stage={
            "objectives": [{"kind": "kl"}, {"kind": "token_labels"}],
            "steps": 30,
            "optimizer": {"lr": 1e-2},
        },
    )
    metrics, _ = train(raw)
    for name in ("kl", "token_labels"):
        first = sum(m[name] for m in metrics[:5])
        last = sum(m[name] for m in metrics[-5:])
        assert last < 0.7 * first, name


def test_only_the_named_groups_train(recipe, tiny_model_dir):
    before = load_file(tiny_model_dir / "model.safetensors")
    _, after = train(recipe(stage={"train": ["connector"]}))
    changed = {n for n in after if not torch.equal(after[n], before[n])}
    assert changed == {n for n in after if "multi_modal_projector" in n}


@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd", "adafactor"])
@pytest.mark.parametrize("schedule", ["cosine", "wsd", "linear", "constant"])
def test_optimizers_and_schedules(recipe, kind, schedule):
    raw = recipe(
        stage={
            "optimizer": {"kind": kind, "lr": 1e-2},
            "schedule": {"kind": schedule, "warmup": 0.25, "decay": 0.25, "min_ratio": 0.1},
            "steps": 8,
        }
    )
    metrics, _ = train(raw)
    rates = [m["lr"] / 1e-2 for m in metrics]
    assert rates[0] < 0.2
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(1.0) if schedule == "constant" else rates[-1] < 0.7
    assert metrics[-1]["loss"] < metrics[0]["loss"]


@pytest.mark.parametrize("wanted", ["auto", "torch"])
def test_the_recipe_names_the_backend_of_the_head_and_its_memory(recipe, wanted, monkeypatch):
    asked = []
    names = head_losses.__globals__
    monkeypatch.setitem(names, "kernel_for", lambda backend, *rest: asked.append(backend))
    rooms, rows_per_chunk = [], names["rows_per_chunk"]

    def watched(*settings):
        rooms.append(settings[-1])
        return rows_per_chunk(*settings)

    monkeypatch.setitem(names, "rows_per_chunk", watched)
    engine = {"head_backend": wanted, "head_memory": 3}
    train(recipe(stage={"steps": 1, "engine": engine}))
    assert set(asked) == {wanted}
    assert set(rooms) == {3 * 2**20}


def test_no_objective_can_be_called_what_a_metric_is(recipe):
    (line,), _ = train(recipe(stage={"steps": 1}))
    assert line.keys() - STEP_METRICS == {"ce"}


def test_clipping_can_be_switched_off(recipe):
    raw = recipe(stage={"optimizer": {"kind": "sgd", "lr": 1.0, "max_grad_norm": 1e-6}, "steps": 2})
    _, clipped = train(raw)
    raw = recipe(
        name="off", stage={"optimizer": {"kind": "sgd", "lr": 1.0, "max_grad_norm": 0}, "steps": 2}
    )
    _, free = train(raw)
    name = next(n for n in free if n.endswith("mlp.down_proj.weight"))
    assert (free[name] - clipped[name]).abs().max() > 1e-3


def test_bfloat16_autocast_stays_close_to_float32(recipe, tiny_model_dir):
    teacher = {"model": str(tiny_model_dir)}
    objectives = [{"kind": "ce"}, {"kind": "kl"}]
    full, _ = train(recipe(teacher=teacher, stage={"objectives": objectives}))
    half, weights = train(
        recipe("half", teacher=teacher, stage={"objectives": objectives, "precision": "bfloat16"})
    )
    assert half[0]["ce"] == pytest.approx(full[0]["ce"], rel=2e-2)
    assert all(t.dtype == torch.float32 for t in weights.values())


def test_float32_attention_is_sdpa_itself(tiny_model_dir):
    model = load_model(ModelConfig(model=str(tiny_model_dir)))
    ids = torch.arange(10, 40).view(2, 15)
    mask = torch.ones_like(ids)
    mask[1, 10:] = 0
    want = model(input_ids=ids, attention_mask=mask).logits
    prefer_float32_attention(model)
    assert model.config._attn_implementation == "sdpa_float32"
    got = model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(got[mask.bool()], want[mask.bool()])


def test_activation_checkpointing_changes_nothing(recipe):
    plain, _ = train(recipe())
    saved, _ = train(recipe("saved", stage={"activation_checkpointing": True}))
    assert [m["loss"] for m in saved] == pytest.approx([m["loss"] for m in plain], rel=1e-6)


def test_a_loss_that_is_not_finite_stops_with_the_samples(recipe, tiny_model_dir, tmp_path):
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    tensors = {name: tensor * 1e30 for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    raw = recipe(student={"model": str(tmp_path / "model")})
    with pytest.raises(NonFiniteLossError, match=r"not finite at step \d+, samples: train-"):
        train(raw)
    assert not (tmp_path / "tiny" / "01-mimic" / "student").exists()
    assert not (tmp_path / "tiny" / "01-mimic" / "done.json").exists()


def test_skipped_records_are_counted_and_listed(recipe, tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "good.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    rows = [
        {
            "id": name,
            "image": f"{name}.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat do you see?"},
                {"from": "gpt", "value": "A cat."},
            ],
        }
        for name in ("good", "broken")
    ]
    (tmp_path / "records.json").write_text(json.dumps(rows))
    data = {
        "train": str(tmp_path / "records.json"),
        "images": str(tmp_path),
        "on_bad_record": "skip",
    }
    metrics, _ = train(recipe(data=data, stage={"steps": 2, "batch": {"size": 2}}))
    assert [line["skipped"] for line in metrics] == [1, 1]
    lines = (tmp_path / "tiny" / "01-mimic" / "skipped.jsonl").read_text().splitlines()
    listed = [json.loads(line) for line in lines]
    assert [line["step"] for line in listed] == [1, 2]
    assert all("id broken" in line["reason"] for line in listed)


def test_an_objective_without_its_teacher_is_refused(recipe):
    with pytest.raises(RecipeError, match="objective kl needs a teacher"):
        train(recipe(stage={"objectives": [{"kind": "kl"}]}))


def test_vocabularies_are_matched_by_token():
    class Tokenizer:
        def __init__(self, *tokens):
            self.tokens = tokens

        def get_vocab(self):
            return {t: i for i, t in enumerate(self.tokens)}

    assert shared_vocabulary(Tokenizer("a", "b"), Tokenizer("a", "b")) == 2
    with pytest.raises(CheckpointError, match="id 1 is 'b' for the student and 'c'"):
        shared_vocabulary(Tokenizer("a", "b"), Tokenizer("a", "c"))
    with pytest.raises(CheckpointError, match="id 2 is None for the student and 'c'"):
        shared_vocabulary(Tokenizer("a", "b"), Tokenizer("a", "b", "c"))


@pytest.mark.parametrize("case", ["empty", "no weights", "broken weights", "missing tensor"])
def test_a_student_folder_that_is_none(recipe, tiny_model_dir, tmp_path, case):
    import shutil

    from safetensors.torch import save_file

    folder = tmp_path / "student"
    if case == "empty":
        folder.mkdir()
    else:
        shutil.copytree(tiny_model_dir, folder)
        weights = folder / "model.safetensors"
        if case == "no weights":
            weights.unlink()
        elif case == "broken weights":
            weights.write_bytes(weights.read_bytes()[:1000])
        else:
            tensors = load_file(weights)
            tensors.pop(next(n for n in tensors if n.endswith("mlp.down_proj.weight")))
            save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        train(recipe(student={"model": str(folder)}))
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
