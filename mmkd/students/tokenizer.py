"""`tokenizer`: the tokens of another processor, with embeddings made from the model's own.

The embedding of a token that both tokenizers have is copied. That of another token is the mean of
those of the model's tokens for the same text (Fast Vocabulary Transfer, Gee et al. 2022,
arXiv 2402.09977), and so is its row of the head.
"""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from mmkd.data.vocabulary import check_head, token_count
from mmkd.errors import RecipeError
from mmkd.recipe import Conversion, TokenizerConfig
from mmkd.students.new_processor import KEEP, with_tokenizer
from mmkd.students.rebuilt import differing_weight, skeleton_of
from mmkd.students.token_map import GENERAL, Roles, TokenMap, map_tokens

TOKENS_OF_ANSWERS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids",
                     "forced_bos_token_id", "forced_eos_token_id", "force_words_ids",
                     "sequence_bias")  # fmt: skip
"""Settings of `generate` with ids of ordinary tokens."""


class TokenizerConversion(Conversion):
    """With the model's own tokenizer, the model computes what it did before."""

    config_class = TokenizerConfig
    config: TokenizerConfig

    @cached_property
    def _made(self) -> Any:
        keep = self.config.special_tokens == "keep"
        return with_tokenizer(self.processor, self.config.processor, self.where, keep=keep)

    def new_processor(self) -> Any:
        return self._made

    def check(self, model: PreTrainedModel) -> None:
        """
        Raises:
            CheckpointError: the model has fewer embeddings than its tokenizer has tokens.
            RecipeError: the processor cannot be made.
        """
        check_head(model, self.processor.tokenizer, "student")
        self.new_processor()

    def convert(self, model: PreTrainedModel) -> list[str]:
        """
        Raises:
            RecipeError: the config names a token that the new tokenizer does not have, or the model
                has further weights for each token.
        """
        old, new = Roles(self.processor), Roles(self.new_processor())
        before, after = token_count(old.tokenizer), token_count(new.tokenizer)
        with torch.no_grad():
            tables = [t.detach().clone() for t in _tables(model)]
            model.resize_token_embeddings(after, mean_resizing=False)
            line = f"tokenizer: {after:,} tokens, {before:,} before"
            if model.device.type != "meta":
                found = map_tokens(self.processor, self.new_processor())
                for table, held in zip(_tables(model), tables, strict=True):
                    table.copy_(self._rows(held[:before], found))
                line += (
                    f"; {found.equal:,} are in both, {found.composed:,} are means of others, "
                    f"{found.by_role:,} special ones have the same role or text, "
                    f"{found.unknown:,} are new"
                )
        self._set_ids(model, old, new, len(tables[0]))
        if other := differing_weight(model, skeleton_of(model)):
            raise RecipeError(
                f"the weight {other} also depends on the tokens",
                where=self.where,
                hint="choose a family whose tokens only have an embedding and a row of the head",
            )
        return [line]

    def _rows(self, rows: Tensor, found: TokenMap) -> Tensor:
        """Rows of the new tokens.

        Args:
            rows: [V, ...] of the old tokens.
            found: their old tokens, V' of them.

        Returns:
            [V', ...] float32.
        """
        wide = rows.float()
        made = wide.mean(0).expand(len(found.sources), *wide.shape[1:]).clone()
        if self.config.init == "random":
            drawn = torch.randn(made.shape, dtype=made.dtype)
            made += drawn.to(made.device) * wide.std(0)
        most = 1 if self.config.init == "random" else len(rows)
        known = {n: s for n, s in enumerate(found.sources) if 0 < len(s) <= most}
        ids = torch.tensor([i for s in known.values() for i in s], device=wide.device)
        counts = torch.tensor([len(s) for s in known.values()], device=wide.device)
        sums = wide.new_zeros(len(known), *wide.shape[1:])
        places = torch.arange(len(known), device=wide.device).repeat_interleave(counts)
        sums.index_add_(0, places, wide[ids])
        made[[*known]] = sums / counts.view(-1, *[1] * (wide.dim() - 1))
        return made

    def _set_ids(self, model: PreTrainedModel, old: Roles, new: Roles, rows: int) -> None:
        """Replace the ids of tokens, and `vocab_size` where it was `rows`, in the model's
        configs."""
        for part in _parts(model.config):
            for name, value in vars(part).items():
                if value is None or not name.endswith(("_token_id", "_token_index")):
                    continue
                if name.removesuffix("_id") in GENERAL:
                    setattr(part, name, getattr(new.tokenizer, name))
                elif isinstance(value, int):
                    setattr(part, name, self._new_id(name, value, old, new))
            if getattr(part, "vocab_size", None) == rows:
                part.vocab_size = token_count(new.tokenizer)
        settings = model.generation_config
        if settings is None:
            return
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(settings, name) is not None:
                setattr(settings, name, getattr(new.tokenizer, name))
        for name in TOKENS_OF_ANSWERS:
            if getattr(settings, name, None) is not None:
                setattr(settings, name, None)

    def _new_id(self, name: str, number: int, old: Roles, new: Roles) -> int:
        token = old.tokenizer.convert_ids_to_tokens(number)
        found = None if token is None else old.counterpart(token, new)
        if found is None and token is None and number >= token_count(new.tokenizer):
            return number  # no token before, and none now
        if found is None:
            raise RecipeError(
                f"the model's {name} is {number} ({token}), and the tokenizer of "
                f"{self.config.processor} has no such token",
                where=self.where,
                hint=KEEP,
            )
        return found


def _tables(model: PreTrainedModel) -> list[Tensor]:
    """What has a row for each token: the embedding, and the head unless both are tied."""
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    tables: list[Tensor] = [embedding.weight]
    if head is not None and head.weight is not embedding.weight:
        tables.append(head.weight)
    bias: Tensor | None = getattr(head, "bias", None)
    return tables if bias is None else [*tables, bias]


def _parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A config and the configs in it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _parts(value)
