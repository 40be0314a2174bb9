"""Tables of the load of experts by layer, from the last steps of a stage."""

from dataclasses import dataclass

from mmkd.report.rundata import Load, Run

LAST = 10  # number of steps over which a share is averaged


@dataclass(frozen=True)
class Share:
    """The share of tokens of one expert: in percent, and relative to an even share, from -1
    (unused) to 1 (twice an even share or more)."""

    percent: float
    tilt: float

    @property
    def style(self) -> str:
        """Style of a table cell. The colour is stronger for busier experts."""
        return f"--heat: {round(50 * (1 + self.tilt))}%"


@dataclass(frozen=True)
class LoadTable:
    """Shares by layer of one student after one stage."""

    label: str
    stage: str
    rows: list[tuple[str, list[Share]]]


def load_tables(run: Run) -> list[LoadTable]:
    """A table for each sparse student and stage; the first seed if there are several."""
    found = []
    for group in run.groups:
        member = next(m for m in run.members if m.group == group)
        for stage in member.stages:
            if stage.loads:
                last = stage.loads[-LAST:]
                rows = [(layer, _shares(last, layer)) for layer in last[-1]]
                found.append(LoadTable(member.label, stage.name, rows))
    return found


def _shares(loads: list[Load], layer: str) -> list[Share]:
    columns = list(zip(*(load[layer] for load in loads), strict=True))
    means = [sum(column) / len(column) for column in columns]
    return [Share(100 * m, max(-1.0, min(1.0, m * len(means) - 1))) for m in means]


def busiest(load: Load) -> float:
    """The most used expert's share as a multiple of an even share, over all layers."""
    return max(max(shares) * len(shares) for shares in load.values())
