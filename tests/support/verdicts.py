"""Results that lmms-eval would collect from a task."""

from typing import Any

from mmkd.data.scenes.build import POPE_CATEGORIES

POPE_NAMES = {
    f"{prefix}_{measure}"
    for prefix in ("pope", *(f"pope_{c}" for c in POPE_CATEGORIES))
    for measure in ("accuracy", "precision", "recall", "f1", "yes_rate")
}


def judged(process: Any, rows: list[tuple[dict[str, Any], str]]) -> dict[str, list[Any]]:
    """Verdicts per metric name, collected as lmms-eval does it."""
    collected: dict[str, list[Any]] = {}
    for i, (doc, prediction) in enumerate(rows):
        verdicts = process({"id": str(i), "question": "?", **doc}, [prediction])
        for name, verdict in verdicts.items():
            collected.setdefault(name, []).append(verdict)
    return collected
