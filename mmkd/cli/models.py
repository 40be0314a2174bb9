"""Commands for models: convert, eval, chat."""

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from mmkd.cli.app import (
    AsJson,
    Device,
    Nproc,
    Plugins,
    Revision,
    Trusted,
    app,
    launch_again,
    named,
    notes,
)
from mmkd.errors import AGAIN, MmkdError
from mmkd.runtime import interrupt
from mmkd.runtime.fields import MOST_SEED

LONGEST_TASK_S = 86400.0
"""Seconds that processes of an evaluation wait for the others, one of which may download data."""


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help="model folder or Hub id")],
    out: Annotated[Path, typer.Option(help="folder to write")],
    settings: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(help="key=value of the mixers, such as rope=false or state=kv"),
    ] = None,
    keep_attention: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="every:4, every:4:last, head:2, tail:2, none or 0,4,8"),
    ] = None,
    layers: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="layers that become Mamba, instead of --keep-attention"),
    ] = None,
    init: Annotated[str, typer.Option(help="default, inherit, mimic or exact")] = "mimic",
    experts: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="experts per sparse layer, with or without Mamba layers"),
    ] = None,
    top_k: Annotated[int, typer.Option(help="experts per token")] = 2,
    sparse_layers: Annotated[str, typer.Option(help="even, odd, all, every:4, 0,4,8")] = "even",
    conversion: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="a conversion as in a recipe, such as '{kind: depth_pruning, decoder: [0, 2]}'; "
            "applied before Mamba and experts; may be given several times"
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="of the new weights")] = 42,
    plugin: Plugins = None,
    trusted: Trusted = None,
) -> None:
    """Write a student: attention replaced by Mamba-2, feed-forward networks by experts, or other
    conversions."""
    from mmkd.recipe import load_student
    from mmkd.runtime.progress import say
    from mmkd.students import layer_choice, write_converted

    if out.exists():
        raise MmkdError("it is there already", where=str(out), hint="name a new folder")
    mamba: dict[str, Any] = {"kind": "mamba", "init": init}
    for name, text in (("keep_attention", keep_attention), ("layers", layers)):
        if text is not None:
            mamba[name] = layer_choice.parse(text)
    moe: dict[str, Any] = {"kind": "moe", "experts": experts, "top_k": top_k}
    moe["layers"] = layer_choice.parse(sparse_layers)
    others = conversion or []
    alone = experts is None and not others
    wants_mamba = alone or bool(settings) or len(mamba) > 2
    student = load_student(
        {
            "model": model,
            "dtype": dtype,
            "convert": [{}] * len(others) + [mamba] * wants_mamba + [moe] * (experts is not None),
        },
        [
            *(f"convert.{number}={text}" for number, text in enumerate(others)),
            *(f"convert.{len(others)}.{setting}" for setting in settings or []),
        ],
    )
    report = write_converted(student, out, seed=seed, new=True)
    for line in report.lines:
        say(line)
    say(f"wrote {out}: {report.after:,} parameters, {report.before:,} before")


@app.command(name="eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="a run's folder, a model's folder or a Hub id")],
    tasks: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="lmms-eval tasks, separated by commas; default: the recipe's, for a run"),
    ] = None,
    student: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="label of one of the run's students; default: all finished ones"),
    ] = None,
    include: Annotated[Optional[Path], typer.Option(help="folder of task files")] = None,  # noqa: UP045
    local: Annotated[Optional[Path], typer.Option(help="folder of the tasks' data")] = None,  # noqa: UP045
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="folder for results and samples; a run's students get one folder each"),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    limit: Annotated[Optional[int], typer.Option(min=1, help="documents per task")] = None,  # noqa: UP045
    calibration: Annotated[
        bool,
        typer.Option("--calibration", help="also compute the expected calibration error"),
    ] = False,
    device: Device = "auto",
    revision: Revision = None,
    trusted: Trusted = None,
    nproc: Nproc = 1,
) -> None:
    """Score a run's students, or any model, with lmms-eval."""
    if out is not None:
        interrupt.can_go_on(AGAIN)  # finished tasks are stored there
    if nproc > 1:
        texts = {"tasks": tasks, "student": student, "device": device, "revision": revision}
        paths = {"include": include, "local": local, "out": out}
        numbers = {"batch-size": batch_size, "limit": limit}
        options = [*texts.items(), *paths.items(), *numbers.items()]
        words = [f"--{name}={value}" for name, value in options if value is not None]
        words += ["--calibration"] * calibration
        launch_again(["eval", model, *words, *named(None)], nproc)
    from mmkd.cli.scoring import find_models, score_models
    from mmkd.report.calibration import print_reliability
    from mmkd.report.tables import print_scores
    from mmkd.runtime import distributed
    from mmkd.runtime.processes import all_processes
    from mmkd.runtime.progress import muted

    given = None if tasks is None else [t.strip() for t in tasks.split(",") if t.strip()]
    results: dict[str, Any] = {}
    processes = all_processes()
    distributed.connect(distributed.choose_device(device), timeout_s=LONGEST_TASK_S)
    with muted(not processes.is_first):
        scores, failed = score_models(
            find_models(model, student, given, include, local),
            out,
            on_result=results.__setitem__,
            batch_size=batch_size,
            limit=limit,
            calibration=calibration,
            device=device,
            revision=revision,
            processes=processes,
        )
    distributed.leave()
    if not processes.is_first:
        return
    if scores:
        print_scores(scores)
    for label, result in results.items():
        print_reliability(label, result.calibration)
    if failed:
        raise failed[0]


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="a run's folder, a model's folder or a Hub id")],
    question: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(help="one question; without it, a conversation in the terminal"),
    ] = None,
    image: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="image that comes with the question; give it again for more"),
    ] = None,
    compare: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="MODEL", help="a second model, such as the teacher, that answers too"),
    ] = None,
    student: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="label of one of the run's students"),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="longest answer")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0: greedy decoding")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="of sampled answers")] = 0,
    device: Device = "auto",
    revision: Revision = None,
    as_json: AsJson = False,
    trusted: Trusted = None,
) -> None:
    """Ask a student about images: one question, or a conversation."""
    from mmkd.cli.scoring import find_student
    from mmkd.commands.chat import Chat
    from mmkd.recipe import SamplingConfig

    if as_json and question is None:
        raise MmkdError("--json prints one answer", hint="add a question to the command")
    models = {k: (name, revision) for k, name in find_student(model, student).items()}
    if compare in models:
        raise MmkdError("it is the model itself", where="--compare", hint="name another one")
    if compare is not None:
        models[compare] = (compare, None)
    sampling = SamplingConfig(max_new_tokens=max_new_tokens, temperature=temperature)
    with notes(as_json):
        chat = Chat(models, sampling, seed=seed, device=device)
    if question is None:
        chat.converse(image or [])
    elif as_json:
        chat.ask_as_json(question, image or [])
    else:
        chat.ask(question, image or [])
