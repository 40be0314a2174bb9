"""A batch of three sequences with images, prompts and responses, and tensors for its tokens."""

import torch

from mmkd.objectives import Targets

B, T = 3, 7
LAYOUT = ["vvpprr.", "vpprrrr", "pprrr.."]


def mask(letters):
    return torch.tensor([[c in letters for c in row] for row in LAYOUT])


TARGETS = Targets(torch.zeros(B, T, dtype=torch.long), mask("vpr"), mask("r"), mask("v"))


def normal(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()
