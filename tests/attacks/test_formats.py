"""The YAML and JSON parsers return plain values or a one-line error."""

import json
import random
import string

import pytest
import yaml

from mmkd.errors import MmkdError
from mmkd.runtime.formats import MOST_DEPTH, FormatError, parse_json, parse_yaml
from scripts.attacks.mutate import damaged


@pytest.mark.parametrize("seed", range(40))
def test_yaml_that_is_written_reads_as_itself(seed):
    value = random_value(random.Random(seed), 4)
    for style in (True, False, None):
        text = yaml.safe_dump(value, default_flow_style=style, allow_unicode=seed % 2 == 0)
        assert parse_yaml(text) == value
        assert parse_yaml(b"\xef\xbb\xbf" + text.encode()) == value


@pytest.mark.parametrize("seed", range(40))
def test_json_that_is_written_reads_as_itself(seed):
    value = random_value(random.Random(seed), 4)
    for ascii_only in (True, False):
        text = json.dumps(value, ensure_ascii=ascii_only)
        assert parse_json(text) == parse_json(text.encode()) == value


@pytest.mark.parametrize("seed", range(150))
@pytest.mark.parametrize("parse", [parse_yaml, parse_json])
def test_damaged_text_reads_or_is_refused_in_one_line(seed, parse):
    draw = random.Random(seed)
    value = random_value(draw, 5)
    text = yaml.safe_dump(value) if parse is parse_yaml else json.dumps(value)
    content, said = text.encode(), ""
    try:
        for _ in range(draw.randrange(1, 4)):
            content = damaged(draw, content)
        parse(content)
    except FormatError as error:
        said = str(MmkdError(str(error)))
    assert "\n" not in said


def test_merge_keys_are_overruled_by_what_stands_beside_them():
    text = "a: &a {xx: 1, yy: 1}\nb: &b {<<: *a, yy: 2}\nc: {<<: *b, zz: 3}\n"
    assert parse_yaml(text)["c"] == {"xx": 1, "yy": 2, "zz": 3}


def test_dates_are_texts():
    assert parse_yaml("[2020-01-01, 2020-99-99, =]") == ["2020-01-01", "2020-99-99", "="]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1, "a": 2}', "the key 'a' appears twice"),
        ('[{"b": {"a": 1, "a": 1}}]', "the key 'a' appears twice"),
        ("[" * (MOST_DEPTH + 1) + "]" * (MOST_DEPTH + 1), "nested more than 100 deep"),
        ("[" * 100_000, "nested more than 100 deep"),
        ("9" * 5000, "4300 digits"),
        (r'{"a": "\ud800"}', r"half of a surrogate pair, \ud800"),
        (r'{"\udfff": 1}', r"half of a surrogate pair, \udfff"),
        ("{", "line 1 column 2"),
        (b"\xff\xfe{\x00}\x00", "UTF-16"),
        (b'"\xe9"', "not UTF-8 at byte 1"),
        ("", "line 1 column 1"),
    ],
)
def test_json_that_is_refused(text, said):
    with pytest.raises(FormatError, match=said.replace("\\", "\\\\")):
        parse_json(text)


def test_whole_characters_in_two_halves_are_read():
    assert parse_json(r'"\ud83d\ude00"') == "😀"


def random_value(draw, depth):
    if depth == 0 or draw.random() < 0.3:
        text = "".join(
            draw.choice(string.printable + "é😀\u200d") for _ in range(draw.randrange(9))
        )
        number = draw.choice([0, 1, -7, 2**63, 0.5, 1e-300])
        return draw.choice([text, number, True, False, None])
    if draw.random() < 0.5:
        return [random_value(draw, depth - 1) for _ in range(draw.randrange(4))]
    keys = {"".join(draw.choice(string.ascii_letters) for _ in range(3)) for _ in range(3)}
    return {key: random_value(draw, depth - 1) for key in sorted(keys)}
