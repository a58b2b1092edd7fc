"""Commands: serve."""

import typer

from ..console import JsonOption, emit, say, settings_of

app = typer.Typer()


@app.command()
def serve(
    context: typer.Context,
    host: str | None = typer.Option(None, help="Address to listen on (default: server.host, 127.0.0.1)."),
    port: int | None = typer.Option(None, min=0, max=65535, help="Port to listen on; 0 takes a free one."),
    device: str | None = typer.Option(None, help="Where the policy runs: cpu, cuda, cuda:1 ..."),
    as_json: bool = JsonOption,
) -> None:
    """Answer recommendations over HTTP from the reference policy, and take feedback."""
    settings = settings_of(context)
    given = {"host": host, "port": port, "device": device}
    server = settings.server.model_copy(
        update={key: value for key, value in given.items() if value is not None}
    )
    settings = settings.model_copy(update={"server": server})

    from ..server.runtime import serve as run

    def ready(address: str) -> None:
        if as_json:
            emit({"address": address}, as_json)
        else:
            say(f"serving on {address} (page: {address}/docs); Ctrl-C stops")

    run(settings, ready=ready)
