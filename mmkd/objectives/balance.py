"""Auxiliary losses of the routers of sparse layers, over all tokens except padding,
or over those of some data sources.

    balance    sum over sparse layers of E sum_e mean_t(p_te) share_t(e is first)
               (arXiv 2101.03961, equation 4; LLaVA-MoD, arXiv 2408.15881)
    router_z   sum over sparse layers of mean_t (log sum_e exp l_te)^2
               (arXiv 2202.08906, equation 5)

`balance` is not a mean over tokens. It is computed for each micro-batch of each process, and these
values are averaged with their numbers of tokens as weights.
"""

import torch
from torch import Tensor

from mmkd.objectives.base import Objective, Outcome, scale_to_global_mean
from mmkd.objectives.settings import BalanceConfig, RouterZConfig
from mmkd.objectives.signals import RouterSignals, Signals
from mmkd.objectives.targets import Targets
from mmkd.ops import balance_loss, route, z_loss


class RouterObjective(Objective):
    """Base class: a sum over sparse layers of one term each."""

    def rows(self, targets: Targets) -> Tensor:
        return targets.covered(targets.attention)

    def term(self, router: RouterSignals, mask: Tensor) -> Tensor:
        """The term of one layer, a scalar.

        Args:
            router: signals of the layer's router.
            mask: [B, T] bool, False on padding.
        """
        raise NotImplementedError

    def __call__(
        self, student: Signals, teacher: Signals | None, targets: Targets, count: float
    ) -> Outcome:
        rows = self.rows(targets)
        terms = [self.term(router, rows) for router in student.routers.values()]
        return Outcome(scale_to_global_mean(torch.stack(terms).sum(), rows, count))


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
    """Count the tokens that each expert processes, padding excluded.

    Returns:
        By layer index, [E] float64.
    """
    real = targets.attention.flatten()
    counts = {}
    for layer, router in signals.routers.items():
        logits = router.logits.flatten(0, 1)[real]  # [n, E]
        chosen = route(logits, router.top_k).experts.flatten()
        counts[layer] = chosen.bincount(minlength=logits.shape[1]).double()
    return counts
