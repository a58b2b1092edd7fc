"""``align3gr broker``: a Kafka-protocol broker for a laptop, and the topics on any broker."""

from pathlib import Path
from typing import Any

import typer

from align3gr.console import JsonOption, emit, say, settings_of

app = typer.Typer()
group = typer.Typer(
    invoke_without_command=True, help="Start a broker on this machine, or make the topics on any broker."
)
app.add_typer(group, name="broker")


@group.callback(invoke_without_command=True)
def broker(
    context: typer.Context,
    port: int | None = typer.Option(
        None, help="Port on 127.0.0.1 (default: the one of kafka.bootstrap_servers); 0 takes a free one."
    ),
    data_dir: Path | None = typer.Option(None, help="Its folder (default: broker under the setting home)."),
    kind: str = typer.Option(
        "auto",
        help="embedded (memory only), kafka (the distribution KAFKA_HOME names), or auto: kafka if set.",
    ),
    as_json: bool = JsonOption,
) -> None:
    """Run a broker in the foreground with both topics made; Ctrl-C ends it."""
    if context.invoked_subcommand is not None:
        return
    import signal

    from ingest.broker import choose_broker, settings_for
    from ingest.errors import BrokerFailed
    from ingest.topics import create_topics

    settings = settings_of(context)
    own = _own_port(settings.kafka.bootstrap_servers) if port is None else port
    node = choose_broker(kind, data_dir or settings.home / "broker", own)

    def end(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)
    try:
        with node:
            create_topics(settings_for(node, settings.kafka))
            facts = {
                "kind": node.kind,
                "bootstrap_servers": node.bootstrap_servers,
                "cluster": node.cluster_id,
                "keeps_data": node.keeps_data,
            }
            emit(facts, as_json)
            if not node.keeps_data:
                say("memory only: its topics are gone when it stops; what has landed in the log stays")
            code = node.wait()
            raise BrokerFailed(f"the broker ended by itself with exit code {code}: see {node.log_file}")
    except KeyboardInterrupt:
        say("broker stopped")


def _own_port(bootstrap_servers: str) -> int:
    """Port that clients with the same settings will call; raises BadInput when it is another machine's."""
    from features.errors import BadInput

    host, _, port = bootstrap_servers.split(",")[0].strip().rpartition(":")
    if host not in ("127.0.0.1", "localhost") or not port.isdigit():
        raise BadInput(
            f"kafka.bootstrap_servers is {bootstrap_servers}, not a port of this machine: "
            "start the broker there, or give --port"
        )
    return int(port)


@group.command("topics")
def topics(context: typer.Context, as_json: bool = JsonOption) -> None:
    """Make the interactions and dead-letter topics where they are missing, and show how far they reach."""
    from ingest.topics import create_topics, reach

    kafka = settings_of(context).kafka
    created = create_topics(kafka)
    facts: dict[str, Any] = {"bootstrap_servers": kafka.bootstrap_servers, "created": created}
    for topic in (kafka.topic, kafka.dead_topic):
        facts[topic] = {str(p): [at.first, at.end] for p, at in sorted(reach(kafka, topic).items())}
    emit(facts, as_json)
