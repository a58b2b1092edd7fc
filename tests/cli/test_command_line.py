"""The command line as people and scripts meet it: quick help, one-line errors, settings that name the key."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from align3gr.settings import Settings, load_settings
from features.errors import BadInput

ALIGN3GR = [sys.executable, "-m", "align3gr"]


def run(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*ALIGN3GR, *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_help_answers_quickly_and_imports_neither_torch_nor_feast(tmp_path: Path) -> None:
    code = (
        "import sys, align3gr.__main__ as m; from align3gr.console import run; run(m.app, ['--help']);"
        "loaded = {'torch', 'feast', 'mlflow', 'transformers', 'duckdb', 'pyarrow'} & set(sys.modules);"
        "assert not loaded, loaded"
    )
    # The user time of the process, not the wall clock: other work on the machine must not fail the test.
    best = 99.0
    for _ in range(3):
        before = os.times().children_user
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        best = min(best, os.times().children_user - before)
    assert best < 0.5


def test_unknown_command_is_one_line_and_exit_2(tmp_path: Path) -> None:
    done = run("bogus", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip().count("\n") == 0
    assert "bogus" in done.stderr


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("kafkaa: {}\n", "kafkaa"),
        ("kafka:\n  bootstrap: x\n", "kafka.bootstrap"),
        ("home: [1, 2]\n", "home"),
        ("[1, 2]\n", "keys and values"),
        ("home: {\n", "cannot be read"),
    ],
)
def test_settings_file_errors_name_the_key(tmp_path: Path, text: str, named: str) -> None:
    file = tmp_path / "align3gr.yaml"
    file.write_text(text)
    with pytest.raises(BadInput) as caught:
        load_settings(file)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_environment_wins_over_file_and_file_over_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("home: from-file\nkafka:\n  topic: from-file\n")
    assert load_settings(file).home == Path("from-file")
    monkeypatch.setenv("ALIGN3GR_HOME", "from-environment")
    loaded = load_settings(file)
    assert loaded.home == Path("from-environment")
    assert loaded.kafka.topic == "from-file"
    assert loaded.ingest == Settings().ingest


def test_misspelt_environment_variable_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALIGN3GR_HOEM", "x")
    with pytest.raises(BadInput, match="ALIGN3GR_HOEM"):
        load_settings()


def test_a_foreign_package_of_the_same_name_is_said(tmp_path: Path) -> None:
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "__init__.py").write_text("")
    done = run("--help", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert "another package named trainer" in done.stderr
