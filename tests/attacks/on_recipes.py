"""Recipes that try to stop or mislead their reader."""

import yaml

from tests.attacks.table import attack
from tests.support.bad_inputs.table import write

THEME = "recipes"


def good(world, *, changed=("", ""), more=""):
    """The good recipe as a text, with one part of it replaced and lines added."""
    text = yaml.safe_dump(world.raw, sort_keys=False)
    assert changed[0] in text
    return text.replace(*changed, 1) + more


@attack(THEME, "gave a key twice, so that a reader sees the other value", "recipe.yaml", "twice")
def key_given_twice(world):
    write("name: good\nname: other\n")


@attack(THEME, "gave a key twice inside of a mapping", "the key 'model' appears twice", "line 2")
def inner_key_given_twice(world):
    write("name: good\nstudent: {model: model, 'model': other}\n")


@attack(THEME, "spelt one number twice as a key", "the key '0x1' appears twice")
def number_given_twice(world):
    write("student: {config: {id2label: {1: a, 0x1: b}}}\n")


@attack(THEME, "described a billion values by aliases", "200,000 values", "fix the syntax")
def alias_bomb(world):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    write(good(world, more="\n".join(lines)))


@attack(THEME, "hid the billion where any value may stand", "200,000 values")
def alias_bomb_in_a_config(world):
    bomb = "".join(f"      b{i}: &b{i} {{x: *b{i - 1}, y: *b{i - 1}}}\n" for i in range(1, 40))
    write(f"name: x\nstudent:\n  config:\n      b0: &b0 {{z: 1}}\n{bomb}")


@attack(THEME, "merged mappings into each other until there are millions", "200,000 values")
def merge_bomb(world):
    merges = "".join(
        f"b{i}: &b{i} {{<<: [*b{i - 1}, *b{i - 1}, *b{i - 1}]}}\n" for i in range(1, 20)
    )
    write(f"b0: &b0 {{k: 1}}\n{merges}")


@attack(THEME, "put a value into itself", "an alias refers to a value that contains it")
def alias_of_itself(world):
    write(good(world, more="variants: &v {a: *v}\n"))


@attack(THEME, "opened fifty thousand lists", "mappings or lists are nested more than 100 deep")
def deep_lists(world):
    write(good(world, more="tags: " + "[" * 50_000))


@attack(THEME, "nested mappings by aliases", "mappings or lists are nested more than 100 deep")
def deep_aliases(world):
    lines = ["a0: &a0 [x]"] + [f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 200)]
    write("\n".join(lines))


@attack(THEME, "nested mappings in an override", "mappings or lists are nested more than 100 deep")
def deep_override(world):
    return ["run", "recipe.yaml", "student.config=" + "{a: " * 2000]


@attack(THEME, "wrote a key that ends the line", r"recipe.yaml: x\nmmkd: all is well: unknown key")
def key_of_two_lines(world):
    write(good(world, more='"x\\nmmkd: all is well": 1\n'))


@attack(THEME, "wrote a key that clears the terminal", r"\x1b[2J\x1b[31mx: unknown key")
def key_with_escapes(world):
    write(good(world, more='"\\e[2J\\e[31mx": 1\n'))


@attack(THEME, "wrote a key that turns the text behind it around", r"\u202egnp.exe: unknown key")
def key_that_turns_text(world):
    write(good(world, more='"\\u202Egnp.exe": 1\n'))


@attack(THEME, "wrote a key with a hint of its own", "a - send your token to me: unknown key")
def key_with_a_hint(world):
    write(good(world, more='"a -- send your token to me": 1\n'))


@attack(THEME, "wrote a key of a hundred thousand letters", "kkk ... kkk", "unknown key")
def endless_key(world):
    write(good(world, more=f"? {'k' * 100_000}\n: 1\n"))


@attack(THEME, "gave a million letters for a number", "stages.0.steps: got 'xxx", "valid integer")
def endless_value(world):
    write(good(world, changed=("steps: 1", "steps: " + "x" * 1_000_000)))


@attack(THEME, "wrote half of a surrogate pair", r"half of a surrogate pair, \ud800")
def half_of_a_character(world):
    write(good(world, changed=("model: model", 'model: "\\ud800"')))


@attack(THEME, "asked for bytes by a tag", "the tag 'binary' is not supported")
def binary(world):
    write(good(world, changed=("name: tiny", "name: !!binary aGVsbG8=")))


@attack(THEME, "named a Python object by a tag", "the tag 'python/name:os.system' is not supported")
def python_name(world):
    write(good(world, changed=("name: tiny", "name: !!python/name:os.system x")))


@attack(THEME, "named a function as task files do", "the tag '!function' is not supported")
def function(world):
    write(good(world, changed=("name: tiny", "name: !function os.getcwd")))


@attack(THEME, "called a word a number", "not a value of type 'int' (line ")
def word_with_a_tag(world):
    write(good(world, changed=("steps: 1", "steps: !!int many")))


@attack(THEME, "called nothing a number", "not a value of type 'int' (line ")
def nothing_with_a_tag(world):
    write(good(world, changed=("steps: 1", "steps: !!int ''")))


@attack(THEME, "wrote a number of six thousand digits", "recipe.yaml: not YAML: ")
def endless_number(world):
    write(good(world, changed=("steps: 1", "steps: " + "9" * 6000)))


@attack(THEME, "wrote a number of sixty thousand digits in another base", "more than 64 bits")
def endless_number_in_base_16(world):
    write(good(world, changed=("steps: 1", "steps: 0x" + "f" * 60_000)))


@attack(THEME, "used a truth value as a key", "a key is not text: quote 'on'")
def key_that_is_true(world):
    write(good(world, more="on: 1\n"))


@attack(THEME, "used a list as a key", "a key is not text")
def key_that_is_a_list(world):
    write(good(world, more="? [a, b]\n: 1\n"))


@attack(THEME, "used no number as a key", "a key is not text: quote '.nan'")
def key_that_is_no_number(world):
    write(good(world, more=".nan: 1\n"))


@attack(THEME, "saved the recipe in UTF-16", "UTF-16, and only UTF-8 is read")
def utf_16(world):
    write(good(world).encode("utf-16"))


@attack(THEME, "saved the recipe in Latin-1", "recipe.yaml: not YAML: not UTF-8 at byte 7")
def latin_1(world):
    write(good(world, changed=("name: tiny", "name: tïny")).encode("latin-1"))


@attack(THEME, "put a second document behind the first", "found another document")
def second_document(world):
    write(good(world, more=f"---\n{good(world)}"))


@attack(THEME, "wrote five megabytes of comments", "longer than 4 MiB")
def endless_recipe(world):
    write(good(world, more="# nothing\n" * 500_000))


@attack(THEME, "extended a mapping", "recipe.yaml: extends: got a mapping", "name one recipe file")
def extends_a_mapping(world):
    write("extends: {a: 1}\n")


@attack(THEME, "extended a file whose name no disk has", "no such recipe file", "check the path")
def extends_an_endless_name(world):
    write(f"extends: {'a' * 5000}\n")


@attack(THEME, "extended a file whose name ends the line", r"a\nmmkd: done: no such recipe file")
def extends_a_name_of_two_lines(world):
    write('extends: "a\\nmmkd: done"\n')
