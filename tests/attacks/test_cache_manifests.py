"""A cache manifest with another structure is refused in one line."""

import copy
import json
import random

import pytest

from mmkd.cache import Store
from mmkd.errors import CheckpointError
from scripts.attacks.mutate import mutated

GOOD = {
    **{"format": 2, "vocabulary": 10, "k": 2, "regions": ["response"], "hidden": None},
    **{"max_length": 8, "teacher": {"weights": None}, "processor": "x"},
    "shards": [{"file": "a", "bytes": 1, "sha256": "x", "records": 1, "rows": 1}],
}


@pytest.mark.parametrize("key", [*GOOD, *GOOD["shards"][0]])
def test_a_manifest_without_a_key_is_refused(key, tmp_path):
    manifest = copy.deepcopy(GOOD)
    del (manifest if key in manifest else manifest["shards"][0])[key]
    opened(manifest, tmp_path, refused=True)


@pytest.mark.parametrize("seed", range(200))
def test_a_spoilt_manifest_is_read_or_refused(seed, tmp_path):
    opened(mutated(random.Random(seed), GOOD), tmp_path)


def opened(manifest, folder, *, refused=False):
    (folder / "a").write_text("x")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    try:
        Store(folder)
    except CheckpointError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert not refused
