"""Errors of policies: their directories, codecs, registry, ledger and gate."""

from features.errors import BadInput, ProductError


class PoliciesError(ProductError):
    """A policy, its codec, or its promotion cannot be what was asked for."""


class PolicyRefused(PoliciesError, BadInput):  # noqa: N818 - reads as what it is at the raise site
    """A policy directory that is half written, corrupt, or does not match its codec or base."""


class CodecError(PoliciesError, BadInput):
    """A codec or quantizer that is broken, or an item it does not know."""


class ScoringError(PoliciesError):
    """A model that cannot score packed answers, or answers that cannot be packed."""


class BadRequest(PoliciesError, BadInput):  # noqa: N818 - reads as what it is at the raise site
    """What a policy is asked for makes no sense: k of zero, a device that is not there."""
