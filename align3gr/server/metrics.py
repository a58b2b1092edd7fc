"""Prometheus metrics of one server, in a registry of its own."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

CONTENT_TYPE = CONTENT_TYPE_LATEST

_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class ServerMetrics:
    """Everything the server counts; names start with ``align3gr_``."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "align3gr_requests", "Requests answered.", ["endpoint", "status"], registry=self.registry
        )
        self.latency = Histogram(
            "align3gr_request_seconds",
            "Time to answer a request.",
            ["endpoint"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.decode = Histogram(
            "align3gr_decode_seconds",
            "Time of one decode of a batch.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.batch = Histogram(
            "align3gr_batch_requests",
            "Requests decoded together.",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=self.registry,
        )
        self.items = Counter(
            "align3gr_items_served", "Items served, by what chose them.", ["source"], registry=self.registry
        )
        self.sampled = Counter(
            "align3gr_sampled_slates", "Slates sampled with propensity.", registry=self.registry
        )
        self.degraded = Counter(
            "align3gr_requests_without_features",
            "Recommendations made while the online store did not answer.",
            registry=self.registry,
        )
        self.policy = Gauge(
            "align3gr_policy", "1 for the policy being served.", ["version"], registry=self.registry
        )
        self.behind = Gauge(
            "align3gr_policy_behind",
            "1 while the served policy is not the reference.",
            registry=self.registry,
        )
        self.canary_share = Gauge(
            "align3gr_canary_share", "Share of users that the canary serves; 0: none.", registry=self.registry
        )
        self.canary_answers = Counter(
            "align3gr_canary_answers",
            "Requests of the canary's users: answered, failed, late (these two the reference answered).",
            ["outcome"],
            registry=self.registry,
        )
        self.swaps = Counter("align3gr_policy_swaps", "Policies swapped in.", registry=self.registry)
        self.swap_failures = Counter(
            "align3gr_policy_swap_failures", "References that could not be loaded.", registry=self.registry
        )
        self.swap_seconds = Gauge(
            "align3gr_policy_swap_seconds",
            "Time the last swap took from noticing to serving.",
            registry=self.registry,
        )
        self.events = Counter(
            "align3gr_events",
            "Events to Kafka: acknowledged, failed, dropped (queue full).",
            ["outcome"],
            registry=self.registry,
        )
        self.waiting_events = Gauge(
            "align3gr_events_waiting", "Events that wait for Kafka.", registry=self.registry
        )
        self.feedback = Counter(
            "align3gr_feedback",
            "Interactions posted: accepted, refused.",
            ["outcome"],
            registry=self.registry,
        )

    def now_serving(self, version: str, before: str | None) -> None:
        """Move the policy gauge from ``before`` to ``version``."""
        if before is not None and before != version:
            self.policy.remove(before)
        self.policy.labels(version).set(1)

    def text(self) -> bytes:
        """The exposition that Prometheus scrapes."""
        return generate_latest(self.registry)
