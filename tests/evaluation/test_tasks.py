"""Which tasks there are, and where their documents come from: local files or the Hub."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Image, load_dataset

from mmkd.errors import DataError, MmkdError
from mmkd.evaluation import hub
from mmkd.evaluation.catalog import choose
from mmkd.evaluation.local import features
from mmkd.evaluation.manager import find_tasks
from mmkd.evaluation.run import check
from mmkd.evaluation.standard import ALIASES, COLUMNS
from mmkd.report.metrics import HEADLINE
from mmkd.runtime.files import write_json
from tests.support import benchmarks_in_small as small
from tests.support.benchmarks_in_small import put, scored, texts

pytestmark = pytest.mark.usefixtures("datasets_cache")


def test_every_table_of_tasks_knows_the_same() -> None:
    chosen = choose(list(COLUMNS), None)
    assert [task.name for task in chosen.tasks] == list(COLUMNS)
    assert {task for task in HEADLINE if not task.startswith("scenes")} == set(COLUMNS)
    assert set(ALIASES.values()) <= set(COLUMNS)
    for task in chosen.tasks:
        scored = {m["metric"] for m in task.metrics} - {"submission"}
        named = {c.key[1].partition("_flexible")[0] for c in HEADLINE[task.name]}
        assert named <= scored, task.name


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("mmbench_en_dev", r"asks a language model.*\(gpt_eval_score\) -- use mmbench_en_dev_stat"),
        ("mmbench_en", r"task mmbench_en_dev asks a language model"),
        ("llava_in_the_wild", r"asks a language model.* -- use another task, or set OPENAI"),
        ("vqav2_test", r"only writes a file for the benchmark's server.* -- use vqav2_val$"),
        ("textvqa_test", r"only writes a file for the benchmark's server.* -- use textvqa_val$"),
        ("seedbench_ppl", r"not answered by generation \(output_type multiple_choice\) -- use s"),
        ("scienceqa_im", r"unknown task 'scienceqa_im' -- did you mean scienceqa_img\?"),
        ("vizwi", r"unknown task 'vizwi' -- did you mean vizwiz\?"),
        (
            "scenes_pope",
            r"task scenes_pope is mmkd's own.* -- set `include` to the folder of its f",
        ),
        ("scenes", r"task scenes is mmkd's own and comes with its data -- set `include`"),
    ],
)
def test_tasks_that_have_no_score_here(
    task: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OPENAI_API_KEY", "AZURE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(MmkdError, match=message) as caught:
        choose([task], None)
    assert "\n" not in str(caught.value)


def test_a_key_allows_the_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    assert choose(["mmbench_en_dev"], None).names == ["mmbench_en_dev"]


def test_tasks_of_a_folder_come_before_short_names(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("task: seed\ndataset_path: org/mine\ntest_split: test\n")
    assert choose(["seed"], tmp_path).names == ["seed"]
    assert choose(["seed", "pope"], None).names == ["seedbench", "pope"]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MmkdError, match=r"task mmbench.* needs the package pandas -- pip install"):
        find_tasks(["mmbench"], None, None)


def test_local_files_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such folder of data -- correct `local`"):
        find_tasks(["pope"], None, tmp_path / "absent")
    put([small.pope(0, "yes")], tmp_path / "POPE" / "train.parquet")
    wanted = r"no local data of task pope -- put .*/POPE/test\.parquet there.*lmms-lab-encoder/POPE"
    with pytest.raises(DataError, match=wanted):
        find_tasks(["pope"], None, tmp_path)
    path = tmp_path / "POPE" / "test.parquet"
    path.write_text("no table")
    with pytest.raises(DataError, match=r"test\.parquet: not a parquet file"):
        find_tasks(["pope"], None, tmp_path)
    row = small.pope(0, "yes")
    del row["question_id"]
    put([row], path)
    with pytest.raises(DataError, match="task pope reads the column question_id, which is not"):
        find_tasks(["pope"], None, tmp_path)
    pq.write_table(pq.read_table(put([small.pope(0, "no")], path)).slice(0, 0), path)
    with pytest.raises(DataError, match=r"test\.parquet: no rows"):
        find_tasks(["pope"], None, tmp_path)


def in_datasets_cache(row: dict[str, Any], folder: Path) -> None:
    """A data set as `datasets` keeps what it has loaded from the Hub."""
    made = folder / "lmms-lab-encoder___pope" / "default" / "0.0.0" / ("a" * 40)
    made.mkdir(parents=True)
    files = {"test": str(put([row], folder.parent / "source.parquet"))}
    load_dataset("parquet", data_files=files, cache_dir=str(folder.parent / "made"))
    (arrow,) = (folder.parent / "made").rglob("parquet-test.arrow")
    shutil.copy(arrow, made / "pope-test.arrow")
    about = json.loads((arrow.parent / "dataset_info.json").read_text())
    about |= {"dataset_name": "pope", "config_name": "default"}
    write_json(made / "dataset_info.json", about)


def test_data_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(cache))
    wanted = (
        r"^lmms-lab-encoder/POPE: the data of task pope cannot be reached \(Couldn't reach .* -- "
        "unset HF_HUB_OFFLINE, or give its files as `local`$"
    )
    with pytest.raises(DataError, match=wanted):
        check(["pope"], None, None)
    with pytest.raises(DataError, match="lmms-lab-encoder/GQA: the data of task gqa cannot be"):
        check(["gqa"], None, None)
    in_datasets_cache(small.pope(0, "no"), cache)
    check(["pope"], None, None)


def test_no_login_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    rows = Dataset.from_list([{"id": "n1", "image": {"bytes": b"", "path": None}}])
    rows = rows.cast_column("image", Image())

    def load(*names: str, **settings: Any) -> Dataset:
        asked.append((*names, settings))
        return rows

    monkeypatch.setattr(hub, "load_dataset_builder", lambda *names, **settings: None)
    monkeypatch.setattr(hub, "load_dataset", load)
    manager = find_tasks(["pope", "gqa"], None, None)
    assert manager._get_config("pope")["dataset_kwargs"] == {}
    documents = Dataset.from_list([{"imageId": "n1", "question": "What?"}])
    found = manager._get_config("gqa")["process_docs"](documents)
    assert asked == [("lmms-lab-encoder/GQA", "testdev_balanced_images", {"split": "testdev"})]
    assert found.column_names == ["imageId", "question", "image"]


def test_a_part_of_the_shards_is_no_benchmark(tmp_path: Path) -> None:
    path = tmp_path / "POPE" / "data" / "test-00000-of-00003.parquet"
    put([small.pope(0, "yes")], path)
    with pytest.raises(DataError, match="1 of 3 shards of task pope are here -- copy the others"):
        find_tasks(["pope"], None, tmp_path)
    put([small.pope(0, "no")], path.with_name("test.parquet"))
    (found,) = find_tasks(["pope"], None, tmp_path).local.values()
    assert found.files == [path.with_name("test.parquet")]


def test_shards_are_read_in_order_and_pictures_need_no_declaration(tmp_path: Path) -> None:
    folder = tmp_path / "someone" / "POPE" / "data"
    put([small.pope(0, "yes")], folder / "test-small.parquet")  # of another split
    for shard, answers in enumerate([["yes", "no"], ["no"]]):
        path = folder / f"test-0000{shard}-of-00002.parquet"
        put([small.pope(10 * shard + i, a) for i, a in enumerate(answers)], path)
        pq.write_table(pq.read_table(path).replace_schema_metadata(None), path)
    assert str(features(path)["image"]) == "Image(mode=None, decode=True)"
    scores, model = scored("pope", tmp_path, ["yes", "yes", "no"])
    assert scores["pope_accuracy"] == 2 / 3
    assert "image 10?" in texts(model.asked[2])


def test_a_list_of_pictures_needs_no_declaration(tmp_path: Path) -> None:
    image = {"bytes": b"", "path": "a.png"}
    pq.write_table(pa.Table.from_pylist([{"image": [image]}]), tmp_path / "a.parquet")
    assert "List(Image(" in str(features(tmp_path / "a.parquet")["image"])
