"""Seeds of all generators of random numbers that libraries share."""

import random

import numpy as np
import torch


def set_seed(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators, the latter on all devices.

    The same as transformers' `set_seed`, whose module is slow to import: it imports peft.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
