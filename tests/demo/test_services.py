"""What the demo starts beside itself lands feedback, and never outlives it."""

import multiprocessing
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from align3gr.demo.defaults import DemoOptions, demo_settings
from align3gr.demo.services import running
from features.interactions import Interaction, Kind
from features.log import FeedbackLog
from ingest.producer import FeedbackProducer

PARENT = """
import sys, time
from pathlib import Path
from align3gr.demo.defaults import DemoOptions, demo_settings
from align3gr.demo.services import running

if __name__ == "__main__":
    settings = demo_settings(Path(sys.argv[1]), DemoOptions(1))
    with running(Path(sys.argv[1]), settings.ingest, settings.features) as services:
        print(services._worker.pid, flush=True)
        time.sleep(60)
"""


def test_what_is_published_lands_with_its_windows_closed(tmp_path: Path) -> None:
    settings = demo_settings(tmp_path, DemoOptions(1))
    with running(tmp_path, settings.ingest, settings.features) as services:
        with FeedbackProducer(services.kafka) as producer:
            for number in range(50):
                event = Interaction(
                    event_id=f"e{number}", user_id=f"u{number % 5}", item_id="i", kind=Kind.IMPRESSION,
                    occurred_at=datetime.now(UTC),
                )  # fmt: skip
                producer.send(event)
        sent = time.time()
        snapshot = services.landed(sent, settings.features)
    assert snapshot.watermark is not None
    assert snapshot.watermark.timestamp() >= sent + settings.features.attribution_window_s
    assert FeedbackLog.open(tmp_path / "log").snapshot().files
    assert not multiprocessing.active_children()


def test_ingest_ends_when_the_demo_is_killed(tmp_path: Path) -> None:
    program = tmp_path / "parent.py"
    program.write_text(PARENT)
    home = tmp_path / "home"
    parent = subprocess.Popen([sys.executable, str(program), str(home)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait(timeout=10)
    deadline = time.monotonic() + 30
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{worker}").exists()
    # The broker was left behind: the next start on the folder ends it.
    facts = (home / "broker" / "broker.json").read_text()
    settings = demo_settings(home, DemoOptions(1))
    with running(home, settings.ingest, settings.features):
        assert (home / "broker" / "broker.json").read_text() != facts
