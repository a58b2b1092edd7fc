"""A tiny home with a log, a catalogue, a codec and a policy, made once; every case gets a copy."""

import shutil
from pathlib import Path

import pytest

from tests.bad_input.place import Place
from tests.features.online.factory import push_histories
from tests.trainer import round_world


@pytest.fixture(scope="session")
def whole_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Catalogue of 48 items, feedback of 48 users, policy v1 promoted, its codec, the online store."""
    home = tmp_path_factory.mktemp("bad-input") / "var"
    round_world.make_home(home)
    shutil.copytree(home / "policies" / "v1" / "codec", home / "codec")
    push_histories(home / "online", {"user-000": round_world.ITEMS[:5]})
    return home


@pytest.fixture
def empty(tmp_path: Path) -> Place:
    """A place without a home."""
    folder = tmp_path / "place"
    folder.mkdir()
    return Place(folder)


@pytest.fixture
def place(whole_home: Path, empty: Place) -> Place:
    """A place with a copy of ``whole_home`` and its settings."""
    shutil.copytree(whole_home, empty.home)
    (empty.home / "settings.yaml").rename(empty.folder / "align3gr.yaml")
    text = (empty.folder / "align3gr.yaml").read_text()
    (empty.folder / "align3gr.yaml").write_text(text.replace(f"home: {whole_home}\n", "home: var\n"))
    return empty
