"""Dockerfile and shell scripts pass their linters, which come with `pip install -e .[dev]`."""

import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(
    path
    for room in (".ci", "docker", "examples", "tests")
    for kind in ("sh", "sbatch")
    for path in (ROOT / room).rglob(f"*.{kind}")
)


def lint(tool: str, *files: Path) -> None:
    binary = Path(sysconfig.get_path("scripts")) / tool
    assert binary.exists(), f"{tool} is not installed: pip install -c constraints.txt -e .[dev]"
    done = subprocess.run([binary, *files], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dockerfile_is_clean() -> None:
    lint("hadolint", ROOT / "docker" / "Dockerfile")


def test_the_shell_scripts_are_clean() -> None:
    assert {ROOT / "docker" / "install.sh", ROOT / "tests" / "run.sh"} <= set(SCRIPTS)
    lint("shellcheck", ROOT / ".ci" / "run", *SCRIPTS)


@pytest.mark.parametrize(
    ("tool", "name", "text"),
    [("hadolint", "Dockerfile", "FROM scratch\nRUN cd /tmp\n"), ("shellcheck", "x.sh", "#!/bin/bash\ncd $1\n")],
)
def test_the_linters_do_find_fault(tool: str, name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(AssertionError, match=r"DL3003|SC2086"):
        lint(tool, tmp_path / name)
