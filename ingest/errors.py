"""Errors of the way in: brokers, topics, events, importers."""

from features.errors import ProductError


class IngestError(ProductError):
    """Something between an event producer and the feedback log went wrong."""
