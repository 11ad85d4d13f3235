"""The READMEs keep up with the code: rooms name all their files, links lead somewhere, the front page is one page."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("nemo_eppo", "conf", "examples", "docker")
READMES = [ROOT / "README.md", *sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("README.md"))]
ROOMS = sorted(path.parent for path in (ROOT / "nemo_eppo").glob("*/__init__.py"))


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_a_room_s_readme_names_every_file(room: Path) -> None:
    named = set(re.findall(r"`([a-z0-9_]+\.py)`", (room / "README.md").read_text()))
    assert {path.name for path in room.glob("*.py")} - {"__init__.py"} <= named


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(readme: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", readme.read_text()):
        assert (readme.parent / link).exists(), link


def test_every_method_is_on_the_front_page() -> None:
    text = (ROOT / "README.md").read_text()
    table = text.split("## Methods")[1].split("\n## ")[0]
    assert {path.stem for path in (ROOT / "conf" / "method").glob("*.yaml")} <= set(re.findall(r"`(\w+)`", table))
    assert text.count("\n") <= 120
