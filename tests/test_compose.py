"""docker-compose.yml says only what the code knows: schema, commands, settings, ports, paths, secrets."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from pydantic import BaseModel

from align3gr.__main__ import app
from align3gr.server.settings import ServerSettings
from align3gr.settings import ENV_PREFIX, Settings

ROOT = Path(__file__).resolve().parent.parent
FILES = ("docker-compose.yml", "docker-compose.gpu.yml")
PRIVATE = ("kafka", "redis", "postgres", "mlflow")


def compose(name: str = FILES[0]) -> dict[str, Any]:
    loaded = yaml.safe_load((ROOT / name).read_text())
    assert isinstance(loaded, dict)
    return loaded


def commands(group: Any, prefix: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
    found = set()
    for name, command in group.commands.items():
        found.add((*prefix, name))
        if hasattr(command, "commands"):
            found |= commands(command, (*prefix, name))
    return found


def ours() -> dict[str, dict[str, Any]]:
    return {
        name: service
        for name, service in compose()["services"].items()
        if service.get("image", "").startswith("align3gr:") and "entrypoint" not in service
    }


def test_both_files_follow_the_compose_specification() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
        + [str(ROOT / name) for name in FILES],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_command_exists() -> None:
    known = commands(typer.main.get_command(app))
    assert set(ours()) == {"topics", "ingest", "follow", "scheduler", "server"}
    for name, service in ours().items():
        assert tuple(service["command"]) in known, name
        if "healthcheck" in service and service["healthcheck"]["test"][1] == "align3gr":
            assert (service["healthcheck"]["test"][2],) in known


def setting_exists(key: str) -> bool:
    model: type[BaseModel] = Settings
    for part in key.removeprefix(ENV_PREFIX).lower().split("__"):
        field = model.model_fields.get(part)
        if field is None:
            return False
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            model = kind
    return True


@pytest.mark.parametrize("file", FILES)
def test_every_setting_exists(file: str) -> None:
    keys = {
        key
        for service in compose(file)["services"].values()
        for key in service.get("environment", {})
        if key.startswith("ALIGN3GR_")
    }
    assert keys
    assert [key for key in keys if not setting_exists(key)] == []


def test_settings_check_sees_a_wrong_key() -> None:
    assert setting_exists("ALIGN3GR_KAFKA__TOPIC")
    assert not setting_exists("ALIGN3GR_KAFKA__TOPPIC")


def test_values_are_accepted_by_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in compose()["services"]["server"]["environment"].items():
        if key.startswith("ALIGN3GR_"):
            monkeypatch.setenv(key, re.sub(r"\$\{[^}]*\}", "secret", value))
    settings = Settings()
    assert settings.server.host == "0.0.0.0"
    assert settings.features.online.store == "redis"


def test_only_the_server_is_published_and_on_its_own_port() -> None:
    published = {name: s["ports"] for name, s in compose()["services"].items() if s.get("ports")}
    port = ServerSettings().port
    assert published == {"server": [f"${{LISTEN:-127.0.0.1:{port}}}:{port}"]}
    assert compose()["services"]["server"]["environment"]["ALIGN3GR_SERVER__PORT"] == str(port)
    assert compose()["networks"]["inside"] == {"internal": True}
    for name in PRIVATE:
        assert compose()["services"][name]["networks"] == ["inside"]


def test_health_checks_ask_paths_the_server_has() -> None:
    from align3gr.server import app as server

    source = Path(server.__file__).read_text()
    (path,) = re.findall(r"localhost:8000(/[\w/]+)", str(compose()["services"]["server"]["healthcheck"]))
    assert f'"{path}"' in source


def test_every_service_is_checked_and_none_of_ours_is_root() -> None:
    for name, service in compose()["services"].items():
        if name != "topics":
            assert service["healthcheck"]["test"], name
        if service["image"].startswith("align3gr:"):
            assert service["user"] == "10001:10001"
            assert service["read_only"] is True
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text()
    assert "USER 10001:10001" in dockerfile
    assert compose()["services"]["ingest"]["deploy"]["replicas"] == 2


def test_every_variable_is_in_the_example_and_every_path_exists() -> None:
    text = (ROOT / FILES[0]).read_text()
    used = set(re.findall(r"\$\{([A-Z_]+)", text))
    example = {
        line.split("=")[0]
        for line in (ROOT / ".env.example").read_text().splitlines()
        if "=" in line and line[0] != "#"
    }
    assert used == example
    build = compose()["x-align3gr"]["build"]
    dockerfile = ROOT / build["context"] / build["dockerfile"]
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", dockerfile.read_text(), flags=re.M)
    assert copied
    for path in " ".join(copied).split():
        assert (ROOT / path).exists(), path
    declared = set(compose()["volumes"])
    mounted = {v.split(":")[0] for s in compose()["services"].values() for v in s.get("volumes", [])}
    assert mounted == declared
