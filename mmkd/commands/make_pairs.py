"""`mmkd data pairs`: preference pairs from a model's own answers, scored against ground truth.

A model that answers a prompt several times shows where it is unsure; its best and its worst answer
make a pair that no other data set has. It is `make` with `keep: pair` and the check `objects`, for
a model without a recipe.
"""

from pathlib import Path

from mmkd.making.local import LocalMaker
from mmkd.making.make import Made, make_records
from mmkd.making.show import print_made
from mmkd.modeling.loading import load_processor
from mmkd.recipe import ModelConfig, load_make
from mmkd.runtime import distributed

MAKER = "model"


def make_pairs(
    model: str,
    records: str,
    out: Path,
    *,
    samples: int = 4,
    temperature: float = 1.0,
    max_new_tokens: int = 96,
    images: str | None = None,
    limit: int | None = None,
    batch_size: int = 32,
    seed: int = 0,
    device: str = "auto",
) -> Made:
    """Ask a model the first question of every record several times, and write the best and the
    worst answer of each as a pair. A second call with the same settings goes on.

    Args:
        model: folder or Hub id.
        records: records with `objects`, as `data.train` names them.
        out: file to write, .jsonl or .parquet.
        samples: answers to each prompt, two or more.
        temperature: of sampling, above 0.
        max_new_tokens: largest number of tokens of an answer.
        images: folder of image paths.
        limit: prompts; all records if None.
        batch_size: prompts asked at once.
        seed: decides the answers.
        device: auto, cpu, cuda, ...

    Raises:
        MmkdError: settings, model or data do not fit.
    """
    config = load_make(
        {
            "records": records,
            "images": images,
            "by": MAKER,
            "sampling": {
                "n": samples,
                "temperature": temperature,
                "max_new_tokens": max_new_tokens,
            },
            "checks": ["cut", "objects"],
            "keep": "pair",
            "out": str(out),
            "limit": limit,
            "batch_size": batch_size,
            "seed": seed,
        },
        "data pairs",
    )
    source = ModelConfig(model=model)
    maker = LocalMaker(MAKER, source, batch_size, distributed.choose_device(device))
    made = make_records(config, {MAKER: maker}, "data pairs", load_processor(source))
    print_made(made)
    return made
