"""How answers are written."""

import json

import pyarrow.parquet as pq
import pytest

from mmkd.errors import DataError
from mmkd.making.object_questions import balanced
from mmkd.making.questions import Question
from mmkd.making.writing import join_rows, write_records


def row(name, *messages, **more):
    made = {"by": "teacher", "candidate": 0, "pass_rate": 1.0}
    turns = [{"role": r, "content": [{"type": "text", "text": t}]} for r, t in messages]
    return {"id": name, "images": 0, "messages": turns, "made": made, **more}


def question(name, group, expected=None):
    return Question(name, [], [], about="same id", group=group, expected=expected)


ASK, SAY = ("user", "What?"), ("assistant", "A dog.")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_later_row_may_be_unfinished(tmp_path, suffix):
    out = tmp_path / f"made.{suffix}"
    write_records(out, [row("a", ASK, SAY), row("b", ASK, SAY, unfinished=True)], lambda i: [])
    lines = out.read_text().splitlines() if suffix == "jsonl" else []
    found = [json.loads(line) for line in lines] or pq.read_table(out).to_pylist()
    assert [r.get("unfinished") for r in found] == [None, True]


def test_an_image_without_a_file_is_refused_where_paths_are_written(tmp_path):
    images = (
        [("a.png", None)],
        [({"path": "b.png", "bytes": None}, None)],
        [({"bytes": b"a"}, None)],
    )
    rows = [row("a", ASK, SAY), {**row("b", ASK, SAY), "images": 1}]
    out = tmp_path / "made.jsonl"
    write_records(out, rows, lambda i: images[i])
    assert [json.loads(line)["images"] for line in out.open()] == [["a.png"], ["b.png"]]
    with pytest.raises(DataError, match=r"made.jsonl: the records contain their images"):
        write_records(out, [*rows, {**rows[0], "images": 2}], lambda i: images[i])


def test_records_with_equal_ids_stay_apart():
    found = join_rows(
        [(question("a-0", "0"), row("a-0", ASK, SAY)), (question("a-1", "0"), row("a-1", ASK, SAY)),
         (question("a-0", "1"), row("a-0", ASK, SAY))], 0
    )  # fmt: skip
    assert [len(r["messages"]) for r in found] == [4, 2]
    asked = [question("a", "0", "yes"), question("a", "0", "no"), question("a", "1", "yes")]
    assert balanced([(one, 1) for one in asked]) == {2}


def test_a_system_message_stays_in_front():
    system = ("system", "Be exact.")
    for seed in range(5):
        rows = [row(str(n), ASK, SAY) for n in range(3)] + [row("own", system, ASK, SAY)]
        (joined,) = join_rows([(question("a", "0"), r) for r in rows], seed)
        roles = [m["role"] for m in joined["messages"]]
        assert roles == ["system", *["user", "assistant"] * 4]
