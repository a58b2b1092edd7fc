"""Settings of preference training: the stages and what they share."""

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .guards import GuardSettings
from .numbers import Count, Positive, Share


class StageSettings(BaseModel):
    """One preference stage: which samples it learns from, and how hard it pulls."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*$")]
    """Names the stage in metrics, messages and directories."""
    data: Literal["easy", "hard", "sp-easy", "sp-medium", "sp-hard"]
    """Rejected responses: ``easy`` = disliked items, ``hard`` = neutral ones; ``sp-``: the policy's own
    candidates, by what they share with the chosen item (``align3gr curriculum`` alone runs those)."""
    loss: Literal["softmax", "dpo", "ipo"] = "softmax"
    """What a sample's loss is (trainer/preference/loss.py): ``softmax``, all rejected at once (the paper's);
    ``dpo`` and ``ipo``, the mean over its pairs."""
    beta: Positive = 1.0
    """Inverse temperature of ``softmax`` and ``dpo`` (the published code: 1; TRL: 0.1), tau of ``ipo``."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    """Share of preferences taken to be wrong; not for ``ipo``."""
    smoothing: Literal["conservative", "robust"] = "conservative"
    """What label smoothing does: ``conservative`` mixes in the flipped loss (cDPO), ``robust`` takes its
    expectation out, so that the loss is unbiased under such noise (rDPO; TRL's loss type ``robust``)."""
    learning_rate: Positive | None = None
    """AdamW's peak rate; none: 1e-5 (the published code, 7B parameters) from 100 million parameters on, 2e-4
    for smaller models (docs/preference.md: what more does)."""
    epochs: Count = 3
    """Passes over the samples (the published code: 3)."""
    anchor: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of the chosen response's negative log-likelihood per token, against likelihood displacement."""
    patience: Annotated[int, Field(ge=0)] | None = None
    """Epochs without a lower loss on the stop users after which the stage ends, at its best weights; 0: off;
    none: what all stages share."""
    min_samples: Count = 32
    """Samples below which the stage is skipped, with a message."""

    @model_validator(mode="after")
    def _smoothing_has_a_loss(self) -> Self:
        if self.loss == "ipo" and self.label_smoothing:
            raise ValueError("label_smoothing is not defined for the loss ipo; set it to 0, or take dpo")
        return self

    @property
    def feedback(self) -> Literal["easy", "hard"] | None:
        """The table of a preference dataset it learns from; none: it plays against itself."""
        return self.data if self.data == "easy" or self.data == "hard" else None

    @property
    def selfplay(self) -> Literal["sp-easy", "sp-medium", "sp-hard"] | None:
        """The table of self-play it learns from; none: it learns from feedback."""
        return None if self.data == "easy" or self.data == "hard" else self.data


FEEDBACK_STAGES = (
    StageSettings(name="easy", data="easy", beta=0.1, epochs=1, anchor=1.0),
    StageSettings(name="hard", data="hard", beta=0.1, epochs=1, anchor=1.0),
)
"""RF-DPO unless settings say otherwise: one short pass, held by the likelihood of what was liked. It did no
harm where a neutral item is no rejection (ratings) and gains where it is one (slates of the policy's own);
the published code's beta 1, three epochs and no anchor cost a third of NDCG@10 there (docs/preference.md)."""


class PreferenceSettings(BaseModel):
    """Progressive preference training: the stages in order, and what they share."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    stages: tuple[StageSettings, ...] = FEEDBACK_STAGES
    """In the order they run; the policy that one ends with is the reference of the next."""
    max_rejected: Annotated[int, Field(ge=1, le=20)] = 20
    """Rejected responses of a sample that are used, the nearest first (paper: up to 20)."""
    batch_size: Count = 64
    """Samples an optimizer step learns from, over all devices (the published code: 256)."""
    micro_batch: Count = 64
    """Samples that go through the model at once; less of it needs less memory and changes no result. Where
    memory runs out it is halved, with a message."""
    warmup: Share = 0.05
    """Share of the steps over which the learning rate rises (the published code: 5%); then a cosine to 0."""
    gradient_norm: Positive = 0.3
    """Gradients are clipped to this norm (the published code: 0.3)."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """AdamW's weight decay of the LoRA matrices."""
    lora_rank: Count = 16
    """Rank of the LoRA matrices (the published code: 8, on a 7B model)."""
    lora_alpha: Positive = 32.0
    """LoRA's scale is alpha / rank (the published code: 16 / 8)."""
    lora_dropout: Share = 0.0
    """Dropout in front of the LoRA matrices; 0 keeps the first step's policy equal to its reference."""
    lora_targets: str | tuple[str, ...] = "all-linear"
    """Modules that get LoRA matrices, as peft names them."""
    gradient_checkpointing: bool = False
    """Compute activations a second time instead of keeping them: a third slower, less memory, same result."""
    checkpoint_every: Annotated[int, Field(ge=0)] = 0
    """Steps after which an interrupted stage's state is kept, to go on from; 0: every epoch."""
    patience: Annotated[int, Field(ge=0)] = 0
    """Epochs without a lower loss on the stop users after which a stage ends, at its best weights; 0: off."""
    guards: GuardSettings = GuardSettings()
    """What no stage may break, or the next one does not start from it."""

    @model_validator(mode="after")
    def _stage_names_differ(self) -> Self:
        require_different_names(self.stages, {"dataset", "evaluate", "gate", "register", "ledger"})
        return self


def require_different_names(stages: Sequence[StageSettings], steps: set[str]) -> None:
    """Raises ValueError for no stage, two of one name, or one that is called like a step beside them."""
    names = [stage.name for stage in stages]
    if not names:
        raise ValueError("stages must name at least one stage")
    if len(set(names)) != len(names):
        raise ValueError("stages must have different names")
    taken = steps & set(names)
    if taken:
        raise ValueError(f"no stage can be called {taken.pop()}: a step beside the stages is")
