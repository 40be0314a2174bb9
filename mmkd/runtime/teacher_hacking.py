"""Teacher hacking: a student follows its teacher ever closer, and gets no better at the task.

Tiapkin et al. 2025 (arXiv 2502.02671) measure the distance to the teacher (proxy) and to an oracle
(golden) on held-out prompts. With fixed offline answers the proxy falls on while the golden metric
turns and rises. Without an oracle, the proxy leaves the straight line that it has followed over the
steps in a log-log plot. Here `teacher_kl` is the proxy, and the cross-entropy of the held-out
answers, `answer_ce`, stands in for the golden metric if the answers are true.

    trend     log p_i = a - b log t_i, fitted to the middle third of the validations; each of the
              last three lies more than three prediction standard errors above the line
    answers   each of the last three values of `answer_ce` lies above its best by more than three
              standard deviations of its noise, and `teacher_kl` below its mean at that best; the
              best is the lowest mean of three validations in a row

The trend is a hint only. Where there are answers, they decide: a trend counts only if none of the
last three values of `answer_ce` is the lowest.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any, Literal

LAST = 3
"""Number of last validations that must all show it."""
ERRORS = 3.0
"""Number of standard errors or deviations that they must differ by."""
FEWEST = 15
"""Validations below which a middle third is too small for a line."""
FEWEST_ANSWERS = 2 * LAST
"""The same for the best and the last values of `answer_ce`."""
CHECKS = 200
"""Largest number of validations at which a sign is looked for afterwards."""
MOST = 1e12
"""Values from which on a file of a run must be damaged."""
NORMAL = 0.6744897501960817 * math.sqrt(6)
"""Median absolute second difference of independent normal numbers of standard deviation 1."""


@dataclass(frozen=True)
class Hacking:
    """A sign of teacher hacking.

    Attributes:
        sign: what shows it.
        seen: step of the validation that shows it.
        stop: step at which to stop: of the best `answer_ce`, or of the last validation on the line.
    """

    sign: Literal["trend", "answers"]
    seen: int
    stop: int

    def __str__(self) -> str:
        shown = {
            "trend": "the KL to the teacher has left the line that it followed",
            "answers": "the student comes closer to the teacher, and its answers get worse",
        }
        return f"{shown[self.sign]} (seen at step {self.seen:,}): stop at step {self.stop:,}"


def found_in(
    lines: Sequence[Mapping[str, Any]], proxy: str, golden: str, *, last: bool = False
) -> dict[str, Hacking]:
    """Signs in the lines of validation.jsonl, by the teacher's metric: `proxy`, or `proxy.NAME` of
    each of several teachers.

    Args:
        lines: in the order of their steps.
        proxy, golden: names of the metrics.
        last: only signs that the last validations show.
    """
    found = {}
    look = sign_at_last if last else find_hacking
    for name in dict.fromkeys(key for line in lines for key in line):
        if name.partition(".")[0] != proxy:
            continue
        keys = ("step", name, golden)
        kept = {line["step"]: line for line in lines if all(_usable(line.get(k)) for k in keys)}
        steps, proxies, answers = ([kept[step][key] for step in sorted(kept)] for key in keys)
        if len(kept) >= FEWEST_ANSWERS and (sign := look(steps, proxies, answers)) is not None:
            found[name] = sign
    return found


def _usable(value: Any) -> bool:
    # Files of a run may be damaged.
    return isinstance(value, int | float) and 0 <= value < MOST


def find_hacking(
    steps: Sequence[int], proxy: Sequence[float], golden: Sequence[float] | None = None
) -> Hacking | None:
    """The first sign of teacher hacking in the validations of a stage; None if there is none. Of
    very many validations, only some are looked at.

    Args:
        steps: of the validations, ascending.
        proxy: KL divergence from the teacher at these steps.
        golden: cross-entropy of the answers at these steps; None if they are not true.
    """
    stride = max(1, len(steps) // CHECKS)
    for count in range(len(steps) % stride, len(steps) + 1, stride):
        if count < FEWEST_ANSWERS:
            continue
        now = golden[:count] if golden is not None else None
        found = sign_at_last(steps[:count], proxy[:count], now)
        if found is not None:
            return found
    return None


def sign_at_last(
    steps: Sequence[int], proxy: Sequence[float], golden: Sequence[float] | None = None
) -> Hacking | None:
    """The sign that the last validations show; arguments as in `find_hacking`."""
    if golden is not None:
        if min(golden) in golden[-LAST:]:
            return None
        mean, closest = (
            [fmean(values[i : i + LAST]) for i in range(len(values) - LAST + 1)]
            for values in (golden, proxy)
        )
        best = min(range(len(mean)), key=mean.__getitem__)
        limit = mean[best] + ERRORS * noise(golden)
        closer = all(value < closest[best] for value in proxy[-LAST:])
        if closer and all(value > limit for value in golden[-LAST:]):
            return Hacking("answers", steps[-1], steps[best + LAST // 2])
    if leaves_line(steps, proxy):
        return Hacking("trend", steps[-1], steps[-LAST - 1])
    return None


def leaves_line(steps: Sequence[int], proxy: Sequence[float]) -> bool:
    """Whether each of the last values lies above the line through the middle third of the values,
    in a log-log plot, by more than `ERRORS` standard errors of a prediction.

    Args:
        steps: of the values, ascending and positive.
        proxy: the values; without a line for values that are not positive.
    """
    count = len(steps)
    if count < FEWEST or min(proxy) <= 0 or min(steps) <= 0:
        return False
    x, y = ([math.log(value) for value in values] for values in (steps, proxy))
    middle = range(count // 3, count - count // 3)
    mean_x, mean_y = (fmean(values[i] for i in middle) for values in (x, y))
    spread = sum((x[i] - mean_x) ** 2 for i in middle)
    slope = sum((x[i] - mean_x) * (y[i] - mean_y) for i in middle) / spread
    above = [value - mean_y - slope * (at - mean_x) for at, value in zip(x, y, strict=True)]
    variance = sum(above[i] ** 2 for i in middle) / (len(middle) - 2)
    return all(
        above[i]
        > ERRORS * math.sqrt(variance * (1 + 1 / len(middle) + (x[i] - mean_x) ** 2 / spread))
        for i in range(count - LAST, count)
    )


def noise(values: Sequence[float]) -> float:
    """Standard deviation of the noise around a smooth curve, from second differences.

    Args:
        values: three or more.
    """
    bends = [a - 2 * b + c for a, b, c in zip(values, values[1:], values[2:], strict=False)]
    return median(map(abs, bends)) / NORMAL
