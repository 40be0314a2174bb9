"""What attacks by code share: code that leaves the file `ran`, and a task that can run it."""

from pathlib import Path

THEME = "code"
EVIL = "open('ran', 'w').close()\n"
NAMED = "--trust-remote-code"
FUNCTION = "!function mmkd.evaluation.scenes."


TASK = f"""\
task: scenes_pope
dataset_path: json
dataset_kwargs: {{data_files: {{test: ../records.json}}}}
test_split: test
output_type: generate_until
doc_to_visual: {FUNCTION}images
doc_to_text: question
doc_to_target: answer
process_results: {FUNCTION}process_pope
metric_list:
  - {{metric: pope_accuracy, aggregation: {FUNCTION}accuracy, higher_is_better: true}}
"""


def tasks(text=TASK):
    """A folder of one task, and code that it may name."""
    Path("tasks").mkdir()
    Path("tasks/scenes_pope.yaml").write_text(text)
    Path("tasks/own.py").write_text(EVIL + "def run(*_):\n    return []\n")


def task(world, text):
    tasks(text)
    world.raw["evaluate"] = {"tasks": ["scenes_pope"], "include": "tasks", "teacher": False}
