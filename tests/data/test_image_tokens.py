"""Which image tokens are left out of a batch, and what is left of its targets."""

from dataclasses import replace

import pytest
import torch

from mmkd.data.encoder import Encoder
from mmkd.data.image_tokens import ImageTokenDropout
from mmkd.data.records import Records
from mmkd.modeling.loading import load_processor
from mmkd.objectives.settings import AlmConfig, TokenLabelsConfig
from mmkd.ops import KeptTokens
from mmkd.recipe import DataConfig, ModelConfig

IMAGE = 7


@pytest.fixture
def encoder(scenes_dir, tiny_model_dir):
    def make(*objectives, **settings):
        data = DataConfig(train=str(scenes_dir / "train.parquet"))
        processor = load_processor(ModelConfig(model=str(tiny_model_dir)))
        return Encoder.of(objectives, data, processor, **settings)

    return make


def dropout(encoder, keep=0.5, seed=3):
    return ImageTokenDropout(keep, seed, encoder.processing.image_token_id)


def test_rows_of_kept_tokens():
    keep = torch.tensor([[1, 0, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 1, 0]]).bool()
    kept = KeptTokens.of(keep)
    assert kept.columns.tolist() == [[0, 2, 3, 1], [0, 1, 2, 3], [0, 4, 1, 2]]
    assert kept.real.tolist() == [[True] * 3 + [False], [True] * 4, [True] * 2 + [False] * 2]
    assert torch.equal(kept.keep(6), keep)
    assert kept.new_columns(6).tolist() == [
        [0, 0, 1, 2, 0, 0],
        [0, 1, 2, 3, 0, 0],
        [0, 0, 0, 0, 1, 0],
    ]
    x = torch.randn(3, 6, 2)
    assert torch.equal(kept(x)[kept.real], x[keep])
    assert torch.equal(kept.truncate(2)(x[:2]), kept(x)[:2])


@pytest.mark.parametrize("keep", [1.0, 0.5, 0.02])
def test_the_share_is_kept_and_the_token_before_text(encoder, keep):
    encode = encoder(TokenLabelsConfig(kind="token_labels"))
    whole = encode.encode([0, 1, 2, 3])
    short = dropout(encode, keep)(whole, step=1)
    kept = short.kept.keep(whole.targets.input_ids.shape[1])
    vision, targets = whole.targets.vision, short.targets
    assert torch.equal(whole.targets.attention & ~vision, kept & ~vision)
    wanted = torch.tensor([max(1, round(keep * n)) for n in vision.sum(1).tolist()])
    assert torch.equal((kept & vision).sum(1), wanted)
    last = vision & ~vision.roll(-1, 1)
    assert torch.equal(last & kept, last)
    assert short.inputs is whole.inputs
    for name in ("input_ids", "response", "vision", "vision_labels", "background"):
        mine, theirs = getattr(targets, name), getattr(whole.targets, name)
        assert torch.equal(mine[targets.attention], theirs[kept]), name
    for region in ("response", "prompt", "vision", "all"):
        rows = whole.targets.predicts(region) & kept
        assert torch.equal(targets.predicts(region)[targets.attention], rows[kept]), region
        if region in ("response", "prompt"):
            assert torch.equal(rows, whole.targets.predicts(region))


def test_rows_of_one_text_are_cut_to_their_longest(encoder):
    encode = encoder()
    whole = encode.encode([0, 1])
    short = dropout(encode, 0.25)(whole, 1)
    assert short.targets.input_ids.shape[1] == int(short.targets.attention.sum(1).max())
    assert whole.targets.input_ids.shape[1] - short.targets.input_ids.shape[1] == 48


def test_the_choice_depends_on_seed_step_and_record_alone(encoder):
    encode = encoder()
    together, alone = encode.encode([5, 2, 9]), encode.encode([2])

    def chosen(batch, row, step=1, seed=3):
        kept = dropout(encode, seed=seed)(batch, step).kept
        vision = batch.targets.vision[row]
        return kept.keep(batch.targets.input_ids.shape[1])[row, vision].tolist()

    first = chosen(together, 1)
    assert first == chosen(alone, 0)
    assert first != chosen(together, 0)
    assert first != chosen(alone, 0, step=2)
    assert first != chosen(alone, 0, seed=4)
    doubled = replace(alone, inputs={k: torch.cat([v, v]) for k, v in alone.inputs.items()})
    # the second row only fills up the batch
    assert chosen(doubled, 0) == first
    assert len(dropout(encode)(doubled, 1).kept.real) == 2


def test_both_answers_of_a_pair_have_the_same_tokens(scenes_dir, tiny_model_dir):
    data = DataConfig(train=str(scenes_dir / "preferences.parquet"))
    processor = load_processor(ModelConfig(model=str(tiny_model_dir)))
    encode = Encoder(Records(data), processor, data, pairs=True)
    batch = encode.encode([0, 1])
    kept = dropout(encode)(batch, 1).kept.keep(batch.targets.input_ids.shape[1])
    rows = [kept[i, batch.targets.vision[i]].tolist() for i in range(4)]
    assert rows[:2] == rows[2:]
    assert rows[0] != rows[1]


def test_chunks_are_those_of_the_same_tokens(encoder):
    encode = encoder(AlmConfig(kind="alm"))
    whole = encode.encode([0, 1, 2])
    short = dropout(encode)(whole, 1)
    before, after = whole.targets.chunks, short.targets.chunks
    ids, left = whole.targets.input_ids.flatten(), short.targets.input_ids.flatten()
    for mine, theirs in ((before.student, after.student), (before.teacher, after.teacher)):
        for name in ("rows", "first_rows", "last_rows"):
            assert torch.equal(ids[getattr(mine, name)], left[getattr(theirs, name)]), name
        assert torch.equal(left[theirs.rows + 1], mine.ids)
        assert torch.equal(mine.follows, theirs.follows)
