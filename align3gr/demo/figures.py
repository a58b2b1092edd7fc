"""What a demo found, over its worlds: the numbers of ``--json``, the table, and the report."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .state import DemoState


@dataclass(frozen=True)
class DemoFigures:
    """Liked rates by round on the evaluated users, mean over the worlds; list index 0 is round 1."""

    learning: list[float]
    frozen: list[float]
    popularity: list[float]
    oracle: list[float]
    random: list[float]
    gap_closed: float
    """(learning - frozen) / (oracle - frozen) in the last round."""
    lift: float
    """learning / frozen - 1 in the last round."""
    seconds: float
    """Work in all, over all worlds."""
    seeds: list[int]

    @classmethod
    def of(cls, states: Sequence[DemoState]) -> "DemoFigures":
        """Means over finished demos of equally many rounds."""
        rounds = len(states[0].learning)

        def mean(rows: list[list[float]]) -> list[float]:
            return [float(value) for value in np.mean(rows, axis=0)]

        learning = mean([state.learning for state in states])
        frozen = mean([[_known(state.frozen)] * rounds for state in states])
        oracle = mean([[_known(state.oracle)] * rounds for state in states])
        return cls(
            learning=learning,
            frozen=frozen,
            popularity=mean([[one.popular for one in state.rounds] for state in states]),
            oracle=oracle,
            random=mean([[_known(state.random)] * rounds for state in states]),
            gap_closed=(learning[-1] - frozen[-1]) / (oracle[-1] - frozen[-1]),
            lift=learning[-1] / frozen[-1] - 1.0,
            seconds=sum(state.seconds for state in states),
            seeds=[int(state.options["seed"]) for state in states],
        )

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self)

    def table(self) -> str:
        """Rounds as rows, policies as columns."""
        names = ("learning", "frozen", "popularity", "oracle", "random")
        lines = [f"{'round':<6}" + "".join(f"{name:>12}" for name in names)]
        for number in range(len(self.learning)):
            cells = "".join(f"{getattr(self, name)[number]:>12.4f}" for name in names)
            lines.append(f"{number + 1:<6}{cells}")
        lines.append(
            f"liked rate on users no round learns from; learning is {self.lift:+.1%} on frozen and closes "
            f"{self.gap_closed:.1%} of its gap to the oracle"
        )
        return "\n".join(lines)


def _known(value: float | None) -> float:
    assert value is not None, "a finished demo has judged its baselines"
    return value
