"""Settings of training."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[float, Field(gt=0.0)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Count = Annotated[int, Field(ge=1)]


class CollaborativeSettings(BaseModel):
    """The collaborative encoder: what is known of an item and a user from behaviour alone."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Literal["din", "ppmi", "none"] = "din"
    """``din``: target attention over a user's behaviours, as in the paper; ``ppmi``: co-occurrence
    factorised, in seconds and without training; ``none``: text alone."""
    dimension: Count | None = None
    """Width of its vectors; none: 32 for din (the published code), 64 for ppmi."""
    weight: Positive = 1.0
    """Weight of behaviour against text (1) in what is quantized."""
    attention: Count = 32
    """din: hidden units of its activation unit."""
    negatives: Count = 60
    """din: items each step compares with the one met next (the published code: 60)."""
    epochs: Count = 16
    """din: passes over the users, one pair of each drawn anew."""
    batch_size: Count = 256
    """din: pairs a step."""
    learning_rate: Positive = 1e-2
    """din: AdamW's peak rate; a cosine to a twentieth."""
    window: Count = 10
    """ppmi: distance in a history up to which two items count as met together."""
    shift: Positive = 1.0
    """ppmi: k of the shifted PMI: pairs must meet k times as often as by chance."""


class AlignmentSettings(BaseModel):
    """The SC encoders and the U2I loss: users beside the items they take."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Literal["u2i", "none"] = "u2i"
    """``u2i`` as in the paper; ``none`` quantizes the frozen encoders' vectors as they are."""
    hidden: tuple[Count, ...] = (128,)
    """Widths of the SC encoders' hidden layers (twice as wide, the AUC fell .008 from its best on Beauty)."""
    dimension: Count = 64
    """Width of u and v."""
    epochs: Count = 60
    """First phase: passes over the users at most, one pair of each drawn anew."""
    patience: Count = 5
    """First phase: passes without a better AUC on held-out pairs after which it ends."""
    batch_size: Annotated[int, Field(ge=2)] = 1024
    """Pairs a step; each item is a negative of the others."""
    learning_rate: Positive = 1e-3
    """AdamW's rate; in the second phase a cosine to a twentieth."""
    log_q: bool = True
    """Correct for popular items being negatives more often. The paper does not; on Beauty it took recall@10
    of held-out pairs from .053 to .082 and their AUC from .788 to .815 (co-occurrence vectors)."""
    alpha: Annotated[float, Field(ge=0.0)] = 0.1
    """Second phase: weight of U2I (the first phase's is 1)."""
    gamma: Positive = 1.0
    """Second phase: weight of the RQ-VAEs (the first phase's is 0)."""
    drop_behaviour: Share = 0.2
    """Share of the items of a batch that are shown with what their text predicts in place of behaviour."""
    min_pairs: Count = 256
    """Pairs to train on below which nothing is aligned and users get no SCIDs: too little to learn from."""


class TokenizationSettings(BaseModel):
    """How items and users become SCIDs: frozen encoders, alignment, RQ-VAEs, unique assignment."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    users: bool = True
    """Whether users get SCIDs, which then stand in every prompt."""
    levels: Annotated[int, Field(ge=1, le=8)] = 3
    """Codes of an SCID (paper: 3). One more is added when a prefix holds more items than codes."""
    codes: Annotated[int, Field(ge=2, le=65536)] | None = None
    """Codes a level; none: 2 sqrt(items) rounded up to a power of two, from 4 to 256 (the paper's number,
    from 4,097 items on); likewise for users."""
    code_dimension: Count = 32
    """Width of the vectors that are quantized (paper: 32)."""
    hidden: tuple[Count, ...] = (256, 128)
    """Widths of the RQ-VAE encoder's hidden layers; the decoder mirrors them."""
    method: Literal["rqvae", "rqkmeans"] = "rqvae"
    """``rqvae`` as in the paper; ``rqkmeans`` quantizes the vectors themselves, in seconds."""
    collaborative: CollaborativeSettings = CollaborativeSettings()
    alignment: AlignmentSettings = AlignmentSettings()
    text_encoder: Path | None = None
    """Local sentence-transformers directory; none: TF-IDF + SVD fitted to the catalogue."""
    text_dimension: Count = 64
    """Width of the TF-IDF + SVD embedding."""
    vocabulary: Count = 20_000
    """Terms TF-IDF knows at most."""
    ngrams: Annotated[int, Field(ge=1, le=2)] = 2
    """Longest term in words."""
    without_text: Literal["refuse", "allow"] = "refuse"
    """What to do with an item that has no text: refuse the catalogue, or place it by behaviour alone."""
    steps: Count = 400
    """Optimizer steps of the RQ-VAEs."""
    batch_size: Count = 1024
    """Items a step."""
    learning_rate: Positive = 1e-3
    """AdamW's peak rate; a cosine to a twentieth."""
    commitment: Annotated[float, Field(ge=0.0)] = 0.25
    """mu, the weight of the commitment term."""
    codebooks: Literal["gradient", "moving"] = "gradient"
    """How codebooks learn: by the codebook term's gradient, or as moving means of what they stand for."""
    decay: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.99
    """What moving means keep a step."""
    warm_up: Share = 0.1
    """Share of the steps that train the auto-encoder alone, before k-means starts the codebooks."""
    revive_every: Count = 50
    """Steps after which a code that nobody used starts again."""
    polish: Annotated[int, Field(ge=0)] = 10
    """Lloyd iterations at the end of training."""


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
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Initial weights, batches, who is held out."""


Weight = Annotated[float, Field(ge=0.0)]


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
    share: Annotated[float, Field(gt=0.0, le=1.0)] = 1 / 32
    """Samples a step of a task of weight 1, as a share of ``samples_per_step``; of another in proportion to
    its weight, at least one. They are long: all nine at weight 1 read two tokens for each one of
    next-item prediction."""
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
    """Preset trained from scratch (``demo`` ~1, ``tiny`` ~5, ``small`` ~20 million parameters), or a local
    Hugging Face causal language model directory."""
    text_vocabulary: Annotated[int, Field(ge=257)] | None = None
    """Byte-level BPE tokens of a preset's own tokenizer, fitted to the catalogue; none: the preset's."""
    lora: LoraSettings = LoraSettings()
    """Full fine-tuning or LoRA; either way the codec's tokens are trained, in embedding and head."""
    new_tokens: Literal["mean", "codebook"] = "mean"
    """What the rows of the codec's tokens start from: ``mean``, the mean of the rows there are (a preset: its
    random start); ``codebook``, the codebook vectors, so that codes that mean alike start alike."""
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
    item_tokens: Annotated[int, Field(ge=0)] = 0
    """Items, the most frequent in the histories first, that get a token of their own in histories; the others
    are shown by their codes."""
    spell_items: Share = 0.1
    """Share of history items shown by their codes though they have a token, anew every epoch."""
    teacher_weight: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Share of the target that is the collaborative teacher's distribution; the rest is the item that came
    next. 0: no teacher."""
    teacher_items: Count = 64
    """Items the teacher's distribution keeps."""
    teacher_sasrec: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Share of SASRec in the teacher; the rest is sequential rules, which take seconds."""
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


class StageSettings(BaseModel):
    """One preference stage: which samples it learns from, and how hard it pulls."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*$")]
    """Names the stage in metrics, messages and directories."""
    data: Literal["easy", "hard"]
    """Rejected responses: ``easy`` = disliked items, ``hard`` = neutral ones."""
    beta: Positive = 1.0
    """Softmax-DPO's inverse temperature (the published code: 1)."""
    learning_rate: Positive | None = None
    """AdamW's peak rate; none: 1e-5 (the published code, 7B parameters) from 100 million parameters on, 1e-3
    for smaller models."""
    epochs: Count = 3
    """Passes over the samples (the published code: 3)."""
    anchor: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of the chosen response's negative log-likelihood per token, against likelihood displacement."""
    min_samples: Count = 32
    """Samples below which the stage is skipped, with a message."""


class PreferenceSettings(BaseModel):
    """Progressive Softmax-DPO: the stages in order, and what they share."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    stages: tuple[StageSettings, ...] = (
        StageSettings(name="easy", data="easy"),
        StageSettings(name="hard", data="hard"),
    )
    """In the order they run; the policy that one ends with is the reference of the next."""
    max_rejected: Annotated[int, Field(ge=1, le=20)] = 20
    """Rejected responses of a sample that are used, the nearest first (paper: up to 20)."""
    batch_size: Count = 64
    """Samples an optimizer step learns from, over all devices (the published code: 256)."""
    micro_batch: Count = 64
    """Samples that go through the model at once; less of it needs less memory and changes no result."""
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
    patience: Annotated[int, Field(ge=0)] = 0
    """Epochs without a lower loss on the stop users after which a stage ends, at its best weights; 0: off."""

    @model_validator(mode="after")
    def _stage_names_differ(self) -> Self:
        names = [stage.name for stage in self.stages]
        if not names:
            raise ValueError("stages must name at least one stage")
        if len(set(names)) != len(names):
            raise ValueError("stages must have different names")
        taken = {"dataset", "evaluate", "gate", "register", "ledger"} & set(names)
        if taken:
            raise ValueError(f"no stage can be called {taken.pop()}: a step of the round is")
        return self


class RoundSettings(BaseModel):
    """What a round runs with, besides its stages."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Base of every random number of the rounds; a round adds its own number."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    """Where stages run: auto (a GPU when there is one), cpu, cuda, cuda:N."""
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads of torch; 0: as many as torch finds at the round's start. Kept for the round's resumes."""
    stop_share: Share = 0.05
    """Share of users, by hash, that only decide when a stage stops; used where ``patience`` is set."""


class TrainerSettings(BaseModel):
    """Tokenization, SFT, preference stages and rounds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokenization: TokenizationSettings = TokenizationSettings()
    sft: SftSettings = SftSettings()
    preference: PreferenceSettings = PreferenceSettings()
    round: RoundSettings = RoundSettings()


class ScheduleSettings(BaseModel):
    """When a round runs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cron: str | None = None
    """Five-field cron expression in UTC; instead of ``interval``."""
    interval: Positive | None = None
    """Seconds between refreshes; none and no ``cron``: every six hours."""
    min_feedback: Annotated[int, Field(ge=0)] = 1000
    """Log rows with a level that must have landed since the last round's log version."""
    max_lag: Annotated[int, Field(ge=0)] | None = 10_000
    """Events waiting in Kafka above which a refresh waits; none: lag is not looked at."""
    retry: Positive = 60.0
    """Seconds after which a refresh that waited for lag, or a round that crashed, is looked at again."""
    attempts: Count = 3
    """Times that an unfinished round is started in all before it is given up."""
    keep_rounds: Count = 10
    """Ended rounds that keep their working files: reference scores, item lists, what a failed stage left. Of
    older ones the record stays: state, figures, decision, curves."""

    @model_validator(mode="after")
    def _one_trigger(self) -> Self:
        if self.cron is not None and self.interval is not None:
            raise ValueError("set cron or interval, not both")
        if self.cron is not None:
            from apscheduler.triggers.cron import CronTrigger

            CronTrigger.from_crontab(self.cron)
        return self
