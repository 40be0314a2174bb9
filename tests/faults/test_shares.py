"""Work that is shared out over processes that run one model together: each runs it as often as the
others, whatever the number of records."""

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors import safe_open

from mmkd.cache import Store
from mmkd.runtime import distributed
from tests.support import warm
from tests.support.recipes import tiny_recipe


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 16, 17, 40])
def test_every_rank_gets_as_many_batches(monkeypatch, count, ranks, size):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    shares = []
    for rank in range(ranks):
        monkeypatch.setenv("RANK", str(rank))
        shares.append(distributed.equal_shares(range(count), size))
    assert len({len(share) for share in shares}) == 1
    assert len(shares[0]) == -(-count // (ranks * size))  # and not one more than it takes
    given = [item for share in shares for batch in share for item in batch]
    assert sorted(given) == list(range(count))
    assert all(len(batch) <= size for share in shares for batch in share)


def run(folder, raw, *command):
    path = folder / f"{raw['name']}.yaml"
    path.write_text(yaml.safe_dump(raw))
    done = warm.run(*command, path, "--nproc", 2)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def first_rows(source, target, count, bad=()):
    rows = pq.read_table(source).to_pylist()[:count]
    for number in bad:
        rows[number]["image"] = {"bytes": b"no image", "path": None}
    pq.write_table(type(pq.read_table(source)).from_pylist(rows, pq.read_schema(source)), target)


@pytest.mark.parametrize("placement", ["replicated", "sharded"])
def test_a_reference_is_run_once_over_any_number_of_pairs(
    scenes_dir, tiny_model_dir, tmp_path, placement
):
    """17 pairs of two processes at batch 8: one has nine, two batches, and the other eight."""
    pytest.importorskip("deepspeed")
    first_rows(scenes_dir / "preferences.parquet", tmp_path / "pairs.parquet", 16)
    rows = pq.read_table(tmp_path / "pairs.parquet").to_pylist()
    again = [{**rows[0], "id": "again"}]
    schema = pq.read_schema(scenes_dir / "preferences.parquet")
    table = type(pq.read_table(tmp_path / "pairs.parquet"))
    pq.write_table(table.from_pylist(rows + again, schema), tmp_path / "pairs.parquet")
    raw = tiny_recipe(
        scenes_dir,
        tiny_model_dir,
        tmp_path,
        teacher={"model": str(tiny_model_dir), "placement": placement},
        data={"train": str(tmp_path / "pairs.parquet")},
        stage={
            "objectives": [{"kind": "preference", "reference_logps": "once"}],
            "steps": 2,
            "batch": {"size": 8, "total": 16},
            "engine": {"device": "cpu", "timeout_s": 60},
        },
    )
    run(tmp_path, raw, "run")
    with safe_open(tmp_path / "tiny" / "01-mimic" / "reference.safetensors", "pt") as file:
        assert file.get_tensor("index").tolist() == list(range(17))
        logps = file.get_tensor("logps")
    torch.testing.assert_close(logps[0], logps[16], rtol=1e-5, atol=1e-5)


def test_a_cache_of_a_spread_teacher_leaves_bad_records_out(scenes_dir, tiny_model_dir, tmp_path):
    """Nine records, the first of them bad: one process has a batch less, and has to run the teacher
    on something that is not bad."""
    pytest.importorskip("deepspeed")
    first_rows(scenes_dir / "train.parquet", tmp_path / "records.parquet", 9, bad=[0])
    raw = tiny_recipe(
        scenes_dir,
        tiny_model_dir,
        tmp_path,
        teacher={
            "model": str(tiny_model_dir),
            "placement": "sharded",
            "source": "cache",
            "cache": {"folder": str(tmp_path / "cache"), "k": 8},
        },
        data={"train": str(tmp_path / "records.parquet"), "on_bad_record": "skip"},
        stage={
            "objectives": [{"kind": "kl"}],
            "batch": {"size": 2},
            "engine": {"device": "cpu", "timeout_s": 60},
        },
    )
    run(tmp_path, raw, "cache", "build")
    assert len(Store(tmp_path / "cache")) == 8
