"""Settings of tokenization: how items and users become SCIDs."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from .numbers import Count, Positive, Share


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
