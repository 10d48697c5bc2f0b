"""docker-compose.yml, without Docker: structure, and commands that Flower's own parsers take."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES = COMPOSE["services"]


def options(service: str) -> dict[str, str]:
    return dict(word.lstrip("-").partition("=")[::2] for word in SERVICES[service]["command"][1:])


def test_services() -> None:
    assert list(SERVICES) == ["superlink", "supernode1", "supernode2", "supernode3"]
    for service in SERVICES.values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert "healthcheck" in service
        assert set(service["secrets"]) <= set(COMPOSE["secrets"])
        named = [volume.partition(":")[0] for volume in service["volumes"] if not volume.startswith(".")]
        assert named
        assert set(named) <= set(COMPOSE["volumes"])
        assert "--insecure" not in service["command"]


def test_every_supernode_is_another_client_with_its_own_key_sites_and_data() -> None:
    for number in (1, 2, 3):
        service, given = SERVICES[f"supernode{number}"], options(f"supernode{number}")
        assert given["superlink"] == "superlink:9092"
        assert given["auth-supernode-private-key"] == f"/run/secrets/sn{number}"
        assert f"partition-id={number - 1} " in given["node-config"]
        assert service["volumes"] == [f"sites{number}:/sites", f"./data/client{number - 1}:/data:ro"]
        assert service["depends_on"] == {"superlink": {"condition": "service_healthy"}}


@pytest.mark.parametrize("service", SERVICES)
def test_flower_knows_the_options(service: str) -> None:
    shown = subprocess.run(
        [str(Path(sys.executable).with_name(SERVICES[service]["command"][0])), "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert set(options(service)) <= set(re.findall(r"--([a-z][a-z-]+)", shown))
    if service == "superlink":
        assert "enable-supernode-auth" in options(service)


def test_image_runs_as_a_user_with_pinned_base() -> None:
    text = (ROOT / "Dockerfile").read_text()
    assert re.findall(r"^FROM (\S+)", text, re.M) == ["python:3.11.11-slim-bookworm"] * 2
    assert text.index("USER bayesfed") > text.rindex("RUN")
    assert "-c constraints.txt" in text


@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="needs the Debian package docker-compose")
def test_docker_compose_accepts_it() -> None:
    done = subprocess.run(["docker-compose", "config", "-q"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
