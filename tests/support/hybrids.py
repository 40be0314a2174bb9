"""Small hybrid students."""

import torch

from mmkd.recipe import MambaConfig
from mmkd.students import convert
from tests.support import families

SPECIAL = [7, 8, 9, 10]  # image tokens, which a text must not contain


def student(name, layers, init="inherit", **form):
    model = families.make(name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        convert(model, MambaConfig(kind="mamba", layers=layers, init=init, **form))
    return model


def generate(model, batch, **settings):
    return model.generate(
        **batch,
        max_new_tokens=6,
        eos_token_id=None,
        suppress_tokens=SPECIAL,
        output_logits=True,
        return_dict_in_generate=True,
        **settings,
    )
