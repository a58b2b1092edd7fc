"""Which partitions this worker owns right now, as Kafka's rebalances tell it.

kafka-python 3 calls the listener on its IO thread, the one that also sends heartbeats, possibly while the
worker is busy elsewhere. So nothing is done here but noting: the worker compares ``generation`` with the one
it has positions for and, when they differ, drops what it holds and reads its positions from the log again.
"""

import threading
from collections.abc import Iterable

from kafka import KafkaConsumer, TopicPartition
from kafka.consumer.subscription_state import ConsumerRebalanceListener


class Assignment(ConsumerRebalanceListener):  # type: ignore[misc] # the client is untyped
    """The partitions of one consumer, updated by rebalances.

    Invariant: a partition that was assigned and not yet placed by the worker is paused, so that no record of
    it arrives before its position was read from the log.
    """

    def __init__(self, consumer: KafkaConsumer) -> None:
        self._consumer = consumer
        self._lock = threading.Lock()
        self._owned: frozenset[TopicPartition] = frozenset()
        self._generation = 0

    def current(self) -> tuple[int, frozenset[TopicPartition]]:
        """The number of changes so far, and the partitions owned since the last one."""
        with self._lock:
            return self._generation, self._owned

    @property
    def generation(self) -> int:
        """Grows with every change."""
        return self._generation

    def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        """Called by the client after a rebalance."""
        for partition in assigned:
            # A placeholder: without any position the client would ask for a committed offset and, finding
            # none, fail. The real one is sought when the worker has read the log.
            self._consumer.seek(partition, 0)
            self._consumer.pause(partition)
        self._change(self._owned | frozenset(assigned))

    def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        """Called by the client before a rebalance."""
        self._change(self._owned - frozenset(revoked))

    def on_partitions_lost(self, lost: Iterable[TopicPartition]) -> None:
        """Called by the client when the group has already given them to somebody else."""
        self._change(self._owned - frozenset(lost))

    def keep_joining(self) -> None:
        """Before each poll: a join that is under way must be seen to its end by the polls to come.

        kafka-python 3.0.12 forgets one that its own metadata made it begin (a topic made anew, partitions
        added) when the poll that began it ends first: the member then stays without partitions and heartbeats
        for good (ConsumerCoordinator.need_rejoin turns false in _perform_assignment, before the join's result
        is taken). There is no public way to ask again; asking while all is well changes nothing.
        """
        coordinator = self._consumer._coordinator
        if coordinator.rebalance_in_progress():
            coordinator.request_rejoin()

    def _change(self, owned: frozenset[TopicPartition]) -> None:
        with self._lock:
            self._owned = owned
            self._generation += 1
