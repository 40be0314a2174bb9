"""`mmkd data pairs`: preference pairs from a model's own answers, scored against ground truth.

A model that answers a prompt several times shows where it is unsure; its best and its worst answer
make a pair that no other data set has. Answers are scored by the objects that they name (CHAIR,
Rohrbach et al. 2018, arXiv 1809.02156): invented ones first, then those left out.
"""

import io
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmkd.data.answers import answers_of, asked, generate_of, sample_answers
from mmkd.data.encoder import Encoder
from mmkd.data.journal import Journal
from mmkd.data.records import Records
from mmkd.data.scenes.build import IMAGE, TURNS, conversation
from mmkd.data.schema import Record
from mmkd.data.vocabulary import check_head
from mmkd.errors import DataError, MmkdError
from mmkd.evaluation.scenes import mentioned_objects
from mmkd.modeling.loading import load_model, load_processor
from mmkd.recipe import DataConfig, ModelConfig, SamplingConfig
from mmkd.runs.provenance import source_facts
from mmkd.runtime import distributed
from mmkd.runtime.files import locked_file, writing
from mmkd.runtime.hashes import weights_hash
from mmkd.runtime.interrupt import deferred
from mmkd.runtime.progress import track

PAIRS = pa.schema(
    [("id", pa.string()), ("image", IMAGE), ("chosen", TURNS), ("rejected", TURNS),
     ("chosen_invented", pa.int32()), ("rejected_invented", pa.int32())]
)  # fmt: skip


@dataclass(frozen=True, order=True)
class Score:
    """Less is better: objects that are not there, and objects that are left out."""

    invented: int
    missing: int

    @classmethod
    def of(cls, answer: str, present: set[str]) -> "Score":
        mentioned = set(mentioned_objects(answer))
        return cls(len(mentioned - present), len(present - mentioned))


@dataclass(frozen=True)
class Counts:
    """How many prompts, pairs and answers there were.

    Attributes:
        prompts: prompts that were asked.
        pairs: pairs that were written.
        equal: prompts whose finished answers all have the same score.
        cut: answers that `max_new_tokens` cut off. They are not used: training would teach their
            last word as the end.
    """

    prompts: int
    pairs: int
    equal: int
    cut: int


def make_pairs(
    model: str,
    data: DataConfig,
    out: Path,
    *,
    sampling: SamplingConfig,
    samples: int = 4,
    limit: int | None = None,
    batch_size: int = 32,
    seed: int = 0,
    device: str = "auto",
) -> Counts:
    """Ask a model the first question of every record several times, and write the best and the
    worst answer of each as a pair.

    Answers are stored next to `out` until it is written, and a second call with the same settings
    goes on from them.

    Args:
        model: folder or Hub id.
        data: records with `objects`.
        out: parquet file to write, in LLaVA's schema of pairs.
        sampling: how the model answers.
        samples: answers to each prompt, two or more.
        limit: prompts; all records if None.
        batch_size: prompts asked at once.
        seed: decides the answers.
        device: auto, cpu, cuda, ...

    Raises:
        MmkdError: settings, model or data do not fit.
    """
    records = _checked(data, out, sampling, samples)
    indices = list(range(min(limit or len(records), len(records))))
    place = distributed.choose_device(device)
    source = ModelConfig(model=model)
    answering: Any = load_model(source)
    processor = load_processor(source)
    check_head(answering, processor.tokenizer, model)
    answering.to(place)
    encoder = Encoder(records, processor, data)
    request = {
        "model": [model, weights_hash(Path(model))],
        "data": {part.train: source_facts(part) for part in data.parts},
        "sampling": sampling.model_dump(mode="json"),
        "samples": samples,
        "seed": seed,
        "device": place.type,
    }
    parts = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
    answers_file = out.with_name(out.name + ".answers.jsonl")
    with locked_file(answers_file):
        journal = Journal(answers_file, request)
        known = {tuple(entry["records"]): entry["answers"] for entry in journal.entries}
        rows, cut = [], 0
        for number, part in enumerate(track(parts, "pairs", len(parts))):
            prompts = [_prompt(records, i) for i in part]
            answers = known.get(tuple(part))
            if answers is None:
                drawn = {"seed": seed * 2**20 + number, "device": place, "count": samples}
                answers = _answers(answering, encoder, prompts, sampling, **drawn)
                with deferred():
                    journal.add({"records": part, "answers": answers})
            for k, (index, prompt) in enumerate(zip(part, prompts, strict=True)):
                own = answers[k * samples : (k + 1) * samples]
                finished = [a["text"] for a in own if a["finished"]]
                cut += len(own) - len(finished)
                rows.append(_pair(records[index], prompt, finished, records))
        pairs = [row for row in rows if row is not None]
        _write(out, pairs)
        journal.delete()
    return Counts(len(rows), len(pairs), len(rows) - len(pairs), cut)


def _checked(data: DataConfig, out: Path, sampling: SamplingConfig, samples: int) -> Records:
    """The records; arguments and errors as of `make_pairs`."""
    if samples < 2 or sampling.temperature == 0:
        raise MmkdError(
            "pairs need two or more answers that may differ",
            where="data pairs",
            hint="give --samples 2 or more and a --temperature above 0",
        )
    if out.exists():
        raise MmkdError("it is there already", where=str(out), hint="name a new file")
    records = Records(data)
    if not records[0].objects:
        raise DataError(
            "the records say nothing of objects",
            where=records.name,
            hint="add 'objects' (name, box)",
        )
    return records


def _answers(
    model: Any, encoder: Encoder, prompts: list[Record], sampling: SamplingConfig, **settings: Any
) -> list[dict[str, Any]]:
    """A model's answers as a journal keeps them."""
    ends = model.generation_config.eos_token_id
    generate = generate_of(model)
    found = sample_answers(generate, encoder, prompts, sampling, ends=ends, **settings)
    return [asdict(answer) for answer in found]


def _prompt(records: Records, index: int) -> Record:
    """The first question of a record.

    Raises:
        DataError: it is not one question about one image, which is all that a pair holds.
    """
    record = records[index]
    prompt = asked(record, answers_of(record)[0])
    if len(prompt.messages) != 1 or len(prompt.images) != 1:
        raise DataError(
            f"the first answer follows {len(prompt.messages)} turn(s) with {len(prompt.images)} "
            "image(s), but pairs are made of one question about one image",
            where=records.where(index),
            hint="drop the record",
            kind="not one question about one image",
        )
    return prompt


def _pair(
    record: Record, prompt: Record, answers: list[str], records: Records
) -> dict[str, Any] | None:
    """The best and the worst answer as a row; None if there are none, or all are equally good."""
    if not answers:
        return None
    present = {o.name for o in record.objects if mentioned_objects(o.name)}
    scored = sorted((Score.of(a, present), i) for i, a in enumerate(answers))
    (best, first), (worst, last) = scored[0], scored[-1]
    if best == worst:
        return None
    question = _text(prompt)
    return {
        "id": f"{record.id}-pair",
        "image": _png(record, records),
        "chosen": conversation([(question, answers[first])]),
        "rejected": conversation([(question, answers[last])]),
        "chosen_invented": best.invented,
        "rejected_invented": worst.invented,
    }


def _text(prompt: Record) -> str:
    return "".join(part.get("text", "") for part in prompt.messages[-1]["content"])


def _png(record: Record, records: Records) -> dict[str, Any]:
    out = io.BytesIO()
    records.pictures(record)[0].save(out, "PNG")
    return {"bytes": out.getvalue(), "path": None}


def _write(out: Path, rows: list[dict[str, Any]]) -> None:
    if not rows:
        raise DataError(
            "no prompt has answers of different worth",
            where=str(out),
            hint="raise --temperature, --samples or --max-new-tokens",
        )
    with writing(out) as partial:
        pq.write_table(pa.Table.from_pylist(rows, PAIRS), partial, compression="zstd")
