"""Distil on a folder of your own images, which need no text.

    python examples/own_images.py PHOTOS --teacher ID --student ID --out runs/photos

The teacher answers a few prompts on every image; its answers become the data of a recipe, which
`mmkd run` trains. At the end teacher and student answer on images that were held out.

    OUT/answers.jsonl    the teacher's answers so far; after a stop, the same command goes on
    OUT/train.jsonl      all answers as chat messages; delete it to ask again
    OUT/recipe.yaml      written once; to train otherwise, edit it, delete OUT/photos and run again
    OUT/photos/          the run: report.html, 01-mimic/student
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image

from mmkd.data.answers import Sampled, generate_of, sample_answers
from mmkd.data.encoder import Encoder
from mmkd.data.images import FORMATS, load_image
from mmkd.data.journal import Journal
from mmkd.data.records import GivenRecords
from mmkd.data.schema import Record
from mmkd.data.vocabulary import check_head
from mmkd.errors import AGAIN, DataError, MmkdError, StoppedError
from mmkd.modeling.loading import load_model, load_processor
from mmkd.recipe import DataConfig, ModelConfig, SamplingConfig
from mmkd.runtime import distributed, interrupt
from mmkd.runtime.files import write_text
from mmkd.runtime.progress import console, log_to_console, track

PROMPTS = [
    "Describe this image in detail.",
    "List the objects that you can see, separated by commas.",
]
RECIPE = """\
name: photos
output_dir: %s
teacher: {model: %s, dtype: %s}
student: {model: %s}
data: {train: %s, images: %s}
stages:
  - name: mimic
    train: [connector, language_model]
    objectives:
      - {kind: ce}  # what the teacher said
      - {kind: kl}  # its distributions over that
      - {kind: kl, name: kl_vision, region: vision}  # and over the image's tokens
    epochs: 1
    batch: {size: 4, accumulate: 4}
    precision: auto
    optimizer: {lr: 2.0e-5}
"""
AT_ONCE = 8  # questions


def readable(photos: Path) -> list[str]:
    """Paths of the images that can be decoded, in a fixed order."""
    known = {end for end, kind in Image.registered_extensions().items() if kind in FORMATS}
    files = [f for f in sorted(photos.rglob("*")) if f.suffix.lower() in known]
    names = []
    for file in track(files, "pictures", len(files)):
        try:
            load_image(name := str(file.relative_to(photos)), photos)
            names.append(name)
        except DataError as error:
            console.print(f"left out: {error}", markup=False, highlight=False)
    return names


def ask(
    model: ModelConfig,
    photos: Path,
    pairs: list[tuple[str, str]],
    longest: int,
    keep: Callable[[list[tuple[str, str]], list[Sampled]], None] = lambda pairs, answers: None,
) -> list[Sampled]:
    """A model's likeliest answer to each (image's path, prompt).

    Args:
        model: to ask.
        photos: the folder of the paths.
        pairs: what to ask.
        longest: tokens of an answer.
        keep: called with each batch of pairs and its answers.
    """
    device = distributed.choose_device("auto")
    answering: Any = load_model(model)
    processor = load_processor(model)
    check_head(answering, processor.tokenizer, str(model.model))
    answering.to(device)
    records = GivenRecords(str(photos))
    encoder = Encoder(records, processor, DataConfig(train=records.name))
    settings = SamplingConfig(max_new_tokens=longest, temperature=0)
    ends = answering.generation_config.eos_token_id

    def record(name: str, prompt: str) -> Record:
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        return Record(name, [{"role": "user", "content": content}], [name], root=photos)

    parts = [pairs[i : i + AT_ONCE] for i in range(0, len(pairs), AT_ONCE)]
    answers: list[Sampled] = []
    for part in track(parts, f"{model.model} answers", len(parts)):
        with interrupt.deferred():
            asked = [record(*pair) for pair in part]
            said = sample_answers(
                generate_of(answering), encoder, asked, settings, seed=0, device=device, ends=ends
            )
            keep(part, said)
        answers += said
    answering.cpu()
    torch.cuda.empty_cache()  # what trains next needs the memory
    return answers


def write_answers(
    data: Path, teacher: ModelConfig, photos: Path, questions: list[tuple[str, str]], longest: int
) -> None:
    """Ask the teacher the questions that it has not answered yet, and write the answers as records.

    A record whose answer was cut off is `unfinished`: the student learns the words, but no end.
    """
    request = {"teacher": teacher.model, "max_new_tokens": longest}
    journal = Journal(data.with_name("answers.jsonl"), request)

    def keep(pairs: list[tuple[str, str]], answers: list[Sampled]) -> None:
        said = zip(pairs, answers, strict=True)
        journal.add(*({"picture": n, "prompt": p, **asdict(a)} for (n, p), a in said))

    known = {(e["picture"], e["prompt"]) for e in journal.entries}
    if missing := [pair for pair in questions if pair not in known]:
        ask(teacher, photos, missing, longest, keep)
    found = {(e["picture"], e["prompt"]): e for e in journal.entries}
    lines = []
    for name, prompt in questions:
        entry = found[name, prompt]
        turns = [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": entry["text"]},
        ]
        row = {"images": [name], "messages": turns}
        if not entry["finished"]:
            row["unfinished"] = True
        lines += [json.dumps(row) + "\n"] if entry["text"] else []
    cut = sum(not found[pair]["finished"] for pair in questions)
    if cut:
        console.print(f"{cut:,} of {len(questions):,} answers were cut at {longest} tokens")
    if len(lines) < len(questions):
        empty = len(questions) - len(lines)
        console.print(f"{empty:,} of {len(questions):,} answers are empty and left out")
    write_text(data, "".join(lines))
    journal.delete()


def main(
    photos: Annotated[Path, typer.Argument(help="folder of images, in any depth")],
    teacher: Annotated[str, typer.Option(help="folder or Hub id")],
    student: Annotated[str, typer.Option(help="folder or Hub id, of the teacher's tokenizer")],
    out: Annotated[Path, typer.Option(help="folder to write")],
    prompt: Annotated[list[str], typer.Option(help="repeat for several")] = PROMPTS,
    held_out: Annotated[int, typer.Option(min=1, help="images, the last by name")] = 3,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="longest answer")] = 128,
) -> None:
    """Distil a teacher into a student on images of your own."""
    photos, out = photos.resolve(), out.resolve()
    if len(names := readable(photos)) <= held_out:
        raise DataError(f"{len(names)} readable images", where=str(photos), hint="add some")
    dtype = "bfloat16" if distributed.choose_device("auto").type == "cuda" else "float32"
    asked = ModelConfig(model=teacher, dtype=dtype)
    data, file = out / "train.jsonl", out / "recipe.yaml"
    if not data.exists():
        questions = [(name, p) for name in names[:-held_out] for p in prompt]
        write_answers(data, asked, photos, questions, max_new_tokens)
    if not file.exists():
        words = (out, teacher, dtype, student, data, photos)
        write_text(file, RECIPE % tuple(json.dumps(str(word)) for word in words))
    if code := interrupt.call([sys.executable, "-m", "mmkd.cli", "run", str(file)]):
        raise typer.Exit(code)
    interrupt.stop_here()
    made = ModelConfig(model=str(out / "photos" / "01-mimic" / "student"))
    questions = [(name, prompt[0]) for name in names[-held_out:]]
    said = [ask(model, photos, questions, max_new_tokens) for model in (asked, made)]
    for (name, question), one, other in zip(questions, *said, strict=True):
        text = f"\n{name}: {question}\n  teacher: {one.text}\n  student: {other.text}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    log_to_console()
    with interrupt.listening(AGAIN):
        try:
            typer.run(main)
        except StoppedError as end:
            print(end)
            sys.exit(interrupt.status())
        except MmkdError as error:
            sys.exit(f"error: {error}")
