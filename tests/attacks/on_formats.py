"""JSON that tries to stop or mislead its reader."""

import json
from pathlib import Path

from tests.attacks.table import attack
from tests.support.bad_inputs.table import RECORD

THEME = "records"


def write(text):
    """A list with one record, as a text: a run looks at it before it begins."""
    Path("new.json").write_text(f"[{text}]", encoding="utf-8")
    return ["run", "recipe.yaml", "data.train=new.json"]


@attack(THEME, "gave a record two images under one key", "the key 'image' appears twice")
def picture_given_twice(world):
    text = json.dumps(RECORD).replace('"image"', '"image": "other.png", "image"')
    return write(text)


@attack(THEME, "gave an answer twice inside of a turn", "the key 'value' appears twice")
def answer_given_twice(world):
    text = json.dumps(RECORD).replace('"value": "yes"', '"value": "no", "value": "yes"')
    return write(text)


@attack(THEME, "nested a record's metadata five hundred times", "nested more than 100 deep")
def deep_record(world):
    deep = "[" * 500 + "]" * 500
    return write(json.dumps(RECORD)[:-1] + f', "more": {deep}}}')


@attack(THEME, "wrote half of a surrogate pair into an answer", r"half of a surrogate pair, \ud800")
def half_of_a_character_in_a_record(world):
    return write(json.dumps(RECORD).replace('"yes"', r'"\ud800"'))


@attack(THEME, "wrote a number of five thousand digits into a record", "4300 digits")
def endless_number_in_a_record(world):
    return write(json.dumps(RECORD)[:-1] + f', "score": {"9" * 5000}}}')


@attack("values", "gave a DeepSpeed file a key twice", "zero.json: cannot read", "appears twice")
def deepspeed_key_given_twice(world):
    Path("zero.json").write_text('{"gradient_clipping": "auto", "gradient_clipping": 0.5}')
    world.stage(engine={"kind": "deepspeed", "config": "zero.json", "device": "cpu"})
