"""A tiny policy for every test of this room, written once a session."""

from pathlib import Path

import pytest

from policies.policy import Policy
from tests.policies.factory import write_tiny_adapter, write_tiny_policy


@pytest.fixture(scope="session")
def tiny_policies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policies folder with v1 (full) and v2 (adapter on v1). Read only: copy it to change it."""
    folder = tmp_path_factory.mktemp("policies")
    write_tiny_policy(folder / "v1")
    write_tiny_adapter(folder / "v2", folder / "v1")
    return folder


@pytest.fixture(scope="session")
def tiny_policy(tiny_policies: Path) -> Policy:
    """v1, loaded."""
    return Policy.load(tiny_policies / "v1")
