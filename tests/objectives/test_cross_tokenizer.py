"""A teacher of another family, with another tokenizer, template and image processor."""

import json

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    Idefics3Config,
    LlamaConfig,
    LlavaConfig,
    SiglipVisionConfig,
)

from mmkd.commands.build_cache import build_cache
from mmkd.commands.plan import make_plan
from mmkd.data.encoder import Encoder
from mmkd.data.records import Records
from mmkd.errors import DataError, RecipeError
from mmkd.modeling.capture import capture
from mmkd.modeling.loading import load_model, load_processor
from mmkd.objectives import build_objective, score
from mmkd.objectives.cross_tokenizer import AlmConfig, UldConfig
from mmkd.objectives.relation import RelationConfig
from mmkd.recipe import DataConfig, ModelConfig, load_recipe
from mmkd.runs import pipeline
from mmkd.teachers import LiveTeacher
from tests.support.places import CONFIGS
from tests.support.processors import LLAVA, smolvlm
from tests.support.recipes import tiny_recipe
from tests.support.spelling import spelled, two_families

CPU = torch.device("cpu")


def write(folder, config, processor):
    with torch.random.fork_rng():
        torch.manual_seed(len(str(processor.chat_template)))
        AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A SmolVLM-like student that sees an image in 4 tokens, a LLaVA-like teacher in 16."""
    families = student, teacher = two_families()
    small = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }

    def text(processor, spread):
        return LlamaConfig(
            **small,
            vocab_size=len(processor.tokenizer) + 5,  # a padded head
            initializer_range=spread,
            max_position_embeddings=2048,
            pad_token_id=0,
        )

    image = [p.tokenizer.convert_tokens_to_ids("<image>") for p in families]
    out = tmp_path_factory.mktemp("families")
    mine = Idefics3Config(
        text_config=text(student, 0.1),
        vision_config={**small, "image_size": 32, "patch_size": 8},
        image_token_id=image[0],
        scale_factor=2,
        pad_token_id=0,
    )
    theirs = LlavaConfig(
        text_config=text(teacher, 0.6),
        vision_config=SiglipVisionConfig(**small, image_size=32, patch_size=8),
        image_token_index=image[1],
        image_seq_length=16,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    return write(out / "student", mine, student), write(out / "teacher", theirs, teacher)


def test_a_batch_has_chunks_where_they_are_asked_for(scenes_dir, folders):
    config = DataConfig(train=str(scenes_dir / "train.parquet"), max_length=2048)
    mine, theirs = (load_processor(ModelConfig(model=str(f))) for f in folders)
    objective = build_objective(AlmConfig(kind="alm"))
    encoder = Encoder.of([objective.config], config, mine, teacher_processor=theirs)
    batch = encoder.encode([0, 1, 2])
    found = batch.targets.chunks
    rows = objective.rows(batch.targets)
    assert rows.sum() == found.student.count > 30
    assert not (rows & ~batch.targets.predicts("response")).any()
    assert torch.equal(batch.targets.next_ids().flatten()[found.student.rows], found.student.ids)
    other = batch.teacher.targets
    assert torch.equal(other.next_ids().flatten()[found.teacher.rows], found.teacher.ids)
    bounds = found.boundaries
    assert bounds.student.shape == (max(mine.tokenizer.get_vocab().values()) + 1,)
    assert bounds.teacher.shape == (max(theirs.tokenizer.get_vocab().values()) + 1,)
    assert bounds.answer.shape == bounds.closing.shape == (found.student.count,)
    assert 0 < bounds.closing.sum() <= bounds.answer.max() + 1
    said = [
        "".join(part["text"] for part in message["content"])
        for index in batch.indices
        for message in Records(config)[index].messages
        if message["role"] == "assistant"
    ]
    whole = "".join(spelled(mine.tokenizer, found.student)).replace("<end_of_utterance>", "")
    assert whole.replace(" ", "") == "".join(said).replace(" ", "")
    assert Encoder(Records(config), mine, config).encode([0]).targets.chunks is None


def test_what_is_bad_for_the_teacher_alone_is_skipped_for_both(scenes_dir, folders):
    """Its template writes some answers otherwise."""
    mine, theirs = (load_processor(ModelConfig(model=str(f))) for f in folders)
    theirs.chat_template = theirs.chat_template.replace(
        "c['text'] + ' '", "c['text'] | replace('red', 'RED') + ' '"
    )
    objectives = [AlmConfig(kind="alm")]

    def encoder(on_bad_record):
        config = DataConfig(
            train=str(scenes_dir / "train.parquet"), max_length=2048, on_bad_record=on_bad_record
        )
        return Encoder.of(objectives, config, mine, teacher_processor=theirs)

    records = Records(DataConfig(train=str(scenes_dir / "train.parquet")))
    answers = [str([m for m in r.messages if m["role"] == "assistant"]) for r in records]
    bad = next(i for i, text in enumerate(answers) if "red" in text)
    with pytest.raises(DataError, match=r"id .*, for the teacher: the chat template changes"):
        encoder("stop").encode([bad])
    batch = encoder("skip").encode([bad])
    assert len(batch.skipped) >= 1
    assert batch.indices == batch.teacher.indices
    assert "red" not in answers[batch.indices[0]]
    assert batch.targets.chunks.student.count


def test_one_model_has_no_loss(scenes_dir, folders):
    """The same weights and tokens twice; a teacher with a template of its own has one."""
    config = DataConfig(train=str(scenes_dir / "train.parquet"), max_length=2048)
    source = ModelConfig(model=str(folders[1]))
    processor = load_processor(source)
    teacher, student = LiveTeacher(load_model(source), CPU), load_model(source)
    objectives = [build_objective(c) for c in (AlmConfig(kind="alm"), UldConfig(kind="uld"))]

    def losses(other):
        settings = [o.config for o in objectives]
        encoder = Encoder.of(settings, config, processor, teacher_processor=other)
        batch = encoder.encode([0, 1])
        signals = capture(student, batch.inputs)
        counts = {o.name: float(o.rows(batch.targets).sum()) for o in objectives}
        return score(objectives, signals, teacher.signals(batch), batch.targets, counts)[1]

    assert [x.item() for x in losses(processor).values()] == [0, 0]
    other = load_processor(source)
    other.chat_template = LLAVA.replace("': '", "':\n'")
    assert all(x.item() > 0 for x in losses(other).values())


@pytest.fixture
def recipe(scenes_dir, folders, tmp_path):
    def make(objectives, *, steps=30, stage=None, **changes):
        return load_recipe(
            tiny_recipe(
                scenes_dir,
                folders[0],
                tmp_path,
                name="cross",
                teacher={"model": str(folders[1]), **changes.pop("teacher", {})},
                data={"train": str(scenes_dir / "train.parquet"), "max_length": 2048},
                stage={"objectives": objectives, "steps": steps, **(stage or {})},
                **changes,
            )
        )

    return make


@pytest.mark.parametrize("kind", ["alm", "uld"])
def test_a_student_learns_from_another_family(recipe, kind):
    objectives = [{"kind": kind}, {"kind": "relation"}]
    optimizer = {"lr": 3e-3}
    folder = pipeline.run(recipe(objectives, stage={"optimizer": optimizer, "batch": {"size": 2}}))
    lines = (folder / "01-mimic" / "metrics.jsonl").read_text().splitlines()
    losses = torch.tensor([[json.loads(line)[k] for k in (kind, "relation")] for line in lines])
    assert losses.shape == (30, 2)
    assert losses.isfinite().all()
    first, last = losses[:5].mean(0), losses[-5:].mean(0)
    assert (last < 0.9 * first).all(), (first, last)


@pytest.mark.parametrize("settings", [{}, {"gamma": 0.5}, {"temperature": 100.0}])
def test_losses_do_not_depend_on_the_batch_layout(recipe, settings):
    """With chunks that are merged, too."""
    results = []
    for size in (4, 1):
        batch = {"size": size, "accumulate": 4 // size}
        stage = {"batch": batch, "optimizer": {"kind": "sgd", "lr": 0.1}}
        made = recipe([{"kind": "alm", **settings}], steps=2, stage=stage)
        made.name = f"of-{size}"
        made.data.workers = int(size == 1)  # chunks also come from another process
        folder = pipeline.run(made)
        lines = (folder / "01-mimic" / "metrics.jsonl").read_text().splitlines()
        results.append([json.loads(line) for line in lines])
    for got, want in zip(*results, strict=True):
        for key in ("loss", "alm", "grad_norm"):
            assert got[key] == pytest.approx(want[key], rel=1e-4), key


def test_the_students_own_answers_have_chunks_too(recipe):
    own = {"on_policy": {"lmbda": 1.0, "max_new_tokens": 6}, "batch": {"size": 2}}
    folder = pipeline.run(recipe([{"kind": "alm"}, {"kind": "uld"}], steps=2, stage=own))
    for line in (folder / "01-mimic" / "metrics.jsonl").read_text().splitlines():
        said = json.loads(line)
        assert said["sampled"] == 2
        assert said["alm"] > 0
        assert said["uld"] > 0


def test_a_teacher_of_another_family_corrects_no_answers(recipe):
    own = {"on_policy": {"correct": 1}}
    with pytest.raises(RecipeError, match="correct: the teacher has another tokenizer"):
        pipeline.run(recipe([{"kind": "alm"}], steps=2, stage=own))


def test_the_shipped_recipe_runs(folders, scenes_dir, tmp_path):
    shipped = load_recipe(CONFIGS / "cross_family.yaml").model_dump(mode="json")
    small = {"steps": 2, "epochs": None, "precision": "float32", "batch": {"size": 2}}
    shipped |= {
        "output_dir": str(tmp_path),
        "teacher": {"model": str(folders[1])},
        "student": {"model": str(folders[0])},
        "data": {"train": str(scenes_dir / "train.parquet"), "max_length": 2048},
        "stages": [{**stage, **small} for stage in shipped["stages"]],
        "evaluate": None,
    }
    folder = pipeline.run(load_recipe(shipped))
    assert (folder / "01-mimic" / "student" / "model.safetensors").exists()


def test_tiles_match_nothing_and_need_not(scenes_dir, folders):
    """An image cut into tiles has no grid: chunks do not ask for one, relations do."""
    config = DataConfig(train=str(scenes_dir / "train.parquet"), max_length=2048)
    theirs = load_processor(ModelConfig(model=str(folders[1])))
    alone = [AlmConfig(kind="alm")]
    batch = Encoder.of(alone, config, smolvlm(), teacher_processor=theirs).encode([0])
    assert batch.targets.vision.sum() != batch.teacher.targets.vision.sum()
    assert batch.targets.chunks.student.count
    both = [*alone, RelationConfig(kind="relation")]
    with pytest.raises(DataError, match="do not form grids that could be aligned"):
        Encoder.of(both, config, smolvlm(), teacher_processor=theirs).encode([0])


def test_a_plan_of_two_families(recipe):
    found = make_plan(recipe([{"kind": "alm"}, {"kind": "uld"}]))
    (stage,) = found["members"]["student"]["stages"]
    assert stage["teacher_placement"] == "replicated"
    assert stage["flops_per_step"]["teacher_decoder"] > 0


@pytest.mark.parametrize(
    "objective",
    [
        {"kind": "kl"},
        {"kind": "kl", "region": "vision"},
        {"kind": "relation", "region": "response"},
        {"kind": "affinity"},
        {"kind": "hidden_mse", "layers": [0]},
    ],
)
def test_what_needs_one_vocabulary_is_refused(recipe, objective, tmp_path):
    with pytest.raises(RecipeError, match=r"the vocabularies differ: id 1 is .*use alm or uld"):
        pipeline.run(recipe([objective]))
    assert not (tmp_path / "cross").exists()


@pytest.mark.parametrize("kind", ["alm", "uld"])
def test_packed_rows_stored_and_several_teachers_are_refused(recipe, kind, folders, tmp_path):
    with pytest.raises(RecipeError, match=r"batch.pack: objective .* chunks, .* set it to null"):
        pipeline.run(recipe([{"kind": kind}], stage={"batch": {"size": 2, "pack": 512}}))
    stored = {"model": str(folders[0]), "source": "cache", "cache": {"folder": str(tmp_path / "c")}}
    with pytest.raises(RecipeError, match=r"it needs tensors that a teacher's cache"):
        build_cache(recipe([{"kind": kind}], teacher=stored))
    several = [{"model": str(folders[1])}, {"model": str(folders[0]), "name": "second"}]
    raw = recipe([{"kind": kind}]).model_dump(mode="json", exclude={"more_teachers"})
    with pytest.raises(RecipeError, match="one teacher that is used for all records"):
        pipeline.run(load_recipe({**raw, "teacher": several}))
    assert not list(tmp_path.iterdir())
