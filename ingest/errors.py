"""Errors of the way in: brokers, topics, events, importers."""

from features.errors import BadInput, ProductError


class IngestError(ProductError):
    """Something between an event producer and the feedback log went wrong."""


class BrokerUnreachable(IngestError):  # noqa: N818 - reads as what it is
    """Nothing that speaks Kafka answers at the address in the settings."""


class UnusableKafkaSettings(IngestError, BadInput):  # noqa: N818 - reads as what it is
    """The Kafka client or the broker refuses what the settings say."""


class TopicMissing(IngestError, BadInput):  # noqa: N818 - reads as what it is
    """The topic does not exist on the broker that answers."""


class BrokerFailed(IngestError):  # noqa: N818 - reads as what it is
    """A broker that we were to start did not come up."""


class PortTaken(BrokerFailed, BadInput):
    """Something else listens on the port that the broker was to use."""


class OffsetsLost(IngestError):  # noqa: N818 - reads as what it is
    """The next event to land is no longer, or not yet, in the topic."""


class DeadLettersRefused(IngestError):  # noqa: N818 - reads as what it is
    """A dead letter was not acknowledged, so its record's offset must not move."""
