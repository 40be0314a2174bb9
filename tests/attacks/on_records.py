"""Records and batches that try to stop a run, or the machine."""

from tests.attacks.table import attack
from tests.support.bad_inputs.table import record
from tests.support.layouts import turns

THEME = "records"


@attack(THEME, "gave an answer of 12 MB", "record 0 (id r1)", "12,000,015 characters", "drop it")
def endless_answer(world):
    world.records(record(conversations=turns("<image>\nIs there a cat?", "word " * 2_400_000)))


@attack(THEME, "asked for 10^12 records in a step", "1,000,000,000,000 records", "at most")
def endless_step(world):
    world.stage(batch={"size": 10**6, "accumulate": 10**6})


@attack(THEME, "asked for 10^9 records in a step by their total", "1,000,000,000 records")
def endless_total(world):
    world.stage(batch={"size": 1, "total": 10**9})


@attack(THEME, "named 10^10 files by two ranges", "more than 100,000 files")
def endless_names(world):
    world.raw["data"] = {"train": "{0..99999}{0..99999}.json"}


@attack(THEME, "nested a value 900 lists deep", "record 0", "nested more than 100 deep")
def deep_value(world):
    value = []
    for _ in range(900):
        value = [value]
    world.records(record(x=value))


@attack(THEME, "wrote text where a turn has parts", "record 0", "unknown content type")
def text_as_part(world):
    turns = [{"role": "user", "content": ["text"]}, {"role": "assistant", "content": "a"}]
    world.records({"messages": turns})
