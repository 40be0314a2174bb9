"""Twins of images, and files of records that are not trained on."""

import json
import sys

from mmkd.data.left_out import LeftOut, section, write_left_out
from mmkd.data.sources import open_rows
from mmkd.recipe import SourceConfig
from tests.support.bad_inputs.commands import COMMAND
from tests.support.bad_inputs.data_files import KIND
from tests.support.bad_inputs.table import World, case, overridden

OUT = "out.json"
overridden(
    KIND, "no_file_of_left_out", f"data.leave_out={OUT}", f"{OUT}: no such file", "check leave_out"
)
overridden(
    KIND,
    "leave_out_of_a_stream",
    "data={leave_out: out.json, sources: [{train: 'hub:me/data', stream: 100}]}",
    "recipe.yaml: data: 'leave_out' is not for streams",
    "leave 'leave_out' or 'stream' out",
)


@case(
    KIND,
    "named a file of another kind in `data.leave_out`",
    "records.json: it is no file of records to leave out",
    "--drop FILE",
)
def leave_out_of_another_kind(world: World) -> None:
    world.raw["data"]["leave_out"] = "records.json"


@case(
    KIND,
    "added records after `data.leave_out` was written",
    f"records.json: {OUT} was written for other content",
    "write it again:",
)
def leave_out_of_other_content(world: World) -> None:
    path = world.folder / "records.json"
    config = SourceConfig(train=str(path))
    listed = [LeftOut(record=0, id="", why="")]
    write_left_out(world.folder / OUT, [section(config, open_rows(config), listed)], {})
    rows = json.loads(path.read_text())
    path.write_text(json.dumps([*rows, rows[0]]))
    world.raw["data"]["leave_out"] = OUT


@case(COMMAND, "`mmkd data check` with --drop only", "--drop is for --twins", "add --twins")
def drop_without_twins(world: World) -> list[str]:
    return ["data", "check", "records.json", "--drop", OUT]


@case(
    COMMAND,
    "`mmkd data check --twins` without ImageHash",
    "need the package ImageHash",
    "pip install 'mmkd[data]'",
)
def twins_without_their_package(world: World) -> list[str]:
    world.patch.setitem(sys.modules, "imagehash", None)
    return ["data", "check", "records.json", "--twins"]


@case(
    COMMAND,
    "`mmkd data check --twins --drop` with nothing to compare",
    "--drop lists twins of held-out records and tasks",
    "--against",
)
def drop_of_nothing(world: World) -> list[str]:
    return ["data", "check", "records.json", "--twins", "--drop", OUT]


@case(
    COMMAND,
    "`mmkd data check --drop` of its own data",
    "would overwrite a file of another kind",
    "name a new file",
)
def drop_over_the_records(world: World) -> list[str]:
    words = ["data", "check", "recipe.yaml", "--twins", "--against", "none"]
    return [*words, "--drop", "records.json"]
