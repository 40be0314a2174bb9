"""One more token after a long context: attention, hybrid and linear students of one model.

    python -m benchmarks.decode --json runs/bench/decode.json
    python -m benchmarks.decode --device cuda --dtype bfloat16 --json ...

A random LLaVA model, batch 1. `dynamic` is the model with transformers' DynamicCache,
which copies all keys and values at every token; `teacher` is the same model with mmkd's growing
buffers, so that the comparison with the students is of layers, not of caches. `hybrid` keeps every
fourth attention, `linear` none; with fewer key-value heads than heads both also run with one state
per key-value head (`state: kv`). `bound` is what the hybrid would take if its layers cost what the
teacher's and the linear student's do: linear + share of attention layers x (teacher - linear).

Caches are filled with random numbers (mmkd.evaluation.decode). Times: all models in turn in this
process, a few tokens each a round, the first of a round warms up; medians.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from benchmarks.measure import save
from mmkd.evaluation.decode import Decoder
from mmkd.modeling.loading import parameter_count
from mmkd.recipe import EveryNth, MambaConfig
from mmkd.runtime.progress import console
from mmkd.students import convert
from mmkd_models.layout import mamba_layers

CONTEXTS = [1_000, 4_000, 16_000, 32_000, 100_000]
KEPT = {"hybrid": EveryNth(every=4), "linear": []}


def make_model(args: argparse.Namespace) -> LlavaForConditionalGeneration:
    """The same random model at every call."""
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
    config = LlavaConfig(
        text_config=LlamaConfig(
            hidden_size=args.hidden,
            intermediate_size=args.intermediate,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            num_key_value_heads=args.kv_heads,
            head_dim=args.head_dim,
            vocab_size=args.vocabulary,
            max_position_embeddings=2**18,
        ),
        vision_config=CLIPVisionConfig(
            **tower, num_hidden_layers=2, image_size=32, patch_size=16, projection_dim=64
        ),
        image_token_index=args.vocabulary - 1,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).to(args.device, getattr(torch, args.dtype))
    return model.eval()


def make_decoders(args: argparse.Namespace) -> dict[str, Decoder]:
    teacher = make_model(args)
    found = {"dynamic": Decoder(teacher), "teacher": Decoder(teacher, preallocated=True)}
    for state in ("query", "kv") if args.kv_heads < args.heads else ("query",):
        for name, kept in KEPT.items():
            student = make_model(args)
            convert(
                student,
                MambaConfig(kind="mamba", keep_attention=kept, init="inherit", state=state),
            )
            student.to(args.device)
            found[name if state == "query" else f"{name}, kv"] = Decoder(student)
    return found


def measure(decoders: dict[str, Decoder], context: int, rounds: int, burst: int) -> dict[str, Any]:
    """Median seconds a token and cache bytes of every model at one context."""
    held = {}
    for name, decoder in decoders.items():
        decoder.fill(context)
        held[name] = decoder.cache_bytes
    times: dict[str, list[float]] = {name: [] for name in decoders}
    for _ in range(rounds):
        for name, decoder in decoders.items():
            times[name] += [decoder.step()[0] for _ in range(burst + 1)][1:]
    for decoder in decoders.values():
        decoder.clear()
    seconds = {name: statistics.median(taken) for name, taken in times.items()}
    return {
        "context": context,
        "seconds": seconds,
        "cache_bytes": held,
        "bound_seconds": bounds(decoders, seconds),
    }


def bounds(decoders: dict[str, Decoder], seconds: dict[str, float]) -> dict[str, float]:
    """What each hybrid would take if its layers were the teacher's and the linear student's."""
    found = {}
    for name, decoder in decoders.items():
        config: Any = decoder.model.config
        layers = config.get_text_config(decoder=True).num_hidden_layers
        mamba = len(mamba_layers(config))
        if 0 < mamba < layers:
            linear = seconds[name.replace("hybrid", "linear")]
            share = 1 - mamba / layers
            found[name] = linear + share * (seconds["teacher"] - linear)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=1408)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--burst", type=int, default=2, help="timed tokens a round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    decoders = make_decoders(args)
    results = []
    for context in args.contexts:
        results.append(measure(decoders, context, args.rounds, args.burst))
        console.print(f"{context} tokens done", highlight=False)
    report(results)
    parameters = {name: parameter_count(d.model) for name, d in decoders.items()}
    save(args, parameters=parameters, results=results)


def report(results: list[dict[str, Any]]) -> None:
    """A line a context and model; ratios say how many times as fast as the other it is."""
    table = Table(title="decoding one token")
    for name in ("context", "model", "ms", "bound ms", "vs teacher", "vs dynamic", "cache MB"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for result in results:
        seconds, bound = result["seconds"], result["bound_seconds"]
        table.add_section()
        for name in seconds:
            table.add_row(
                f"{result['context']:,}",
                name,
                f"{1e3 * seconds[name]:.1f}",
                f"{1e3 * bound[name]:.1f}" if name in bound else "",
                *(f"{seconds[base] / seconds[name]:.1f}x" for base in ("teacher", "dynamic")),
                f"{result['cache_bytes'][name] / 1e6:.2f}",
            )
    console.print(table)


if __name__ == "__main__":
    main()
