"""``align3gr rate``: reviews without stars, rated by what they say."""

import typer

from align3gr.console import JsonOption, emit, say, settings_of

app = typer.Typer()


@app.command()
def rate(
    context: typer.Context,
    until_caught_up: bool = typer.Option(
        False, help="End when every review that the topic holds now has been looked at."
    ),
    from_start: bool = typer.Option(
        False, help="Read the topic again from its first event: what a new rater wants."
    ),
    as_json: bool = JsonOption,
) -> None:
    """Publish a rating for each review that carries words and no stars, until told to stop."""
    import signal

    from ingest.rating import RatingWorker, rater_of
    from ingest.topics import identify

    settings = settings_of(context)
    identify(settings.kafka)  # a broker or topic that is not there is said before a model is loaded
    rater = rater_of(settings.ingest.rating)
    worker = RatingWorker(settings.kafka, settings.ingest, settings.features, rater, from_start=from_start)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: worker.stop())
    if not until_caught_up:
        say(f"rate: {settings.kafka.topic} at {settings.kafka.bootstrap_servers}, rater {rater.version}")
    emit(worker.run(until_caught_up=until_caught_up).facts(), as_json)
