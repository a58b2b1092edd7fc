"""Every command in README and docs is run, as it stands on the page; links and named commands exist.

A page's ``sh`` blocks run in order, in one shell, in an empty folder with the data that the page names. A
block that cannot run here (it needs containers, a GPU, a fresh machine) says so in a comment before it:
``<!-- not run: why -->``; of those, and of words in running text, it is checked that the command exists.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer

from align3gr.__main__ import app
from tests.docs.data import write_page_data

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:<!-- not run: (?P<why>[^>]+) -->\n)?```sh\n(?P<text>.*?)```", re.S)
SLOW = {"walkthrough.md", "demo.md", "keeping.md", "tokenization.md"}


@dataclass(frozen=True)
class Block:
    text: str
    why_not_run: str | None


def blocks(page: Path) -> list[Block]:
    return [Block(found["text"], found["why"]) for found in BLOCK.finditer(page.read_text())]


def runnable() -> list[object]:
    pages = [page for page in PAGES if any(block.why_not_run is None for block in blocks(page))]
    return [
        pytest.param(page, id=page.name, marks=[pytest.mark.slow] if page.name in SLOW else [])
        for page in pages
    ]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", runnable())
def test_the_commands_of_a_page_run(page: Path, tmp_path: Path) -> None:
    script = "\n".join(block.text for block in blocks(page) if block.why_not_run is None)
    write_page_data(tmp_path)
    (tmp_path / "page.sh").write_text(f"set -euo pipefail\n{script}\necho\necho the page ran to its end\n")
    port, http = free_port(), free_port()
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "ALIGN3GR_KAFKA__BOOTSTRAP_SERVERS": f"127.0.0.1:{port}",
        "ALIGN3GR_SERVER__PORT": str(http),
        "PORT": str(http),
    }
    output = tmp_path / "output.txt"
    with output.open("w") as sink:
        shell = subprocess.Popen(
            ["bash", "page.sh"],
            cwd=tmp_path,
            env=environment,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
        )
        try:
            code = shell.wait(timeout=850)
        finally:
            # What the page started in the background ends with it.
            with_children = os.getpgid(shell.pid) if shell.poll() is None else shell.pid
            try:
                os.killpg(with_children, signal.SIGTERM)
            except ProcessLookupError:
                with_children = 0
    text = output.read_text()
    assert code == 0, text[-4000:]
    assert text.rstrip().splitlines().count("the page ran to its end") == 1
    assert "Traceback" not in text


def commands() -> set[str]:
    def walk(group: object, prefix: str) -> set[str]:
        found = set()
        for name, command in getattr(group, "commands", {}).items():
            found.add(f"{prefix}{name}")
            found |= walk(command, f"{prefix}{name} ")
        return found

    return walk(typer.main.get_command(app), "")


def options_of(command: str) -> set[str]:
    found = typer.main.get_command(app)
    for part in command.split():
        found = found.commands[part]  # type: ignore[attr-defined]
    return {option for parameter in found.params for option in (*parameter.opts, *parameter.secondary_opts)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_that_a_page_names_exist(page: Path) -> None:
    known = commands()
    for line in re.findall(r"align3gr ((?:[a-z][a-z0-9-]*)(?:[^`\n|&;]*))", page.read_text()):
        words = line.split()
        name = words[0]
        if " ".join(words[:2]) in known:
            name = " ".join(words[:2])
        # Prose such as "align3gr is" names no command; a code span or block always does.
        if name not in known:
            assert f"`align3gr {name}" not in page.read_text(), f"{page.name}: align3gr {name}"
            continue
        for option in re.findall(r"(?<=\s)--[a-z][a-z-]*", line):
            assert option in options_of(name) | {"--help"}, f"{page.name}: align3gr {name} {option}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_make_targets_that_pages_name_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    named = {name for page in PAGES for name in re.findall(r"`?make ([a-z-]+)(?=[`\s])", page.read_text())}
    assert {"demo", "test", "test-all"} <= targets
    assert {name for name in named if name in {"demo", "test", "test-all", "install", "check"}} <= targets
    assert shutil.which("make")
