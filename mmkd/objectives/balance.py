"""What keeps the experts of sparse layers in use; padding never counts, each term counts once.

    balance    sum over sparse layers of E sum_e mean_t(p_te) share_t(e is first)
               (arXiv 2101.03961, equation 4; LLaVA-MoD, arXiv 2408.15881)
    router_z   sum over sparse layers of mean_t (log sum_e exp l_te)^2
               (arXiv 2202.08906, equation 5)

`balance` is no mean over tokens: a share is taken per process and micro-batch, and the values of
several are averaged by their tokens.
"""

import torch
from torch import Tensor

from mmkd.objectives.base import (
    Objective,
    Outcome,
    RouterSignals,
    Signals,
    Targets,
    share_of,
)
from mmkd.objectives.settings import BalanceConfig, RouterZConfig
from mmkd.ops import balance_loss, route, z_loss


class RouterObjective(Objective):
    """Base: a term per sparse layer, over all real tokens."""

    def rows(self, targets: Targets) -> Tensor:
        return targets.attention

    def term(self, router: RouterSignals, mask: Tensor) -> Tensor:
        """Scalar of one layer; `mask` is [B, T]."""
        raise NotImplementedError

    def __call__(
        self, student: Signals, teacher: Signals | None, targets: Targets, count: float
    ) -> Outcome:
        rows = self.rows(targets)
        terms = [self.term(router, rows) for router in student.routers.values()]
        return Outcome(share_of(torch.stack(terms).sum(), rows, count))


class Balance(RouterObjective):
    config_class = BalanceConfig

    def term(self, router: RouterSignals, mask: Tensor) -> Tensor:
        return balance_loss(route(router.logits.flatten(0, 1), router.top_k), mask.flatten())


class RouterZ(RouterObjective):
    config_class = RouterZConfig

    def term(self, router: RouterSignals, mask: Tensor) -> Tensor:
        return z_loss(router.logits.flatten(0, 1), mask.flatten())


@torch.no_grad()
def expert_counts(signals: Signals, targets: Targets) -> dict[int, Tensor]:
    """How often each expert is chosen by real tokens: layer -> [E] float64."""
    real = targets.attention.flatten()
    counts = {}
    for layer, router in signals.routers.items():
        logits = router.logits.flatten(0, 1)[real]  # [n, E]
        chosen = route(logits, router.top_k).experts.flatten()
        counts[layer] = chosen.bincount(minlength=logits.shape[1]).double()
    return counts
