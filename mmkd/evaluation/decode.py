"""What one more token costs after a long context: time and size of the cache.

    rows = measure_decode(model, [1_000, 16_000])
    rows[0].milliseconds, rows[0].cache_bytes

Batch 1, text only. The cache is filled with random keys, values and states of the right shapes, for
speed does not depend on them and a real prefill would take minutes. What each step is called with
is what `generate` calls the model with: recorded from a short run of it, with the position moved
on. For a row without padding that is a position and no attention mask.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from mmkd.data.generation import neutral_settings
from mmkd.errors import MmkdError
from mmkd.modeling.loading import load_pretrained
from mmkd.runtime.files import write_json
from mmkd_models.cache import HybridCache, MambaLayer, cache_bytes
from mmkd_models.layout import mamba_layers

PROMPT = 4  # tokens of the short run
STEPS = 33
STATES = ("conv_state", "ssm_state")
KEYS_VALUES = ("keys", "values")


@dataclass(frozen=True)
class DecodeRow:
    """One context length.

    Attributes:
        context: tokens in the cache before the first step.
        milliseconds: per token, median over the steps.
        cache_bytes: of keys, values and states in use at `context` tokens.
    """

    context: int
    milliseconds: float
    cache_bytes: int


class Decoder:
    """Decodes token by token after a context of any length.

    Args:
        model: in eval mode; it runs where it is.
        preallocated: give an attention model the buffers that a student's attention layers have,
            in place of transformers' concatenation. A student keeps its own cache either way.

    Raises:
        MmkdError: the model keeps a state that cannot be filled without running it.
    """

    def __init__(self, model: PreTrainedModel, *, preallocated: bool = False):
        self.model, self.preallocated = model, preallocated
        self._call = _recorded_call(model)
        self._cache_name = next(k for k, v in self._call.items() if isinstance(v, Cache))
        self._shapes = [_shapes(layer, model) for layer in self._call.pop(self._cache_name).layers]
        self.cache: Cache | None = None

    @property
    def tokens(self) -> int:
        """Tokens in the cache."""
        return 0 if self.cache is None else int(self.cache.get_seq_length())

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys, values and states in use."""
        return 0 if self.cache is None else cache_bytes(self.cache)

    @torch.no_grad()
    def fill(self, context: int) -> None:
        """Replace the cache by one that holds `context` random tokens."""
        self.clear()
        self.cache = self._empty_cache()
        generator = torch.Generator(self.model.device).manual_seed(0)

        def normal(like: Tensor, *shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)

        layers: list[Any] = self.cache.layers
        for layer, shapes in zip(layers, self._shapes, strict=True):
            if isinstance(layer, MambaLayer):
                conv, ssm = (normal(like, *like.shape) for like in shapes)
                layer.advance(conv, ssm, context)
            elif shapes:
                keys, values = (
                    normal(like, *like.shape[:2], context, like.shape[3]) for like in shapes
                )
                layer.update(keys, values)

    @torch.no_grad()
    def step(self) -> tuple[float, Tensor]:
        """Decode one token; returns the seconds it took and its logits, [1, 1, vocabulary]."""
        call = {**self._call, self._cache_name: self.cache}
        held, positions, mask = self.tokens, call.get("position_ids"), call.get("attention_mask")
        if positions is not None:
            call["position_ids"] = torch.full_like(positions, held)
        if mask is not None:
            call["attention_mask"] = mask.new_ones(1, held + 1)
        _wait_for(self.model.device)
        start = time.perf_counter()
        logits = self.model(**call).logits
        _wait_for(self.model.device)
        return time.perf_counter() - start, logits

    def clear(self) -> None:
        """Free the cache."""
        self.cache = None

    def _empty_cache(self) -> Cache:
        config: Any = self.model.config.get_text_config(decoder=True)
        mamba = mamba_layers(self.model.config)
        if mamba or self.preallocated:
            return HybridCache(config, mamba)
        return DynamicCache(config=config)


def measure_decode(
    model: PreTrainedModel,
    contexts: Sequence[int],
    *,
    steps: int = STEPS,
    preallocated: bool = False,
) -> list[DecodeRow]:
    """Time of one more token, and size of the cache, at each context length.

    Random streams and weights stay untouched. Contexts may be longer than those the model was
    trained for, as long as its positions can be computed there (RoPE's can).

    Args:
        model: in eval mode.
        contexts: tokens in the cache.
        steps: tokens to decode at each; the first warms up and is not timed.
        preallocated: see `Decoder`.

    Raises:
        MmkdError: a context is less than 1, fewer than 2 steps, or a model that cannot be timed.
    """
    if steps < 2 or any(context < 1 for context in contexts):
        raise MmkdError(
            f"cannot time {steps} steps after {list(contexts)} tokens",
            hint="give contexts of at least 1 and at least 2 steps",
        )
    decoder = Decoder(model, preallocated=preallocated)
    rows = []
    for context in contexts:
        decoder.fill(context)
        held = decoder.cache_bytes
        seconds = [decoder.step()[0] for _ in range(steps)][1:]
        rows.append(DecodeRow(context, 1e3 * statistics.median(seconds), held))
    return rows


def time_folder(
    source: str, contexts: Sequence[int], out: Path, *, request: dict[str, Any], **loading: Any
) -> None:
    """Time the model in a folder; write request, device, dtype, threads and rows as JSON.

    An attention model runs with transformers' own cache, as its users get it.

    Args:
        source: folder or Hub id.
        contexts: tokens in the cache.
        out: file to write.
        request: what the times depend on, as JSON; written to the file.
        loading: `device`, and settings of `load_pretrained`.

    Raises:
        MmkdError: the model cannot be loaded or timed.
    """
    device = torch.device(loading.pop("device", "cpu"))
    # the scores' types: bfloat16 is slow on a CPU
    dtype = torch.float32 if device.type == "cpu" else "auto"
    model: Any = load_pretrained(source, dtype=dtype, **loading)
    torch.nn.Module.to(model, device)  # transformers' own refuses quantized models
    found = {
        "request": request,
        "device": str(device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "rows": [asdict(row) for row in measure_decode(model, contexts)],
    }
    write_json(out, found)


@torch.no_grad()
def _recorded_call(model: PreTrainedModel) -> dict[str, Any]:
    """The arguments of the last forward of a short `generate`, its cache among them."""
    calls: list[dict[str, Any]] = []

    def record(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        calls.append(kwargs)

    ids = torch.full((1, PROMPT), _plain_token(model.config), device=model.device)
    hook = model.register_forward_pre_hook(record, with_kwargs=True)
    try:
        model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **neutral_settings() | {"max_new_tokens": 2, "min_new_tokens": 2},
        )
    finally:
        hook.remove()
    return {**calls[-1], "input_ids": ids[:, :1]}


def _plain_token(config: Any) -> int:
    """The first token that is neither an image's placeholder nor an end."""
    special: set[Any] = set()
    for part in (config, config.get_text_config(decoder=True)):
        for name, value in part.to_dict().items():
            if name.endswith(("_token_id", "_token_index")):
                special |= set(value) if isinstance(value, list) else {value}
    return next(i for i in range(len(special) + 1) if i not in special)


def _shapes(layer: Any, model: PreTrainedModel) -> list[Tensor]:
    """A layer's two tensors after the short run; none for one that shares another's."""
    if not layer.is_initialized:
        return []
    names = STATES if isinstance(layer, MambaLayer) else KEYS_VALUES
    held: list[Any] = [getattr(layer, name, None) for name in names]
    if not all(isinstance(t, Tensor) and t.ndim in (3, 4) for t in held):
        raise MmkdError(
            f"decoding cannot be timed: its cache has a {type(layer).__name__}",
            where=type(model).__name__,
            hint="leave 'decode' out",
        )
    return held


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
