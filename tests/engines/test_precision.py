"""`precision: auto`: bfloat16 where the device multiplies it, else float32."""

import pytest
import torch

from mmkd.engines import choose_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("able", "chosen"),
    [
        ({}, "float32"),
        ({"avx512_bf16": False, "amx_bf16": False}, "float32"),
        ({"avx512_bf16": True}, "bfloat16"),
        ({"avx512_bf16": False, "amx_bf16": True}, "bfloat16"),
    ],
)
def test_auto_asks_the_processor(able, chosen, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert choose_precision("auto", CPU) == chosen


@pytest.mark.parametrize("able", [True, False])
def test_auto_asks_the_card_without_emulation(able, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda **settings: asked.append(settings) or able
    )
    assert choose_precision("auto", torch.device("cuda")) == ("bfloat16" if able else "float32")
    assert asked == [{"including_emulation": False}]


def test_a_card_that_is_planned_for_multiplies_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_precision("auto", torch.device("cuda")) == "bfloat16"


@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_what_the_recipe_names_is_taken(wanted, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": wanted == "float32"})
    assert choose_precision(wanted, CPU) == wanted
