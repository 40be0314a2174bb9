"""Final hidden states and heads of two small models, float64."""

import torch

N, HS, HT, V = 23, 6, 10, 37


def parts(seed, vs=V, vt=V):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    student = [normal(N, HS), normal(vs, HS), normal(vs)]
    teacher = [normal(N, HT), normal(vt, HT), normal(vt)]
    for t in student:
        t.requires_grad_()
    mask = torch.rand(N, generator=g) < 0.6
    return student, teacher, mask
