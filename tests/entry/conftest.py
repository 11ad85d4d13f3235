"""The script of `count_job`, in a directory of its own."""

from pathlib import Path

import pytest
from count_job import SCRIPT, YAML


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("job")
    (directory / "conf").mkdir()
    (directory / "conf" / "count.yaml").write_text(YAML)
    (directory / "count.py").write_text(SCRIPT)
    return directory / "count.py"
