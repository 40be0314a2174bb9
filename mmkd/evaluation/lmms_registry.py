"""The entry point `lmms_eval.models`: makes `--model mmkd` known to lmms-eval."""

from typing import Any


def manifests() -> list[Any]:
    """One `ModelManifest` that names the adapter's class; lmms-eval imports it when it is used."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [
        ModelManifest(model_id="mmkd", chat_class_path="mmkd.evaluation.adapter.MmkdModel"),
    ]
