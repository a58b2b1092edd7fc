"""Settings of SFT: backbone, tasks, teacher, LoRA."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .numbers import Count, Positive, Share, Weight


class LoraSettings(BaseModel):
    """Which weights SFT trains: low-rank matrices beside frozen ones, or all of them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: Annotated[int, Field(ge=0)] | None = None
    """Rank of the LoRA matrices; 0: none, all weights are trained; none: 0 for presets and for models below
    100 million parameters, 8 for larger ones (the published code's, on a 7B model)."""
    alpha: Positive = 16.0
    """LoRA's scale is alpha / rank (the published code: 16 / 8)."""
    dropout: Share = 0.05
    """Dropout in front of the LoRA matrices (the published code's). With any, what ``micro_samples`` splits
    draws other random numbers."""
    targets: str | tuple[str, ...] = "all-linear"
    """Modules that get LoRA matrices, as peft names them; "all-linear" is every projection but the head."""


class SasRecSettings(BaseModel):
    """SASRec with cross-entropy: a baseline, and the collaborative half of the teacher."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dimension: Count = 128
    """Width of item embeddings and states."""
    layers: Count = 2
    """Attention blocks."""
    heads: Count = 2
    """Attention heads a block."""
    length: Count = 50
    """Items of a history it reads, the last ones."""
    dropout: Share = 0.5
    """Share of activations dropped, everywhere."""
    epochs: Count = 60
    """Passes over the histories at most."""
    patience: Count = 5
    """Passes without a better NDCG@10 of the held-out items after which it ends, at its best weights."""
    batch_targets: Count = 1024
    """Positions an optimizer step learns from."""
    learning_rate: Positive = 2e-3
    """AdamW's rate; a cosine to 0 over the epochs."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """AdamW's weight decay."""
    gradient_norm: Positive = 5.0
    """Gradients are clipped to this norm."""
    held_out: Share = 0.1
    """Share of users whose last training item only decides when to stop; 0: none, the last weights count."""
    members: Count = 1
    """Networks trained under different seeds, whose probabilities are averaged."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Initial weights, batches, who is held out."""


class TeacherShares(BaseModel):
    """What the teacher's distribution is made of: shares of the whole, whatever they sum to.

    A part that knows nothing of a history leaves its share to the others. The defaults are the best seen on
    Beauty (docs/benchmarks.md).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    rules: Weight = 0.1
    """Sequential rules: what followed what, in seconds."""
    sasrec: Weight = 0.5
    """SASRec, trained on the same histories, in minutes."""
    users: Weight = 0.1
    """Items that the same users met, whatever the order, in seconds."""
    texts: Weight = 0.3
    """Items whose catalogue texts resemble each other, in seconds."""

    @model_validator(mode="after")
    def _made_of_something(self) -> Self:
        if not any((self.rules, self.sasrec, self.users, self.texts)):
            raise ValueError("the teacher is made of nothing: give one of its parts a share above 0")
        return self


class TaskSettings(BaseModel):
    """Tasks with text that SFT learns beside next-item prediction (docs/base-policy.md).

    A step's loss is the next-item loss (weight 1) and, of every task, its weight times the mean cross-entropy
    of the target tokens of its samples of that step. 0 leaves a task out; all are 0: next-item alone.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    titles_to_item: Weight = 0.0
    """History as titles -> SCID of the next item."""
    items_to_title: Weight = 0.0
    """History as SCIDs -> title of the next item."""
    mixed_history: Weight = 0.0
    """History, each item as title or as SCID -> SCID of the next item."""
    intention_to_item: Weight = 0.0
    """A wish or query, with or without the history -> SCID of the item it is made of."""
    text_to_item: Weight = 0.0
    """Title or description -> SCID."""
    item_to_text: Weight = 0.0
    """SCID -> title or description."""
    preference: Weight = 0.0
    """History as SCIDs -> what the user prefers, in words."""
    profile_to_user: Weight = 0.0
    """Profile text -> the user's SCID."""
    user_to_profile: Weight = 0.0
    """The user's SCID -> profile text."""
    share: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Samples a step of a task of weight 1, as a share of ``samples_per_step``; of another in proportion to
    its weight, at least one. 1: every sample counts alike, whatever its task. They are long, so less is
    faster; but at 1/32 one sample counts for 32, and its noise drowns next-item prediction (measured:
    docs/base-policy.md)."""
    row_tokens: Annotated[int, Field(ge=64)] = 512
    """Tokens of the longest sample, and of the longest row that samples are packed into. Of a longer history
    the oldest items are left out. A backbone that reads less sets the limit itself."""
    title_tokens: Annotated[int, Field(ge=4)] = 24
    """Tokens of a title, or of one item's line of a profile; the rest is cut."""
    text_tokens: Annotated[int, Field(ge=8)] = 96
    """Tokens of any other text: a description, a wish, a profile that is a target; the rest is cut."""

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each task, by name, in the order above; 0 for those left out."""
        lengths = {"share", "row_tokens", "title_tokens", "text_tokens"}
        return {name: float(getattr(self, name)) for name in type(self).model_fields if name not in lengths}


class SftSettings(BaseModel):
    """How the base policy is trained: next-item prediction on SCIDs, and tasks beside it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    backbone: str = "tiny"
    """Preset trained from scratch (``demo`` ~1, ``mini`` ~1.4, ``tiny`` ~5, ``small`` ~20 million), or a
    local Hugging Face causal language model directory."""
    text_vocabulary: Annotated[int, Field(ge=257)] | None = None
    """Byte-level BPE tokens of a preset's own tokenizer, fitted to the catalogue; none: the preset's."""
    lora: LoraSettings = LoraSettings()
    """Full fine-tuning or LoRA; either way the codec's tokens are trained, in embedding and head."""
    new_tokens: Literal["likeness", "mean", "codebook"] = "likeness"
    """What the rows of the codec's tokens start from: ``mean``, the mean of the rows there are (a preset: its
    random start); ``codebook``, the codebook vectors; ``likeness``, on top of ``mean``, items' catalogue
    texts and the company they keep in histories: items that are alike start alike, and so do their codes."""
    quantization: Literal["none", "8bit", "4bit"] = "none"
    """How frozen weights are held while LoRA trains; 8bit and 4bit need a CUDA GPU and the extra
    ``quantized``. The policy that comes out is in full precision."""
    gradient_checkpointing: bool = False
    """Compute activations a second time instead of keeping them: a third slower, less memory, same result."""
    steps: Count | None = None
    """Optimizer steps, in place of ``epochs``: as many passes as they take, the last one cut off."""
    epochs: Count = 10
    """Passes over all samples (plain next-code training overfits after about eight on 20,000 users)."""
    samples_per_step: Count = 512
    """Samples (targets) an optimizer step learns from."""
    micro_samples: Count | None = None
    """Samples that go through the model at once; none: all of a step. Less needs less memory and changes no
    result."""
    learning_rate: Positive | None = None
    """AdamW's peak rate; none: the preset's (from scratch), 2e-4 for a local model."""
    warm_up: Share = 0.05
    """Share of the steps over which the rate rises; then a cosine to 0."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.05
    """AdamW's weight decay."""
    gradient_norm: Positive = 1.0
    """Gradients are clipped to this norm."""
    drop_items: Share = 0.1
    """Share of history items left out at random, anew every epoch."""
    item_tokens: Annotated[int, Field(ge=0)] = 20_000
    """Items, the most frequent in the histories first, that get a token of their own in histories; the others
    are shown by their codes."""
    spell_items: Share = 0.1
    """Share of history items shown by their codes though they have a token, anew every epoch."""
    teacher_weight: Annotated[float, Field(ge=0.0, le=1.0)] = 0.8
    """Share of the target that is the collaborative teacher's distribution; the rest is the item that came
    next. 0: no teacher."""
    teacher_items: Count = 128
    """Items the teacher's distribution keeps."""
    teacher: TeacherShares = TeacherShares()
    """What the teacher is made of."""
    sasrec: SasRecSettings = SasRecSettings()
    """How the teacher's SASRec is trained."""
    tasks: TaskSettings = TaskSettings()
    """Tasks with text, beside next-item prediction."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Autocast type; auto: bfloat16 where the device computes in it natively, else float32."""
    checkpoint_every: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps between checkpoints; 0: at the end of each epoch."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Initial weights, batches, dropped items: one number for all."""
