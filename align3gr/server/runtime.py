"""Puts a server together from the settings, and runs it until it is told to stop."""

import logging
import socket
import time
from collections.abc import Callable
from ipaddress import ip_address
from typing import TYPE_CHECKING

from features.errors import BadInput

from ..settings import Settings
from .eligible import EligibleItems
from .events import EventRecorder, Producer
from .metrics import ServerMetrics
from .service import Features, Recommender
from .settings import ServerSettings
from .swap import PolicySwap

if TYPE_CHECKING:
    from fastapi import FastAPI

    from policies.policy import Policy

log = logging.getLogger(__name__)


class AddressUnusable(BadInput):
    """The server must not, or cannot, listen where the settings say."""


def listen(settings: ServerSettings) -> socket.socket:
    """The socket to serve on. Raises AddressUnusable when the port is taken or the address needs a key."""
    if settings.api_key is None and not _loopback(settings.host):
        raise AddressUnusable(
            f"server.host {settings.host} can be reached from other machines and there is no API key; "
            "set server.api_key (ALIGN3GR_SERVER__API_KEY), or listen on 127.0.0.1"
        )
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((settings.host, settings.port))
    except OSError as error:
        bound.close()
        raise AddressUnusable(
            f"cannot listen on {settings.host}:{settings.port}: {error.strerror}; "
            "choose another server.port, or stop what listens there"
        ) from error
    bound.set_inheritable(True)
    return bound


class Runtime:
    """Everything that lives as long as the server: started before it, stopped after it."""

    def __init__(self, settings: Settings, features: Features) -> None:
        server = settings.server
        self.settings = settings
        self.metrics = ServerMetrics()
        self.swap = policy_swap(settings, self.metrics)
        self.eligible = EligibleItems(_listed_items(settings), every_seconds=server.catalogue_seconds)
        self.recorder = EventRecorder(
            _producer(settings),
            self.metrics,
            queue=server.record_queue,
            timeout_seconds=server.feedback_timeout_seconds,
        )
        self.service = Recommender(
            self.swap,
            features,
            self.eligible,
            self.recorder if server.record_served else None,
            self.metrics,
            server,
            request_key=settings.features.request_key_bytes,
            prepare=_torch_threads(server.threads),
            canary=settings.policies.promotion.canary,
        )

    def start(self) -> "FastAPI":
        """Load the reference, begin to follow everything; the application to serve."""
        from .app import create_app

        self.eligible.start()
        self.swap.start()
        self.recorder.start()
        return create_app(self.service, self.settings.server, self.metrics, publish=self.recorder)

    def stop(self) -> None:
        """End the threads; served events that still wait for Kafka get the time that the settings give."""
        self.swap.stop()
        self.eligible.stop()
        self.recorder.stop(self.settings.server.drain_seconds)


def serve(settings: Settings, *, ready: Callable[[str], None] = log.info) -> None:
    """Serve until SIGINT or SIGTERM; ``ready`` is told the address once requests are answered.

    Raises AddressUnusable, and FeaturesError when the online store cannot be opened.
    """
    import uvicorn

    from features.online.contexts import OnlineFeatures

    bound = listen(settings.server)
    try:
        features = OnlineFeatures.open(settings.home / "online", settings.features.online)
        runtime = Runtime(settings, features)
        app = runtime.start()
        host, port = bound.getsockname()[:2]
        config = uvicorn.Config(
            app, log_level=settings.server.log_level, access_log=False, timeout_graceful_shutdown=30
        )
        server = uvicorn.Server(config)
        bound.listen(2048)  # who calls the address as soon as it is said waits, and is not refused
        ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")
        try:
            server.run(sockets=[bound])
        finally:
            runtime.stop()
    finally:
        bound.close()


def policy_swap(settings: Settings, metrics: ServerMetrics) -> "PolicySwap[Policy]":
    """Follows the ledger of ``settings.home``; a policy counts as loaded once it has made one list."""
    from policies.ledger import PromotionLedger
    from policies.policy import Policy, UserContext
    from policies.registry import Registry

    ledger = PromotionLedger(settings.home / "ledger")
    registry = Registry(settings.home, settings.policies.registry)
    prepare = _torch_threads(settings.server.threads)

    def load(version: str) -> Policy:
        prepare()
        served = swap.current
        policy = Policy.load(
            registry.path(version),
            device=settings.server.device,
            share_base_with=served.policy if served else None,
            merged=settings.server.merge_adapters,
            settings=settings.policies.decoding,
        )
        policy.recommend([UserContext("warm-up", history=(policy.codec.item_ids[0],))], settings.server.k)
        return policy

    swap: PolicySwap[Policy] = PolicySwap(
        ledger.reference,
        load,
        metrics,
        candidates=registry.versions,
        poll_seconds=settings.server.poll_seconds,
        warm=settings.server.warm_policies,
        canary=ledger.canary,
        withdraw=lambda version, why: ledger.withdraw(version, who=f"server {socket.gethostname()}", why=why),
        clock=time.monotonic,
    )
    return swap


def _listed_items(settings: Settings) -> Callable[[], frozenset[str] | None]:
    """Reads the listed items when the catalogue has a new revision; None while nothing was ever loaded."""
    from features.catalogue import Catalogue, CatalogueMissing

    known: tuple[int, frozenset[str] | None] = (0, None)

    def read() -> frozenset[str] | None:
        nonlocal known
        try:
            catalogue = Catalogue.open(settings.home / "catalogue", create=False)
        except CatalogueMissing:
            return None
        revision = catalogue.revision
        if revision != known[0]:
            listed = catalogue.items(listed_only=True).column("item_id").to_pylist()
            known = revision, frozenset(listed)
        return known[1]

    return read


def _producer(settings: Settings) -> Callable[[], Producer]:
    def open_producer() -> Producer:
        from ingest.producer import FeedbackProducer

        kafka = settings.kafka.model_copy(
            update={"delivery_timeout_s": settings.server.feedback_timeout_seconds}
        )
        return FeedbackProducer(kafka)

    return open_producer


def _torch_threads(threads: int) -> Callable[[], None]:
    """OpenMP keeps the number of threads for each calling thread, so every thread that decodes sets it."""

    def prepare() -> None:
        if threads:
            import torch

            torch.set_num_threads(threads)

    return prepare


def _loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
