"""Damaged files of settings in a model's folder, and in that of a run's student."""

import json
from pathlib import Path

from tests.attacks.on_secrets import released
from tests.attacks.table import attack

THEME = "folders"
DEEP = "[" * 20_000 + "]" * 20_000
TEXTS = {
    "cut": '{"model_type": "qw',
    "a_list": '["model"]',
    "a_number": "7",
    "nothing": "",
    "deep": f'{{"a": {DEEP}}}',
    "in_utf16": '{"a": 1}'.encode("utf-16").decode("latin-1"),
    "an_empty_object": "{}",
    "twice": '{"model_type": "a", "model_type": "b"}',
}
FILES = {
    "config.json": ("cut", "a_list", "deep", "twice", "an_empty_object"),
    "generation_config.json": ("a_list", "a_number", "in_utf16"),
    "processor_config.json": ("cut", "a_list", "deep"),
    "preprocessor_config.json": ("a_number", "deep"),
    "tokenizer_config.json": ("nothing", "a_list", "deep"),
    "special_tokens_map.json": ("cut", "a_number"),
    "model.safetensors.index.json": ("cut", "a_list", "deep", "nothing"),
}
ODD = {
    "config.json": {
        "model_type": [1],
        "text_config": "x",
        "vision_config": [1, 2],
        "dtype": "<script>",
        "torch_dtype": {"a": 1},
        "architectures": 5,
        "auto_map": [1],
    },
    "generation_config.json": {"eos_token_id": {"a": 1}, "bos_token_id": "x", "max_length": []},
    "tokenizer_config.json": {"chat_template": 5, "added_tokens_decoder": [1], "eos_token": 5},
}


def scored(folder="model"):
    """The command that scores a folder's model; it finds a task."""
    from tests.attacks.code import tasks

    tasks()
    return ["eval", folder, "--tasks", "scenes_pope", "--include", "tasks"]


def damaged(command, file, kind):
    def prepare(world):
        student, words = (Path("model"), scored()) if command == "eval" else released(world)
        (student / file).write_bytes(TEXTS[kind].encode("latin-1"))
        return words

    prepare.__name__ = f"{command}_with_{file.replace('.', '_')}_{kind}"
    did = f"damaged a model's {file} ({kind}), under `{command}`"
    attack(THEME, did, f"{file}: it is damaged")(prepare)


def odd(command, file, key, value):
    def prepare(world):
        student, words = (Path("model"), scored()) if command == "eval" else released(world)
        path = student / file
        path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
        return words

    prepare.__name__ = f"{command}_with_an_odd_{key}_in_{file.replace('.', '_')}"
    attack(THEME, f"wrote {value!r} as {key} of a model's {file}, under `{command}`")(prepare)


for command in ("eval", "release"):
    for file, kinds in FILES.items():
        for kind in kinds:
            damaged(command, file, kind)
    for file, keys in ODD.items():
        for key, value in keys.items():
            odd(command, file, key, value)
