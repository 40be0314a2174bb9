"""A model's processor with another tokenizer."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mmkd.data.chat import special_tokens
from mmkd.data.generation import turn_ends
from mmkd.data.processing import image_token_id
from mmkd.data.templates import check_processor
from mmkd.data.token_text import is_byte
from mmkd.errors import CheckpointError, MmkdError, RecipeError, one_line
from mmkd.modeling.loading import load_pretrained_processor, load_tokenizer
from mmkd.students.token_map import GENERAL

KEEP = "set 'special_tokens: keep', or name a processor for images"
TEMPLATE = "chat_template.jinja"
SETTINGS, TOKENIZER = "processor_config.json", "tokenizer_config.json"
NAMES = "model_specific_special_tokens"
"""Key of `tokenizer_config.json` for names other than general ones."""


def with_tokenizer(processor: Any, name: str, where: str, *, keep: bool) -> Any:
    """A processor of the same class, with the same settings for images, and other tokens.

    Args:
        processor: the model's.
        name: folder or Hub id of the new tokenizer.
        where: the place in messages.
        keep: keep the special tokens and the chat template of `processor`. Tokens that the new
            tokenizer lacks are added to it.

    Raises:
        CheckpointError: the tokenizer cannot be loaded.
        RecipeError: the processor cannot be used with it.
    """
    tokenizer, named = load_tokenizer(name), dict[str, str]()
    if keep:
        template = processor.chat_template
        named = _take_special_tokens(tokenizer, processor.tokenizer)
    else:
        template = tokenizer.chat_template or load_pretrained_processor(name).chat_template
    try:
        made = _rebuilt(processor, tokenizer, template, named)
        made.tokenizer.name_or_path = name
        _check_image_token(made)
        check_processor(made)
        if made.tokenizer.eos_token_id is None and not turn_ends(made):
            raise CheckpointError("neither the chat template nor the tokenizer ends an answer")
    except (MmkdError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise RecipeError(
            f"the model's {type(processor).__name__} does not work with the tokenizer of {name}: "
            f"{one_line(error)}",
            where=where,
            hint="choose another tokenizer" if keep else KEEP,
        ) from error
    return made


def _take_special_tokens(tokenizer: Any, source: Any) -> dict[str, str]:
    """Add the special tokens of another tokenizer, and give the general names, such as `eos_token`,
    to the same tokens. Returns the tokens with other names."""
    tokens = [t for t in special_tokens(source) if not is_byte(t)]
    missing = [t for t in tokens if t not in tokenizer.get_vocab()]
    tokenizer.add_special_tokens(
        {"extra_special_tokens": missing}, replace_extra_special_tokens=False
    )
    named = {n: str(t) for n, t in source.special_tokens_map.items() if isinstance(t, str)}
    general = {n: t for n, t in named.items() if n in GENERAL and n != "unk_token"}
    tokenizer.add_special_tokens(general)
    return {n: t for n, t in named.items() if n not in GENERAL}


def _rebuilt(processor: Any, tokenizer: Any, template: Any, named: dict[str, str]) -> Any:
    """The processor that is loaded from a folder with these parts.

    Args:
        processor: for images and settings.
        tokenizer: for tokens.
        template: for conversations.
        named: further names of the tokenizer's special tokens.
    """
    with TemporaryDirectory() as name:
        folder = Path(name)
        processor.save_pretrained(folder)
        for file in processor.tokenizer.vocab_files_names.values():
            (folder / file).unlink(missing_ok=True)
        tokenizer.save_pretrained(folder)
        (folder / TEMPLATE).write_text(str(template), encoding="utf-8")
        _change(folder / TOKENIZER, {**named, NAMES: named} if named else {}, add=True)
        image = named.get("image_token") or getattr(tokenizer, "image_token", None)
        _change(folder / SETTINGS, {"image_token": image} if image else {}, add=False)
        return load_pretrained_processor(name)


def _change(path: Path, values: dict[str, Any], *, add: bool) -> None:
    """Change values of a JSON file; with `add`, also those that it does not have."""
    held = json.loads(path.read_text(encoding="utf-8"))
    held |= {key: value for key, value in values.items() if add or key in held}
    path.write_text(json.dumps(held), encoding="utf-8")


def _check_image_token(processor: Any) -> None:
    token = getattr(processor, "image_token", None)
    try:
        known = token in processor.tokenizer.get_vocab() and image_token_id(processor) >= 0
    except TypeError:  # its id is None
        known = False
    if not known:
        raise CheckpointError(f"it has no token {token!r} for an image")
