"""A published dataset, replayed through a broker, is in the log: every event once, with its level."""

from pathlib import Path

import duckdb
import pytest

from features.duck import connect, view_of
from features.log import FeedbackLog
from features.settings import FeatureSettings
from ingest.importers import Dataset, interactions, read_dataset
from ingest.producer import FeedbackProducer
from ingest.replay import replay
from ingest.settings import IngestSettings, KafkaSettings
from ingest.worker import IngestWorker
from tests.brokers import align3gr

DATA = Path(__file__).parents[3] / "shared" / "data" / "movielens-small" / "ratings.parquet"


def send(dataset: Dataset, kafka: KafkaSettings) -> None:
    with FeedbackProducer(kafka) as producer:
        replay(interactions(dataset.events, dataset.source), producer)
        report = producer.flush()
    assert (report.acknowledged, report.failed) == (dataset.events.num_rows, [])


def land(kafka: KafkaSettings, log: Path) -> duckdb.DuckDBPyConnection:
    IngestWorker(kafka, IngestSettings(group=kafka.topic), FeatureSettings(), log).run(until_caught_up=True)
    con = connect(FeatureSettings())
    view_of(con, "log", FeedbackLog.open(log, create=False).snapshot())
    return con


def test_a_replay_that_ran_twice_is_counted_once(kafka: KafkaSettings, tmp_path: Path) -> None:
    (tmp_path / "ratings.csv").write_text(
        "userId,movieId,rating,timestamp\n"
        + "".join(f"{n % 7},{n},{1 + n % 5},{1_000_000_000 + n}\n" for n in range(200))
    )
    dataset = read_dataset("movielens", tmp_path)
    send(dataset, kafka)
    send(dataset, kafka)
    with land(kafka, tmp_path / "log") as con:
        facts = con.execute(
            "select count(*), count(distinct (user_id, event_id)), count(*) filter (level = 1) from log"
        ).fetchone()
        times = con.execute(
            "select list(occurred_at order by kafka_partition, kafka_offset) from log group by user_id"
        ).fetchall()
    assert facts == (400, 200, 160)
    for (of_user,) in times:  # one user is in one partition, in order, the second run behind the first
        once = sorted(set(of_user))
        assert of_user == once + once


@pytest.mark.slow
@pytest.mark.skipif(not DATA.exists(), reason="no shared/data folder beside the checkout")
def test_movielens_lands_whole(kafka: KafkaSettings, tmp_path: Path) -> None:
    done = align3gr(kafka, tmp_path, "replay", "movielens", str(DATA))
    assert done.returncode == 0, done.stderr
    with land(kafka, tmp_path / "log") as con:
        rows, events, coordinates, *shares = (
            con.execute(
                """
            select count(*), count(distinct event_id), count(distinct (kafka_partition, kafka_offset)),
                   round(100 * count(*) filter (level = 1) / count(*), 1),
                   round(100 * count(*) filter (level = 0) / count(*), 1),
                   round(100 * count(*) filter (level = -1) / count(*), 1)
            from log
            """
            ).fetchone()
            or ()
        )
    assert rows == events == coordinates == 100_004
    assert shares == [51.6, 30.6, 17.8]
