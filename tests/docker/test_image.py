"""What docker/Dockerfile does, step by step, on a stand-in for the base image: an environment with the packages that
the tests run with, but with numpy 2, as NVIDIA's newer images have, and without jinja2, PyTriton and nemo_eppo."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import pytest
from distributed import free_port
from jobs import Models
from packaging.requirements import Requirement

from nemo_eppo.servers.certificates import create

ROOT = Path(__file__).parents[2]
NOT_IN_BASE = ("nemo_eppo", "numpy", "jinja2", "pytriton", "nvidia_pytriton", "__editable__")


@dataclass
class Image:
    """Its source directory, the Python of its base, and the second environment for servers."""

    root: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def source(self) -> Path:
        return self.root / "opt"

    @property
    def python(self) -> Path:
        return self.root / "base" / "bin" / "python"

    @property
    def servers(self) -> Path:
        return self.root / "servers" / "bin" / "python"

    def environment(self, **more: object) -> dict[str, str]:
        inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        own = {"PYTHON": self.python, "SERVERS": self.root / "servers", "NPROC_PER_NODE": 1, "OMP_NUM_THREADS": 1}
        return inherited | {key: str(value) for key, value in {**own, **more}.items()}

    def run(self, *command: str | Path, check: bool = True, **more: object) -> subprocess.CompletedProcess[str]:
        environment = self.environment(**more)
        done = subprocess.run(
            [*map(str, command)], cwd=self.source, env=environment, capture_output=True, text=True, timeout=120
        )
        assert not check or done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done

    def evaluate(self, python: Path, module: str, expression: str) -> str:
        return self.run(python, "-c", f"import {module}; print({expression})").stdout.strip()

    def start(self, log: Path, *arguments: object, **more: object) -> subprocess.Popen[bytes]:
        with log.open("wb") as output:
            process = subprocess.Popen(
                ["bash", self.source / "docker" / "entrypoint.sh", *map(str, arguments)],
                env=self.environment(**more),
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.processes.append(process)
        return process


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    image = Image(tmp_path_factory.mktemp("image"))
    image.source.mkdir()
    for name in copied():
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, image.source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, image.source)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", image.root / "base"], check=True)
    packages = next((image.root / "base").glob("lib/python3*/site-packages"))
    for package in Path(sysconfig.get_path("purelib")).iterdir():
        if not package.name.startswith(NOT_IN_BASE):
            (packages / package.name).symlink_to(package)
    numpy = image.run(image.python, "-m", "pip", "install", "-q", "--no-deps", "numpy>=2,<2.3", check=False)
    if numpy.returncode:
        pytest.skip(f"no package index, so the image cannot be installed: {numpy.stderr.strip()[-300:]}")
    constraint = image.root / "constraint.txt"  # NVIDIA's images forbid pip to touch what they have
    constraint.write_text("numpy>=2\n")
    image.run("bash", "docker/install.sh", PIP_CONSTRAINT=constraint)
    yield image
    for process in image.processes:
        if process.poll() is None:
            process.terminate()  # torchrun ends its ranks
            process.wait(60)


def copied() -> list[str]:
    """Files and directories that the Dockerfile copies."""
    lines = re.findall(r"^COPY (.+)$", (ROOT / "docker" / "Dockerfile").read_text(), re.MULTILINE)
    return [name for line in lines for name in line.split()[:-1]]


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(300):
        if condition():
            return
        assert process.poll() is None, log.read_text()[-4000:]
        time.sleep(0.2)
    raise TimeoutError(log.read_text()[-4000:])


def test_dockerignore_lets_exactly_what_is_copied_through() -> None:
    ignore = (ROOT / ".dockerignore").read_text().split()
    assert sorted(line[1:] for line in ignore if line.startswith("!")) == sorted(copied())
    assert all((ROOT / name).exists() for name in copied())


@pytest.mark.slow
def test_the_lists_of_the_installer_name_requirements_of_setup_py(image: Image) -> None:
    sys.path.insert(0, str(ROOT / "docker"))
    from requirements import FROM_IMAGE, SERVERS_ONLY

    lines = image.evaluate(image.python, "importlib.metadata as m", "*m.requires('nemo_eppo'), sep='\\n'").split("\n")
    assert {Requirement(line).name.replace("_", "-") for line in lines} >= FROM_IMAGE | SERVERS_ONLY


@pytest.mark.slow
def test_the_base_keeps_its_packages_and_servers_get_an_older_numpy(image: Image) -> None:
    assert image.evaluate(image.python, "numpy", "numpy.__version__").startswith("2.")
    assert image.evaluate(image.servers, "numpy", "numpy.__version__").startswith("1.26.")
    for python in (image.python, image.servers):
        assert image.evaluate(python, "nemo_eppo.config", "nemo_eppo.config.__file__").startswith(str(image.source))
        for kind in ("actor", "server") if python == image.servers else ("actor",):
            assert not image.run(python, "docker/requirements.py", "missing", kind).stdout
    where = image.evaluate(image.python, "jinja2", "jinja2.__file__")
    assert where.startswith(str(image.root)), "it was missing, and was installed"
    assert image.run(image.python, "-c", "import pytriton", check=False).returncode, "servers only"


@pytest.mark.parametrize(
    ("image_has", "complaint"),
    [
        (
            {"torch": "2.10.0a0+b4e4ee81d3.nv25.12", "megatron-core": "0.17.0"},
            "megatron-core<0.17,>=0.16, but has 0.17.0",
        ),
        ({"megatron-core": "0.16.0"}, "torch>=2.8, but does not have it"),
    ],
)
def test_an_image_of_another_release_is_refused(image_has: dict[str, str], complaint: str, tmp_path: Path) -> None:
    (tmp_path / "packaging").symlink_to(Path(sysconfig.get_path("purelib")) / "packaging")
    found = metadata.distribution("nemo_eppo")
    own = found.read_text("METADATA") or found.read_text("PKG-INFO")  # the latter in a checkout that was installed from
    described = {name: f"Metadata-Version: 2.1\nName: {name}\nVersion: {v}\n" for name, v in image_has.items()}
    for name, text in {**described, "nemo_eppo": own or ""}.items():
        (tmp_path / f"{name.replace('-', '_')}-0.dist-info").mkdir()
        (tmp_path / f"{name.replace('-', '_')}-0.dist-info" / "METADATA").write_text(text)
    refused = subprocess.run(
        [sys.executable, "-S", ROOT / "docker" / "requirements.py", "missing", "actor"],  # -S: no site-packages
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert refused.returncode == 1
    assert refused.stderr == f"requirements: the image has to bring {complaint}; choose another BASE\n"


@pytest.mark.slow
def test_a_server_in_the_image_is_healthy_until_it_dies(image: Image, models: Models, tmp_path: Path) -> None:
    state, log = tmp_path / "state", tmp_path / "log.txt"
    create(tmp_path / "certificates")
    here: dict[str, object] = {"NEMO_EPPO_STATE": state, "PORT": free_port()}
    here["NEMO_EPPO_CERTIFICATES"] = tmp_path / "certificates"

    def health(**more: object) -> subprocess.CompletedProcess[str]:
        return image.run(image.python, "docker/health.py", check=False, **{**here, **more})

    assert "no job" in health().stdout
    run = tmp_path / "run"
    server = image.start(log, "reward", f"model.restore_from_path={models.rm}", RUN_DIRECTORY=run, **here)
    wait_until(lambda: (state / "job.json").exists(), server, log)
    starting = health()
    assert (starting.returncode, starting.stderr) == (1, "reward: not serving yet\n")
    wait_until(lambda: (state / "ready.json").exists(), server, log)
    assert json.loads((state / "job.json").read_text()) == {"job": "reward", "pid": server.pid, "run": str(run)}
    serving = health()
    assert (serving.returncode, serving.stdout) == (0, "reward: serving, 0 updates\n"), serving.stderr
    create(tmp_path / "others")
    assert "reward: failed to connect" in health(NEMO_EPPO_CERTIFICATES=tmp_path / "others").stderr
    os.kill(json.loads((state / "ready.json").read_text())["pid"], signal.SIGKILL)
    lost = health()
    assert lost.returncode == 1
    assert lost.stderr.startswith("reward: "), lost.stderr
    server.wait(60)
    dead = health()
    assert (dead.returncode, dead.stderr) == (1, f"reward: process {server.pid} has ended\n")


@pytest.mark.slow
def test_an_actor_is_healthy_while_it_writes_metrics(image: Image, tmp_path: Path) -> None:
    state, run = tmp_path / "state", tmp_path / "run"
    state.mkdir()
    run.mkdir()
    (state / "job.json").write_text(json.dumps({"job": "actor", "pid": os.getpid(), "run": str(run)}))

    def health(**more: object) -> subprocess.CompletedProcess[str]:
        return image.run(image.python, "docker/health.py", check=False, NEMO_EPPO_STATE=state, **more)

    assert "starting" in health().stdout
    metrics = run / "metrics.jsonl"
    metrics.write_text('{"step": 1}\n')
    assert health().returncode == 0
    hour_ago = time.time() - 3600
    os.utime(metrics, (hour_ago, hour_ago))
    assert health().returncode == 0
    assert health(HEALTH_MAX_AGE=1800).returncode == 0  # the job has been resumed just now
    os.utime(state / "job.json", (hour_ago, hour_ago))
    stuck = health(HEALTH_MAX_AGE=1800)
    assert stuck.returncode == 1
    assert "more than HEALTH_MAX_AGE = 1800" in stuck.stderr
