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

    @classmethod
    def beyond(cls, partition: int, position: int, end: int) -> "OffsetsLost":
        """The log has landed more than the topic holds: the broker lost what it had acknowledged."""
        return cls(
            f"partition {partition}: the log has landed events up to {position - 1}, the topic ends before "
            f"{end}: the broker lost events; restore the topic, or set kafka.topic to another one"
        )


class DeadLettersRefused(IngestError):  # noqa: N818 - reads as what it is
    """A dead letter was not acknowledged, so its record's offset must not move."""


class RaterUnusable(IngestError, BadInput):  # noqa: N818 - reads as what it is
    """The rater that the settings name cannot be had: a package or a model directory is missing or wrong."""
