"""The answers so far, on disk: a folder with a file of JSON lines for each process.

An answer is stored under the key of its request, which contains everything that it depends on. So
the order of answers, the number of processes and changes of the recipe do not matter: a request
whose key is known is not asked again. An incomplete last line, from a killed command, is
overwritten.
"""

from pathlib import Path

from mmkd.errors import DataError
from mmkd.making.base import Answer
from mmkd.runtime.formats import FormatError, parse_json
from mmkd.runtime.json_lines import JsonLines, complete_lines


class AnswerLog:
    """Reads the answers of all processes, and appends to the file of this one.

    Args:
        folder: of the files. It is created.
        rank: of this process.

    Raises:
        DataError: a line is not an answer.
    """

    def __init__(self, folder: Path, rank: int = 0):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._file = JsonLines(folder / f"answers-{rank:05d}.jsonl", sync=False)
        self.answers: dict[str, Answer] = {}
        self.read()

    def read(self) -> None:
        """Read what all processes have written."""
        for path in sorted(self.folder.glob("answers-*.jsonl")):
            for number, line in enumerate(complete_lines(path), 1):
                key, answer = _parsed(line, f"{path}: line {number}")
                self.answers[key] = answer

    def add(self, key: str, answer: Answer) -> None:
        """Append an answer. A killed process keeps it, a machine that fails may lose it."""
        self._file.add({"key": key, "text": answer.text, "finished": answer.finished})
        self.answers[key] = answer


def _parsed(line: bytes, where: str) -> tuple[str, Answer]:
    try:
        row = parse_json(line)
        key, text, finished = row["key"], row["text"], row["finished"]
        if not (isinstance(key, str) and isinstance(text, str) and isinstance(finished, bool)):
            raise TypeError
    except (FormatError, KeyError, TypeError) as error:
        raise DataError(
            "it is not an answer", where=where, hint="delete the file; its answers are asked again"
        ) from error
    return key, Answer(text, finished)
