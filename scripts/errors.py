"""Write docs/errors.md: run every bad input of tests/support/bad_inputs and note what mmkd says.

python -m scripts.errors
"""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "errors.md"


def messages(folder: Path) -> dict[str, str]:
    """What mmkd says, by the name of the case."""
    from mmkd.data.scenes.build import build_scenes
    from mmkd.runtime.progress import track
    from tests.support.bad_inputs import CASES, Given, outcome, world_in
    from tests.support.tiny import write_tiny_model

    build_scenes(folder / "scenes", seed=0, train=2, validation=2, evaluation=2)
    write_tiny_model(folder / "scenes" / "processor", folder / "model")
    given = Given(folder / "given", folder / "model")
    said = {}
    for case in track(CASES, "bad inputs", len(CASES)):
        with world_in(folder / case.name, given) as world:
            said[case.name] = outcome(case, world).message
    return said


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"  # as in the tests
    from mmkd.runtime.files import write_text
    from mmkd.runtime.progress import log_to_console
    from tests.support.bad_inputs import page

    log_to_console()
    with TemporaryDirectory() as name:
        write_text(PAGE, page(messages(Path(name))))
