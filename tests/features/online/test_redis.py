"""The same follower on Feast's Redis store, which ignores a value whose timestamp is not newer."""

from datetime import timedelta
from pathlib import Path

import pytest

from features.interactions import Kind
from features.log import FeedbackLog
from features.online.contexts import OnlineFeatures
from features.online.follow import Follower
from features.online.forgetting import forget_online, known_online
from features.online.repository import OnlineUnavailable
from features.settings import FeatureSettings, OnlineSettings
from tests.features.online.resp import RespServer
from tests.features.online.worlds import Landing, start

pytest.importorskip("redis", reason="the redis extra is not installed")


def test_what_lands_later_wins_whatever_its_clocks_say(tmp_path: Path) -> None:
    landing, at = Landing(FeedbackLog.open(tmp_path / "log")), start()
    with RespServer() as redis:
        settings = FeatureSettings(online=OnlineSettings(store="redis", redis=redis.address))
        online = Follower(tmp_path / "log", tmp_path / "online", settings)
        reader = OnlineFeatures.open(tmp_path / "online", settings.online)
        expected: list[str] = []
        steps = [
            ("first", timedelta()),
            ("same instant", timedelta()),
            ("another worker's clock is behind", timedelta(minutes=-5)),
        ]
        for item, later in steps:
            landing.land(
                [("u", item, Kind.LIKE, at + timedelta(seconds=len(expected)))], at + later, watermark=at
            )
            online.step()
            expected.append(item)
            assert list(reader.contexts(["u"])[0].history) == expected
        landing.land([("u", "late", Kind.LIKE, at - timedelta(days=1))], at + timedelta(seconds=1))
        Follower(tmp_path / "log", tmp_path / "online", settings).step()  # after a restart
        (known, stranger) = reader.contexts(["u", "stranger"])
        assert list(known.history) == ["late", *expected]
        assert known.seen == {"late", *expected}
        assert not stranger.known


def test_a_store_that_is_away_is_said_and_the_step_is_done_when_it_is_back(tmp_path: Path) -> None:
    landing, at = Landing(FeedbackLog.open(tmp_path / "log")), start()
    with RespServer() as redis:
        address = redis.address
    settings = FeatureSettings(online=OnlineSettings(store="redis", redis=address))
    landing.land([("u", "i", Kind.LIKE, at)], at)
    online = Follower(tmp_path / "log", tmp_path / "online", settings)
    with pytest.raises(OnlineUnavailable, match="cannot be written"):
        online.step()
    assert online.position.version == -1


def test_a_forgotten_user_leaves_redis(tmp_path: Path) -> None:
    landing, at = Landing(FeedbackLog.open(tmp_path / "log")), start()
    with RespServer() as redis:
        settings = FeatureSettings(online=OnlineSettings(store="redis", redis=redis.address))
        landing.land([("gone", "hers", Kind.LIKE, at), ("stays", "both", Kind.LIKE, at)], at)
        Follower(tmp_path / "log", tmp_path / "online", settings).step()
        assert known_online(tmp_path / "online", settings, "gone")
        forget_online(tmp_path / "online", settings, "gone", version=0, items=["hers"])
        assert not any(b"gone" in key or b"hers" in key for key in redis.hashes)
        assert not known_online(tmp_path / "online", settings, "gone")
        assert known_online(tmp_path / "online", settings, "stays")
