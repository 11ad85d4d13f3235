"""docker/compose.yaml says what Compose understands, and its jobs understand what it tells them."""

import json
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import check_jsonschema
import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]


def test_it_follows_the_compose_specification() -> None:
    schemas = Path(check_jsonschema.__file__).parent / "builtin_schemas" / "vendor"
    jsonschema.validate(COMPOSE, json.loads((schemas / "compose-spec.json").read_text()))


def test_the_actor_waits_for_healthy_servers_and_all_jobs_have_a_gpu_of_their_own() -> None:
    assert SERVICES["actor"]["depends_on"] == {
        name: {"condition": "service_healthy"} for name in SERVICES if name != "actor"
    }
    devices = [service["deploy"]["resources"]["reservations"]["devices"][0] for service in SERVICES.values()]
    ids = [id for device in devices for id in device["device_ids"]]
    assert len(ids) == len(set(ids)) == len(SERVICES)
    assert all(device["capabilities"] == ["gpu"] for device in devices)
    for service in SERVICES.values():
        assert service["ipc"] == "host"
        assert service["healthcheck"]["test"][-1] == "/opt/nemo_eppo/docker/health.py"


def test_without_certificates_nothing_starts() -> None:
    assert any(volume.startswith("${CERTIFICATES:?") for volume in SERVICES["actor"]["volumes"])


@pytest.mark.parametrize("name", ["actor", "critic", "reward"])
def test_the_settings_of_each_job_load(name: str, tmp_path: Path) -> None:
    command = [argument.replace("$$", "$") for argument in SERVICES[name]["command"]]
    shown = subprocess.run(
        ["bash", str(ROOT / "docker" / "entrypoint.sh"), *command, "--cfg", "job"],
        capture_output=True,
        text=True,
        timeout=60,
        env={
            "PATH": "/usr/bin:/bin",
            "PYTHON": sys.executable,
            "SERVERS": sys.prefix,
            "PYTHONPATH": str(ROOT),
            "NEMO_EPPO_CERTIFICATES": "/certificates",
            "NEMO_EPPO_STATE": str(tmp_path),
        },
    )
    assert shown.returncode == 0, shown.stderr
    settings = yaml.safe_load(shown.stdout)
    mounts = {volume.partition("}:")[2].removesuffix(":ro") for volume in SERVICES[name]["volumes"]}
    paths = re.findall(r"(?<=[ '\"])(/(?:models|data|runs|certificates)\S*)", shown.stdout)
    assert paths
    assert all("/" + path.split("/")[1] in mounts for path in paths)
    if name == "actor":
        addresses = [settings["critic"]["server"]["url"], *(reward["server"]["url"] for reward in settings["rewards"])]
        assert addresses == ["grpc://critic:5555", "grpc://reward:5556"]
        assert settings["critic"]["server"]["certificates"] == "/certificates"
        assert settings["rewards"][0]["server"]["certificates"] == "/certificates"
    else:
        assert settings["server"]["host"] == "0.0.0.0"
        assert settings["server"]["port"] == {"critic": 5555, "reward": 5556}[name]
        assert settings["server"]["certificates"] == "/certificates"


def test_the_server_of_the_page_is_reached_through_its_published_port(tmp_path: Path) -> None:
    page = (ROOT / "docker" / "README.md").read_text().replace("\\\n", " ")
    (words,) = (shlex.split(line) for line in page.splitlines() if line.startswith("docker run "))
    given = [(option, value) for option, value in pairwise(words) if option in ("-p", "-e", "-v")]
    variables = dict(value.split("=") for option, value in given if option == "-e")
    shown = subprocess.run(
        ["bash", str(ROOT / "docker" / "entrypoint.sh"), *words[words.index("nemo_eppo") + 1 :], "--cfg", "job"],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": "/usr/bin:/bin", "SERVERS": sys.prefix, "PYTHONPATH": str(ROOT), **variables},
    )
    assert shown.returncode == 0, shown.stderr
    server = yaml.safe_load(shown.stdout)["server"]
    assert server["host"] == "0.0.0.0", "127.0.0.1 would be the container's own"
    assert ("-p", f"{server['port']}:{server['port']}") in given
    mounts = [value.split(":")[1] for option, value in given if option == "-v"]
    assert server["certificates"] in mounts
