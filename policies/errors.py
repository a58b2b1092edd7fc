"""Errors of policies: their directories, codecs, registry, ledger and gate."""

from features.errors import ProductError


class PoliciesError(ProductError):
    """A policy, its codec, or its promotion cannot be what was asked for."""
