"""The environment that the Dockerfile's target tensorrt_llm makes, from wheels that are empty but for their names."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from nemo_eppo.config import ConfigError
from nemo_eppo.generation.trtllm_checks import check_tensorrt_llm
from nemo_eppo.settings.generation import PYTHON, TensorRTLLMConfig
from nemo_eppo.settings.model import ModelConfig, ParallelConfig

ROOT = Path(__file__).parents[2]
MODEL = ModelConfig(
    num_layers=2, hidden_size=8, ffn_hidden_size=8, num_attention_heads=2, vocab_size=9, max_sequence_length=8
)
PACKAGES = {
    "torch": ("2.9.1", "2.10.0"),
    "torchvision": ("0.24.1",),
    "tensorrt_llm": ("1.1.0", "1.2.1", "1.3.0"),
    "ray": ("2.54.0", "2.60.0"),
}


def write_wheel(folder: Path, name: str, version: str) -> None:
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", "")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def test_an_image_of_the_target_has_an_engine_without_a_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, versions in PACKAGES.items():
        for version in versions:
            write_wheel(tmp_path, name, version)
    (tmp_path / "constraint.txt").write_text("torch==2.10.0\n")  # the image's
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONSTRAINT": str(tmp_path / "constraint.txt")}
    done = subprocess.run(
        ["bash", ROOT / "docker" / "install_tensorrt_llm.sh", tmp_path / "made"],
        env={**os.environ, "PYTHON": sys.executable, **offline},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "tensorrt_llm 1.2.1 torch 2.9.1 ray 2.54.0"

    with pytest.raises(ConfigError, match="docker/Dockerfile's target tensorrt_llm does, or use"):
        check_tensorrt_llm(TensorRTLLMConfig(), MODEL, ParallelConfig())
    stage = (ROOT / "docker" / "Dockerfile").read_text().split(" AS tensorrt_llm\n")[1].split("\nFROM ")[0]
    [target] = re.findall(r"install_tensorrt_llm.sh (\S+)", stage)
    [(name, python)] = re.findall(r"^ENV (\w+)=(\S+)$", stage, re.MULTILINE)
    assert (name, python) == (PYTHON, f"{target}/bin/python")
    monkeypatch.setenv(name, python.replace(target, str(tmp_path / "made")))
    check_tensorrt_llm(TensorRTLLMConfig(), MODEL, ParallelConfig())


def test_without_a_target_the_image_is_the_one_without_it() -> None:
    stages = re.findall(r"^FROM (.+)$", (ROOT / "docker" / "Dockerfile").read_text(), re.MULTILINE)
    assert stages == ["${BASE} AS nemo_eppo", "nemo_eppo AS tensorrt_llm", "nemo_eppo"]
