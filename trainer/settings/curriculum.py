"""Settings of self-play, and of the curriculum that chains stages."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .numbers import Count, Positive
from .preference import FEEDBACK_STAGES, StageSettings, require_different_names


class SelfPlaySettings(BaseModel):
    """SP-DPO's data: what the policy is told it should rather not have recommended."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    candidates: Literal["beam", "sampling"] = "sampling"
    """How the policy draws candidates: its best by constrained beam search (the paper), or a Gumbel top-k
    sample. On Beauty an easy stage on a beam's candidates cost 7% of Recall@50, one of all grades on a
    sample's nothing (docs/preference.md)."""
    width: Annotated[int, Field(ge=1, le=1000)] = 50
    """Candidates of a target (the published code: 200)."""
    temperature: Positive = 1.0
    """Of ``sampling``: above 1 draws further from the policy's best."""
    targets: Count = 1
    """Training targets of a user, the latest first; each makes one sample a grade."""
    grading: Literal["prefix", "similarity"] = "prefix"
    """``prefix``: the leading codes that chosen and rejected share, 0 easy, 1 medium, 2 or more hard (the
    paper); ``similarity``: the cosine of their SCIDs' code vectors."""
    similarity: tuple[float, float] = (0.5, 0.8)
    """Cosines from which on a rejected item is medium, and hard; for ``similarity``. On Beauty 7% of all
    pairs of items are medium and 1% hard; pairs that share one code have .78 (median), two .93."""
    negatives: Literal["nearest", "stochastic"] = "stochastic"
    """Which candidates of a grade are rejected: those that the policy ranks highest, or any, at random."""
    rejected: Annotated[int, Field(ge=1, le=20)] = 20
    """Rejected items of a sample at most (paper: 20)."""
    fill: Literal["siblings", "none"] = "siblings"
    """Where a grade has fewer candidates: add items of that grade at random from the trie, or leave it at
    fewer. By prefix only; never an item twice."""
    samples: Count | None = 4000
    """Samples of a grade at most, drawn by the seed; none: all. Not a limit of speed: on Beauty every step
    beyond the first few dozen did harm."""

    @model_validator(mode="after")
    def _bounds_in_order(self) -> Self:
        low, high = self.similarity
        if not -1 < low < high < 1:
            raise ValueError("similarity must name two cosines, the medium one below the hard one")
        return self


class CurriculumSettings(BaseModel):
    """The chain SFT -> SP-DPO -> RF-DPO: its stages in order, and where self-play draws from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    stages: tuple[StageSettings, ...] = (
        StageSettings(name="sp-easy", data="sp-easy", beta=0.1, learning_rate=5e-5, epochs=1, anchor=1.0),
        StageSettings(name="sp-medium", data="sp-medium", beta=0.1, learning_rate=5e-5, epochs=1, anchor=1.0),
        StageSettings(name="sp-hard", data="sp-hard", beta=0.1, learning_rate=5e-5, epochs=1, anchor=1.0),
        *FEEDBACK_STAGES,
    )
    """In the order they run, any number of them, data named twice if wanted. Self-play's rate is small: on
    Beauty (3.3 million parameters) 24 steps at 1e-3 cost 5% of NDCG@10, three tenths of that way nothing; and
    beta .1 with an anchor gained most on new targets (docs/preference.md). 7B wants 1e-5 at most."""
    selfplay: SelfPlaySettings = SelfPlaySettings()
    """How candidates are drawn and graded."""
    draw: Literal["stage", "once"] = "stage"
    """Whether each self-play stage draws candidates from the policy as it is then, or all from the first."""
    leave_out: Annotated[int, Field(ge=0)] = 2
    """Last items of each user that neither the chain's SFT nor self-play sees (paper: 2, test and
    validation). The one in front of the last is what the guards look for; 0 or 1: no guard looks at it."""
    fresh: Annotated[int, Field(ge=0)] = 1
    """Items of each user, in front of those left out, that the chain's own SFT does not see either:
    self-play's latest targets are then new to the policy. On Beauty it knows its own targets by heart
    (NDCG@10 .33 on them, .07 on others), and to learn them again does harm (docs/preference.md)."""

    @model_validator(mode="after")
    def _stages_are_named(self) -> Self:
        require_different_names(self.stages, {"start", "dataset", "register"})
        return self
