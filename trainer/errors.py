"""Errors of training: tokenization, SFT, preference stages, rounds, schedule."""

from features.errors import BadInput, ProductError


class TrainerError(ProductError):
    """A training step cannot run or did not finish."""


class MissingText(TrainerError, BadInput):  # noqa: N818 - reads as what it is at the raise site
    """A catalogue item that has no text, where settings require one."""


class CannotTrain(TrainerError, BadInput):  # noqa: N818
    """There is nothing to train on: an empty catalogue, no history long enough, an unusable backbone."""


class BrokenSamples(TrainerError, BadInput):  # noqa: N818
    """A table of preference samples that cannot be: a choice rejected, a weight that is none."""


class UnusableFile(TrainerError, BadInput):  # noqa: N818
    """A file that cannot be read as what it should be, or not be written where it was asked for."""
