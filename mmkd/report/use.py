"""Where a run's student is, and a few lines of Python that ask it about a picture."""

from pathlib import Path

from mmkd.files import read_json
from mmkd.report.rundata import Run

SNIPPET = """\
from transformers import AutoModelForImageTextToText, AutoProcessor
name = {folder!r}
processor = AutoProcessor.from_pretrained(name{trust})
model = AutoModelForImageTextToText.from_pretrained(name{trust})
content = [{{"type": "image", "path": "picture.png"}}, {{"type": "text", "text": "What is this?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}], add_generation_prompt=True,
    tokenize=True, return_dict=True, return_tensors="pt",
).to(model.device, model.dtype)
answer = model.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(answer, skip_special_tokens=True))
"""


def how_to_use(run: Run) -> str | None:
    """The finished students' folders, and Python that asks the first of them; None without one."""
    finished = {m.label: m.student for m in run.members if m.done and m.student is not None}
    if not finished:
        return None
    listed = [f"student {label}: {folder}" for label, folder in finished.items()]
    folder = next(iter(finished.values()))
    lines = snippet(folder).splitlines()
    return "\n".join([*listed, "", "try it in Python:", "", *(f"    {line}" for line in lines)])


def snippet(folder: Path) -> str:
    """Python that asks the model in a folder about a picture.

    A student with layers of mmkd's own brings their code, which transformers runs if it is told to.
    """
    own = "auto_map" in read_json(folder / "config.json")
    return SNIPPET.format(folder=str(folder), trust=", trust_remote_code=True" if own else "")
