"""Ingest: the way in. Producers, workers that land events exactly once, dead letters, brokers, importers.

Feedback comes in through here and rests in ``features``. Nothing here imports torch, feast or mlflow, and the
names below are loaded at first use: settings are read without the Kafka client.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .broker import Broker, embedded_broker, kafka_broker
    from .dead_letters import list_dead_letters, replay_dead_letters
    from .lag import Lag
    from .producer import DeliveryReport, FeedbackProducer
    from .topics import create_topics
    from .worker import IngestWorker

# Where nobody has configured logging, Python prints warnings to standard error: there a person expects one
# line of ours, not the client's. With logging configured its records go where all others go.
logging.getLogger("kafka").addHandler(logging.NullHandler())

_HOMES = {
    "Broker": "broker",
    "DeliveryReport": "producer",
    "FeedbackProducer": "producer",
    "IngestWorker": "worker",
    "Lag": "lag",
    "create_topics": "topics",
    "embedded_broker": "broker",
    "kafka_broker": "broker",
    "list_dead_letters": "dead_letters",
    "replay_dead_letters": "dead_letters",
}

__all__ = [
    "Broker",
    "DeliveryReport",
    "FeedbackProducer",
    "IngestWorker",
    "Lag",
    "create_topics",
    "embedded_broker",
    "kafka_broker",
    "list_dead_letters",
    "replay_dead_letters",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
