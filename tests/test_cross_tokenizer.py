"""A teacher of another family: other words, other template, other pictures, the same answers."""

import copy
import json
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from processors import LLAVA, OTHER_WORDS, WORDS, llava, smolvlm
from recipes import tiny_recipe
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForImageTextToText,
    Idefics3Config,
    LlamaConfig,
    LlavaConfig,
    SiglipVisionConfig,
)

from mmkd import pipeline
from mmkd.build_cache import build_cache
from mmkd.data.chat import Rendered, render_chat
from mmkd.data.chunks import cut_answers, pair_chunks
from mmkd.data.encoder import Encoder
from mmkd.data.records import Records
from mmkd.errors import DataError, RecipeError
from mmkd.loading import load_model, load_processor
from mmkd.objectives import build_objective, score
from mmkd.objectives.cross_tokenizer import AlmConfig, UldConfig
from mmkd.objectives.relation import RelationConfig
from mmkd.plan import make_plan
from mmkd.recipe import DataConfig, ModelConfig, load_recipe
from mmkd.signals import capture
from mmkd.teachers import LiveTeacher
from mmkd.vocabulary import same_vocabulary

CPU = torch.device("cpu")
CONFIGS = Path(__file__).parent.parent / "configs"
SAID = [
    "There is a red book, two cats and a dog.",
    "Zwölf Bücher – äöü ÄÖÜ ß",
    "🎉🎉 two 👩‍👩‍👧 cats 🎉",
    "e\u0301 and é, 日本語。",
    "Lines.\n\n  Two  spaces\tand a tab.\nDone",
    "",
]


def answered(*said):
    messages = []
    for text in said:
        for role, words in (("user", "How many?"), ("assistant", text)):
            messages.append({"role": role, "content": [{"type": "text", "text": words}]})
    return messages


def cut(processor, messages):
    """Tokens [1, T] and the answers in them."""
    rendered = render_chat(processor, messages)
    tokenizer = processor.tokenizer
    found = tokenizer(rendered.text, return_offsets_mapping=True, add_special_tokens=False)
    specials = set(tokenizer.all_special_ids)
    ids = found["input_ids"]
    answers = cut_answers(rendered, [], found["offset_mapping"], ids, specials)
    return torch.tensor([ids]), [answers]


def spelled(tokenizer, tokens):
    """What each chunk's tokens say."""
    return [
        tokenizer.decode(tokens.ids[tokens.chunk == i], clean_up_tokenization_spaces=False)
        for i in range(tokens.count)
    ]


def chunked(mine, theirs, messages, length=None):
    student, teacher = (cut(p, messages) for p in (mine, theirs))
    ids = [x[0][:, :length] for x in (student, teacher)]
    return pair_chunks(*ids, student[1], teacher[1], ["a7"])


@pytest.fixture(scope="module")
def families():
    student, teacher = copy.deepcopy(smolvlm()), llava(OTHER_WORDS)
    student.image_processor.do_image_splitting = False
    assert not same_vocabulary(student.tokenizer, teacher.tokenizer)
    return student, teacher


@pytest.mark.parametrize("said", SAID)
def test_chunks_are_the_answer_for_both(families, said):
    found = chunked(*families, answered(said))
    mine, theirs = (
        spelled(p.tokenizer, t)
        for p, t in zip(families, (found.student, found.teacher), strict=True)
    )
    assert mine.pop() == "<end_of_utterance>"
    assert theirs.pop() == "</s>"
    assert [text.lstrip() for text in mine[:1]] == [text.lstrip() for text in theirs[:1]]
    assert mine[1:] == theirs[1:]
    assert "".join(mine).lstrip() == "".join(theirs).lstrip() == said
    assert "�" not in "".join(mine)


def test_chunks_are_the_finest(families):
    """Every place that both cut is the end of a chunk, and some chunks have several tokens."""
    messages = answered(SAID[0])
    found = chunked(*families, messages)
    answers = [cut(p, messages)[1][0][0] for p in families]
    shared = answers[0].cuts.keys() & answers[1].cuts.keys()
    assert found.student.count == len(shared) - 1 + 1  # between places, and the end of turn
    assert len(found.student.ids) > found.student.count
    assert len(found.teacher.ids) > found.teacher.count
    assert len(found.student.ids) != len(found.teacher.ids)


def test_a_character_that_one_splits_is_one_chunk(families):
    """The teacher has tokens for emoji and umlauts behind spaces, the student has bytes."""
    answers = [cut(p, answered("ä🎉ö"))[1][0][0] for p in families]
    assert [a.cuts.keys() for a in answers] == [{0, 1, 2, 3}] * 2
    found = chunked(*families, answered("ä🎉ö"))
    sizes = [torch.bincount(t.chunk).tolist() for t in (found.student, found.teacher)]
    assert sizes == [[2, 4, 2, 1], [1, 1, 2, 1]]


def test_answers_of_several_turns_and_what_is_cut_off(families):
    messages = answered("two cats", "a dog")
    found = chunked(*families, messages)
    assert spelled(families[0].tokenizer, found.student).count("<end_of_utterance>") == 1
    assert "".join(spelled(families[1].tokenizer, found.teacher)).replace(" ", "") == (
        "twocatsadog</s>"  # LLaVA's template closes the last turn alone
    )
    whole = cut(families[0], messages)[0].shape[1]
    for length in range(whole):
        part = chunked(*families, messages, length)
        assert part.student.count <= found.student.count
        assert torch.equal(part.student.ids, found.student.ids[: len(part.student.ids)])
        assert part.student.rows.max().item() < length - 1 if part.student.count else True


def test_one_tokenizer_has_a_chunk_a_token():
    ids, answers = cut(smolvlm(), answered("two cats and a dog"))
    found = pair_chunks(ids, ids, answers, answers, ["a"])
    assert torch.equal(found.student.chunk, torch.arange(len(found.student.ids)))
    assert torch.equal(found.student.rows, found.teacher.rows)
    assert torch.equal(ids.flatten()[found.student.rows + 1], found.student.ids)


def byte_level(trim):
    """As of GPT-2 or Llama 3, which leave white space out of a token's offsets (`trim`)."""
    words = Regex(r"[^\s\p{L}]+[\r\n]*|[^\r\n\p{L}]?\p{L}+|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*OTHER_WORDS, *WORDS, ".\n\n .\n\n .\n\n Two  spaces"], trainer)
    return tokenizer


def byte_fallback():
    """As of Llama 2 and Mistral: characters without a token are bytes, spaces are letters."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(
        OTHER_WORDS, trainers.BpeTrainer(vocab_size=90, show_progress=False)
    )
    facts = json.loads(trained.to_str())
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *facts["model"]["vocab"]]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    facts["model"] |= {"vocab": vocabulary, "byte_fallback": True, "unk_token": "<unk>"}
    tokenizer = Tokenizer.from_str(json.dumps(facts))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


@pytest.mark.parametrize(
    "make", [partial(byte_level, False), partial(byte_level, True), byte_fallback]
)
@pytest.mark.parametrize("said", SAID[:5])
def test_what_lies_between_cuts_is_what_its_tokens_say(said, make):
    tokenizer = make()
    text = f"A: {said}"
    rendered = Rendered(text, ((2, len(text)),), ((3, len(text)),))
    found = tokenizer.encode(text)
    (answer,) = cut_answers(rendered, [], found.offsets, found.ids, set())
    cuts = sorted(answer.cuts.items())
    assert cuts[0][0] == 0
    assert cuts[-1][0] == len(said)
    for (start, first), (stop, last) in pairwise(cuts):
        piece = tokenizer.decode(found.ids[first:last])
        assert (piece.lstrip() if start == 0 else piece) == said[start:stop]


@pytest.mark.parametrize(
    ("words", "offsets", "cuts"),
    [
        ("a.\n\nb", [(0, 1), (1, 2), (4, 5)], {0: 0, 1: 1, 4: 2, 5: 3}),  # '.\n\n' is one
        ("a  b", [(0, 1), (2, 2), (3, 4)], {0: 0, 1: 1, 2: 2, 4: 3}),  # ' ' and ' b'
        ("ab", [(0, 1), (1, 1), (1, 2)], {0: 0, 1: 1, 2: 3}),  # a token that says nothing
        ("äb", [(0, 1), (0, 2)], {0: 0, 2: 2}),  # bytes of ä in both
    ],
)
def test_cuts_by_offsets(words, offsets, cuts):
    whole = ((0, len(words)),)
    rendered = Rendered(words, whole, whole)
    (answer,) = cut_answers(rendered, [], offsets, [0] * len(offsets), set())
    assert answer.cuts == cuts
    assert answer.end is None


def test_other_words_are_one_line(families):
    student, teacher = (cut(p, answered(s)) for p, s in zip(families, ("yes", "no"), strict=True))
    with pytest.raises(DataError, match="the response of a7 has other words for the teacher"):
        pair_chunks(student[0], teacher[0], student[1], teacher[1], ["a7"])


def write(folder, config, processor):
    with torch.random.fork_rng():
        torch.manual_seed(len(str(processor.chat_template)))
        AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory, families):
    """A SmolVLM-like student that sees a picture in 4 tokens, a LLaVA-like teacher in 16."""
    student, teacher = families
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
    objectives = [build_objective(AlmConfig(kind="alm"))]
    encoder = Encoder.of(objectives, config, mine, teacher_processor=theirs)
    batch = encoder.encode([0, 1, 2])
    found = batch.targets.chunks
    rows = objectives[0].rows(batch.targets)
    assert rows.sum() == found.student.count > 30
    assert not (rows & ~batch.targets.predicts("response")).any()
    assert torch.equal(batch.targets.next_ids().flatten()[found.student.rows], found.student.ids)
    other = batch.teacher.targets
    assert torch.equal(other.next_ids().flatten()[found.teacher.rows], found.teacher.ids)
    said = [
        "".join(part["text"] for part in message["content"])
        for index in batch.indices
        for message in Records(config)[index].messages
        if message["role"] == "assistant"
    ]
    whole = "".join(spelled(mine.tokenizer, found.student)).replace("<end_of_utterance>", "")
    assert whole.replace(" ", "") == "".join(said).replace(" ", "")
    assert Encoder(Records(config), mine, config).encode([0]).targets.chunks is None


def test_one_model_has_no_loss(scenes_dir, folders):
    """The same weights and tokens twice; a teacher with a template of its own has one."""
    config = DataConfig(train=str(scenes_dir / "train.parquet"), max_length=2048)
    source = ModelConfig(model=str(folders[1]))
    processor = load_processor(source)
    teacher, student = LiveTeacher(load_model(source), CPU), load_model(source)
    objectives = [build_objective(c) for c in (AlmConfig(kind="alm"), UldConfig(kind="uld"))]

    def losses(other):
        encoder = Encoder.of(objectives, config, processor, teacher_processor=other)
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


def test_the_students_own_answers_have_chunks_too(recipe):
    own = {"on_policy": {"lmbda": 1.0, "max_new_tokens": 6}, "batch": {"size": 2}}
    folder = pipeline.run(recipe([{"kind": "alm"}, {"kind": "uld"}], steps=2, stage=own))
    for line in (folder / "01-mimic" / "metrics.jsonl").read_text().splitlines():
        said = json.loads(line)
        assert said["sampled"] == 2
        assert said["alm"] > 0
        assert said["uld"] > 0


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
    """A picture cut into tiles has no grid: chunks do not ask for one, relations do."""
    config = DataConfig(train=str(scenes_dir / "train.parquet"), max_length=2048)
    theirs = load_processor(ModelConfig(model=str(folders[1])))
    alone = [build_objective(AlmConfig(kind="alm"))]
    batch = Encoder.of(alone, config, smolvlm(), teacher_processor=theirs).encode([0])
    assert batch.targets.vision.sum() != batch.teacher.targets.vision.sum()
    assert batch.targets.chunks.student.count
    both = [*alone, build_objective(RelationConfig(kind="relation"))]
    with pytest.raises(DataError, match="no grid tells which belong together"):
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
    with pytest.raises(RecipeError, match=r"batch.pack: objective .* chunks .* set it to null"):
        pipeline.run(recipe([{"kind": kind}], stage={"batch": {"size": 2, "pack": 512}}))
    stored = {"model": str(folders[0]), "source": "cache", "cache": {"folder": str(tmp_path / "c")}}
    with pytest.raises(RecipeError, match=r"a teacher's cache holds .* it needs more"):
        build_cache(recipe([{"kind": kind}], teacher=stored))
    several = [{"model": str(folders[1])}, {"model": str(folders[0]), "name": "second"}]
    raw = recipe([{"kind": kind}]).model_dump(mode="json", exclude={"more_teachers"})
    with pytest.raises(RecipeError, match="one teacher that is asked about all records"):
        pipeline.run(load_recipe({**raw, "teacher": several}))
    assert not list(tmp_path.iterdir())
