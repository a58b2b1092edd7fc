"""What every room's tests share: brokers."""

import shutil
import signal
from collections.abc import Iterator

import pytest
from xdist.scheduler import LoadScopeScheduling

from ingest.broker import Broker, embedded_broker, kafka_broker, kafka_home
from ingest.settings import KafkaSettings
from tests.brokers import KINDS, NEEDS_KAFKA, topics_on


def pytest_configure() -> None:
    """Hear Ctrl-C, and have the processes under test hear it.

    A shell without job control starts what stands before ``&`` with SIGINT ignored, and whatever that starts
    inherits it: run so, tests that interrupt a command would wait for ever.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class _Together(LoadScopeScheduling):
    """The tests of a file share a worker, and so do those that share what is dear to start: one Apache Kafka,
    and one process that has imported torch, instead of one a worker."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        if "[kafka" in nodeid:
            return "kafka"
        return "bad_input" if "/bad_input/" in file else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> LoadScopeScheduling:
    """Which worker runs which tests, whatever ``--dist`` says."""
    return _Together(config, log)


@pytest.fixture(scope="session")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """The memory-only broker; do not stop it, start one of your own for that."""
    with embedded_broker(tmp_path_factory.mktemp("embedded")) as broker:
        yield broker


@pytest.fixture(scope="session")
def real_kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """An Apache Kafka node; skipped where there is none."""
    if kafka_home() is None or shutil.which("java") is None:
        pytest.skip(NEEDS_KAFKA)
    with kafka_broker(tmp_path_factory.mktemp("kafka")) as broker:
        yield broker


@pytest.fixture(scope="session", params=KINDS)
def broker(request: pytest.FixtureRequest) -> Broker:
    """Each kind of broker in turn."""
    return request.getfixturevalue("embedded" if request.param == "embedded" else "real_kafka")


@pytest.fixture
def kafka(broker: Broker) -> KafkaSettings:
    """Settings with fresh topics on each kind of broker in turn."""
    return topics_on(broker)


@pytest.fixture
def embedded_kafka(embedded: Broker) -> KafkaSettings:
    """Settings with fresh topics on the embedded broker."""
    return topics_on(embedded)
