"""The table of docs/families.md is up to date."""

import pytest
from transformers.utils import is_torchvision_available

from mmkd.commands.doctor.packages import FAMILIES, WANT_TORCHVISION
from mmkd.errors import CheckpointError
from mmkd.modeling.loading import load_pretrained_processor
from mmkd.runtime.files import write_json
from scripts.families.checks import verdicts
from scripts.families.table import read
from tests.support.places import DOCS
from tests.support.zoo import ZOO

PAGE = read((DOCS / "families.md").read_text())


@pytest.mark.parametrize("name", ZOO)
def test_a_family_does_what_the_page_says(name, tmp_path):
    try:
        found = verdicts(ZOO[name], tmp_path)
    except ImportError as error:
        pytest.skip(" ".join(str(error).split())[:80])
    assert found == PAGE[ZOO[name].title]


def test_the_doctor_knows_the_families_that_need_torchvision():
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in (DOCS / "families.md").read_text().splitlines()
        if line.startswith("| ")
    ]
    families = [row for row in rows if row[0] in PAGE]
    assert len(families) == len(ZOO) == FAMILIES
    assert [row[0] for row in families if "torchvision" in row[-1]] == list(WANT_TORCHVISION)


def test_the_page_has_every_family_and_nothing_fails():
    assert list(PAGE) == [member.title for member in ZOO.values()]
    assert {found.word for row in PAGE.values() for found in row.values()} == {"works", "refused"}


@pytest.mark.skipif(is_torchvision_available(), reason="torchvision is installed")
@pytest.mark.parametrize(
    "name",
    ["qwen2_5_vl", "llava_onevision", "internvl", "qwen3_5", "lfm3_vl", "lfm2_vl", "pixtral"],
)
def test_a_processor_that_wants_torchvision_says_so(name, tmp_path):
    kind = {"lfm2_vl": "Lfm2VlImageProcessor", "pixtral": "PixtralImageProcessor"}.get(name)
    if kind is None:
        ZOO[name].processor().save_pretrained(tmp_path)
    else:  # the classes cannot be imported without it, so nothing can be saved
        processor = kind.replace("Image", "")
        about = {"image_processor_type": kind, "processor_class": processor}
        write_json(tmp_path / "preprocessor_config.json", about)
        write_json(tmp_path / "config.json", {"model_type": name})
    with pytest.raises(CheckpointError, match="install the torchvision that fits") as caught:
        load_pretrained_processor(str(tmp_path))
    assert "\n" not in str(caught.value)
