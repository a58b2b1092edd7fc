"""Settings of the guards behind each preference stage."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from .numbers import Count, Positive, Share


class GuardSettings(BaseModel):
    """Bounds that a stage may not break, on held-out data, or its policy is not built upon."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    in_rounds: bool = False
    """Whether the stages of a round are guarded too, by the likes of its stop users (``round.stop_share``);
    those of a curriculum always are."""
    users: Count = 2000
    """Users the guards look at, drawn by a fixed seed; all where there are fewer."""
    min_users: Count = 50
    """Users below which a guard judges nothing: every figure would be chance."""
    ndcg_loss: Share = 0.02
    """Loss of NDCG@10 tolerated, as a share."""
    recall_loss: Share = 0.02
    """Loss of Recall@50 tolerated, as a share."""
    coverage_loss: Share = 0.05
    """Loss tolerated in the number of items that lists show, as a share."""
    popularity_rise: Share = 0.02
    """Rise tolerated in the mean popularity percentile of what is recommended (absolute)."""
    chosen_drift: Positive = 0.5
    """Nats that the held-out items may lose of their log-probability, on average: the sign of likelihood
    displacement."""
    validity: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of lists that must be complete, unique, eligible and unseen."""
