"""What the demo starts beside itself: a broker, and a process that lands interactions in the log.

Both end with the demo, however it ends: in order on Ctrl-C or an error; after a SIGKILL the ingest process
sees its parent gone and stops, and the next start ends the broker that was left behind.
"""

import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING

from features.errors import ProductError
from features.log import FeedbackLog, LogMissing, LogSnapshot
from features.settings import FeatureSettings
from ingest.broker import embedded_broker, settings_for
from ingest.lag import lag
from ingest.settings import IngestSettings, KafkaSettings
from ingest.topics import create_topics

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

_POLL_S = 0.1
_LANDING_TIMEOUT_S = 120.0


class DemoFailed(ProductError):  # noqa: N818 - reads as what it is at the raise site
    """A part of the demo ended that should not have."""


class Services:
    """The running broker and ingest process of one home directory."""

    def __init__(self, kafka: KafkaSettings, log_path: Path, worker: "BaseProcess") -> None:
        self.kafka = kafka
        self.log_path = log_path
        self._worker = worker

    def landed(self, since: float, features: FeatureSettings) -> LogSnapshot:
        """Wait until all that was published up to now has landed and its attribution windows have closed.

        ``since``: epoch seconds of the last publication. Raises DemoFailed when ingest ended or is stuck.
        """
        closed = datetime.fromtimestamp(since + features.attribution_window_s + 0.001, UTC)
        deadline = time.monotonic() + _LANDING_TIMEOUT_S
        while time.monotonic() < deadline:
            if not self._worker.is_alive():
                raise DemoFailed(
                    f"the ingest process ended with code {self._worker.exitcode}: start the demo again"
                )
            try:
                snapshot = FeedbackLog.open(self.log_path, create=False).snapshot()
            except LogMissing:
                time.sleep(_POLL_S)
                continue
            complete = snapshot.watermark is not None and snapshot.watermark >= closed
            if complete and lag(self.kafka, self.log_path).waiting == 0:
                return FeedbackLog.open(self.log_path, create=False).snapshot()
            time.sleep(_POLL_S)
        raise DemoFailed(
            f"feedback did not land within {_LANDING_TIMEOUT_S:g} s: the machine is too busy, start again"
        )


@contextmanager
def running(home: Path, ingest: IngestSettings, features: FeatureSettings) -> Iterator[Services]:
    """Start both, make the topics, and end both on the way out."""
    with embedded_broker(home / "broker") as broker:
        kafka = settings_for(broker)
        create_topics(kafka)
        worker = multiprocessing.get_context("spawn").Process(
            target=land, args=(kafka, ingest, features, home / "log"), name="demo-ingest", daemon=True
        )
        worker.start()
        try:
            yield Services(kafka, home / "log", worker)
        finally:
            worker.terminate()
            worker.join(timeout=10)
            if worker.is_alive():
                worker.kill()
                worker.join()


def land(kafka: KafkaSettings, ingest: IngestSettings, features: FeatureSettings, log_path: Path) -> None:
    """The ingest process: one worker, until told to stop or until the demo is gone."""
    import signal

    from ingest.worker import IngestWorker

    worker = IngestWorker(kafka, ingest, features, log_path)
    # Ctrl-C reaches the whole terminal group; the demo ends this process itself, in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: worker.stop())
    threading.Thread(target=_stop_with_parent, args=(worker.stop,), daemon=True).start()
    worker.run()


def _stop_with_parent(stop: Callable[[], None]) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "the ingest process is started by the demo"
    wait([parent.sentinel])
    stop()
