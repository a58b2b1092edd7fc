"""Settings of policies: the gate, promotion, the registry, decoding."""

from itertools import pairwise
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class GateSettings(BaseModel):
    """What a candidate must show before it may become the reference. See policies/gate and docs/gate.md."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Share of users, by hash, whose feedback no round learns from: they judge the candidates."""
    min_users: Annotated[int, Field(ge=2)] = 100
    """Users with a case a metric needs before it is judged; with fewer for every metric the gate holds."""
    required: tuple[str, ...] = ()
    """Metrics that must be judged: too few users on one of them holds, whatever the others say."""
    confidence: Annotated[float, Field(gt=0.5, lt=1.0)] = 0.95
    """One-sided confidence of every lower bound."""
    resamples: Annotated[int, Field(ge=100)] = 2000
    """Bootstrap resamples of users."""
    slate_margin: Share = 0.02
    """Loss tolerated in ranking within the slate, as a share of the compared policy's mean."""
    full_margin: Share = 0.10
    """Loss tolerated in NDCG over the whole catalogue, as a share of the compared policy's mean."""
    coverage_share: Share = 0.7
    """A candidate must recommend at least this share of the number of items the reference recommends."""
    concentration_rise: Share = 0.10
    """Rise tolerated in the share of recommendations that go to the most popular items (absolute)."""
    slice_min_users: Annotated[int, Field(ge=2)] = 30
    """Users with a case that a slice needs before it is judged."""
    slice_margin: Share = 0.01
    """Loss in a slice, as a share of the reference's mean there, that must be established for a refusal."""
    new_history: Annotated[int, Field(ge=0)] = 5
    """A user with at most so many items in the prompt's history is a new one."""
    heavy_history: Annotated[int, Field(ge=1)] = 20
    """A user with at least so many is a heavy one."""
    young_days: Annotated[float, Field(gt=0)] = 30.0
    """An item is young until so many days after it first came into the catalogue."""
    latency_factor: Annotated[float, Field(ge=1.0)] | None = 2.5
    """A candidate may take at most so many times as long as the reference; none: not looked at. A first
    adapter on a full policy takes a third longer, on a tiny one up to 1.6 times as long."""
    off_policy_min_effective: Annotated[float, Field(ge=1.0)] | None = 200.0
    """Effective number of sampled slates from which they have a say; none: never."""
    off_policy_margin: Share = 0.05
    """Loss in liked places a slate, as a share of the reference's, that they must establish for a refusal."""
    off_policy_slates: Annotated[int, Field(ge=1)] = 2000
    """Sampled slates looked at, at most, the latest: bounds the time of an evaluation."""
    checks: tuple[str, ...] = ()
    """Own checks beside the built-in ones, by their names in the entry point group align3gr.gate_checks."""


class CanarySettings(BaseModel):
    """How a policy takes a share of users first. See policies/canary.py and docs/canary.md."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: tuple[Annotated[float, Field(gt=0.0, le=1.0)], ...] = (0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
    """Shares of users, by hash, one after another; the last is 1: the policy becomes the reference."""
    confidence: Annotated[float, Field(gt=0.5, lt=1.0)] = 0.95
    """Of the interval that compares canary and reference, over all looks together."""
    margin: Share = 0.05
    """Loss tolerated over all users together, in liked items as a share of the reference's. A canary grows
    when the loss that is not excluded, times the share it would fall on, is smaller: to 20% of users when
    25% or more is excluded, to all of them when 5% or more is."""
    judged: Annotated[int, Field(ge=1)] = 10
    """Items with a level in force that a user is judged by: the first so many; users with fewer wait."""
    min_users: Annotated[int, Field(ge=2)] = 100
    """Users of the canary with so many levels before it may grow or be withdrawn for harm."""
    step_s: Annotated[float, Field(ge=0.0)] = 3600.0
    """Least time at a share (s)."""
    patience_s: Annotated[float, Field(gt=0.0)] | None = 14 * 86400.0
    """Time at a share (s) after which a canary of which nothing is established is withdrawn; none: never."""
    look_s: Annotated[float, Field(gt=0.0)] = 60.0
    """Pause between two looks of the scheduler (s)."""
    failures: Annotated[int, Field(ge=1)] = 3
    """Failed answers among the canary's last ``window`` for which a server withdraws it at once."""
    window: Annotated[int, Field(ge=1)] = 200
    """Answers of the canary among which failures are counted."""
    deadline_s: Annotated[float, Field(gt=0.0)] = 1.0
    """Time (s) after which the reference answers in the canary's place, and the answer counts as late."""
    late: Annotated[int, Field(ge=1)] = 4
    """Late answers among the canary's last ``latency_answers`` for which a server withdraws it at once."""
    latency_factor: Annotated[float, Field(ge=1.0)] | None = 2.5
    """An answer of the canary is slow when it took more than so many times what the reference took at the
    same time; none: not looked at."""
    latency_floor_s: Annotated[float, Field(ge=0.0)] = 0.1
    """An answer that is faster than this is not slow, whatever the reference took (s)."""
    latency_answers: Annotated[int, Field(ge=1)] = 10
    """The canary's answers that are looked at: the last so many."""
    latency_slow: Annotated[int, Field(ge=1)] = 8
    """Slow ones among them for which a server withdraws the canary at once."""

    @field_validator("steps")
    @classmethod
    def _growing(cls, steps: tuple[float, ...]) -> tuple[float, ...]:
        if len(steps) < 2 or steps[-1] != 1.0 or any(one >= other for one, other in pairwise(steps)):
            raise ValueError("shares must grow and end with 1, such as [0.05, 0.2, 1]")
        return steps

    @model_validator(mode="after")
    def _within_reach(self) -> "CanarySettings":
        for few, many in (
            ("latency_slow", "latency_answers"),
            ("failures", "window"),
            ("late", "latency_answers"),
        ):
            if getattr(self, few) > getattr(self, many):
                raise ValueError(f"{few} cannot be more than {many}: the canary would never be withdrawn")
        return self

    def step_after(self, share: float) -> float:
        """The first step above ``share``; 1 is promotion."""
        return next(step for step in self.steps if step > share)


class PromotionSettings(BaseModel):
    """Who may move the reference."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    automatic: bool = True
    """Whether a round promotes what its gate passes; when off, a person does it (``policy promote``)."""
    canary: CanarySettings | None = None
    """Whether what is promoted takes a share of users first, and how; none: it takes all at once."""


class RegistrySettings(BaseModel):
    """Where MLflow is. The directories under ``home/policies`` are the truth; MLflow mirrors them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mlflow: bool = True
    """Whether rounds and policies are mirrored to MLflow at all."""
    uri: str | None = None
    """Tracking and registry URI; none: SQLite and a folder under ``home/mlflow``."""
    model: Annotated[str, Field(min_length=1)] = "align3gr"
    """Name of the registered model whose versions are our policies."""
    experiment: Annotated[str, Field(min_length=1)] = "align3gr-rounds"
    """MLflow experiment that holds the rounds as runs."""
    timeout: Annotated[int, Field(ge=1)] = 10
    """Seconds that one request to a remote MLflow may take."""


class DecodingSettings(BaseModel):
    """How lists are searched. See policies/decoding.py."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    beam: Annotated[int, Field(ge=1)] = 20
    """Prefixes kept at each level of the trie (the paper's 20); at least as many as items asked for."""
    batch: Annotated[int, Field(ge=1)] = 32
    """Users searched in one forward pass; bounds memory, does not change lists."""


class PolicySettings(BaseModel):
    """Decoding, gate, promotion and registry."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    decoding: DecodingSettings = DecodingSettings()
    gate: GateSettings = GateSettings()
    promotion: PromotionSettings = PromotionSettings()
    registry: RegistrySettings = RegistrySettings()
