"""Errors of training: tokenization, SFT, preference stages, rounds, schedule."""

from features.errors import ProductError


class TrainerError(ProductError):
    """A training step cannot run or did not finish."""
