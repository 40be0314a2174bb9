"""Type of an entry of a stage's `objectives`: the settings of any objective, chosen by `kind`.

This module does not import torch.
"""

from typing import TYPE_CHECKING, Any

from mmkd.objectives.registry import OBJECTIVES

if TYPE_CHECKING:
    AnyObjectiveConfig = Any
else:
    AnyObjectiveConfig = OBJECTIVES.entry()
