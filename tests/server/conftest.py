"""Real small things for the server: policies, a ledger, an online store, a broker that pip installs."""

import os
from pathlib import Path

import pytest

from features.online.contexts import OnlineFeatures
from ingest.broker import Broker
from ingest.settings import KafkaSettings
from ingest.topics import create_topics
from policies.ledger import PromotionLedger
from tests.features.online.factory import push_histories
from tests.policies.factory import item_ids, write_tiny_policy

os.environ.setdefault("OMP_NUM_THREADS", "1")

USERS = {f"user-{number}": item_ids(200)[number : number + 8] for number in range(40)}
"""user-0 liked item-000 .. item-007, user-1 item-001 .. item-008, and so on."""


@pytest.fixture(scope="session")
def served_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with v1, v2, v3 (other weights each), v1 promoted, and the online features of USERS."""
    home = tmp_path_factory.mktemp("home")
    for number in (1, 2, 3):
        write_tiny_policy(home / "policies" / f"v{number}", version=f"v{number}", seed=number)
    push_histories(home / "online", USERS)
    return home


@pytest.fixture(scope="session")
def online_features(served_home: Path) -> OnlineFeatures:
    from features.settings import OnlineSettings

    return OnlineFeatures.open(served_home / "online", OnlineSettings())


@pytest.fixture(scope="module")
def home(served_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``served_home`` with a ledger of its own."""
    home = tmp_path_factory.mktemp("home")
    for name in ("policies", "online"):
        (home / name).symlink_to(served_home / name)
    PromotionLedger(home / "ledger").promote("v1", expects=None, who="test", why="first")
    return home


@pytest.fixture(scope="session")
def broker(embedded: Broker) -> Broker:
    """The embedded broker with the topics of the default settings."""
    create_topics(KafkaSettings(bootstrap_servers=embedded.bootstrap_servers))
    return embedded
