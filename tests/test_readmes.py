"""The READMEs keep up with the code: rooms name all their files, links lead somewhere, the front page is one page."""

import argparse
import json
import re
import shlex
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import chain
from pathlib import Path

import pytest

from nemo_eppo.cli import _parser
from nemo_eppo.config import load_config, load_named
from nemo_eppo.monitor.monitor import HackingMonitor
from nemo_eppo.rewards.sample import Sample
from nemo_eppo.rewards.shaping import build_terms
from nemo_eppo.settings.monitor import MonitorConfig
from nemo_eppo.settings.shaping import ShapingConfig

ROOT = Path(__file__).parents[1]
FOLDERS = ("nemo_eppo", "conf", "examples", "docker")
READMES = [ROOT / "README.md", *sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("README.md"))]
NONE = {"action": "none"}
ROOMS = sorted(path.parent for path in (ROOT / "nemo_eppo").glob("*/__init__.py"))


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_a_room_s_readme_names_every_file(room: Path) -> None:
    named = set(re.findall(r"`([a-z0-9_]+\.py)`", (room / "README.md").read_text()))
    assert {path.name for path in room.glob("*.py")} - {"__init__.py"} <= named


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(readme: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", readme.read_text()):
        assert (readme.parent / link).exists(), link


def check_commands(text: str) -> int:
    """Parse the commands that are written in a text, which need not start a line; return how many there are."""
    lines = (line.strip() for line in text.replace("\\\n", " ").splitlines())
    commands = [line for line in lines if line.startswith("nemo-eppo ")]
    for command in commands:
        words = shlex.split(command, comments=True)
        ends = [index for index, word in enumerate(words) if word in ("&&", "|", "&", ";")]
        arguments, rest = _parser().parse_known_args(words[1 : min(ends, default=len(words))])
        assert "overrides" in arguments or not rest, command
        assert all("=" in word and word[0] != "-" for word in [*rest, *getattr(arguments, "overrides", [])]), command
    return len(commands)


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_have_the_options_that_are_written(readme: Path) -> None:
    check_commands("\n".join(re.findall(r"```bash\n(.*?)```", readme.read_text(), flags=re.DOTALL)))


def commands_below(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    groups = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for command in chain.from_iterable(group.values() for group in groups):
        yield command
        yield from commands_below(command)


def test_every_command_s_help_has_an_example_with_options_that_exist() -> None:
    for command in commands_below(_parser()):
        examples = command.epilog or ""
        assert check_commands(examples), command.prog
        assert f"{command.prog} " in examples


def test_every_method_is_on_the_front_page() -> None:
    text = (ROOT / "README.md").read_text()
    table = text.split("## Methods")[1].split("\n## ")[0]
    assert {path.stem for path in (ROOT / "conf" / "method").glob("*.yaml")} <= set(re.findall(r"`(\w+)`", table))
    assert text.count("\n") <= 120


def test_code_of_one_s_own_runs_as_it_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for room in ("rewards", "monitor"):
        blocks = re.findall(
            r"```python\n# (my_\w+\.py)[^\n]*\n(.*?)```", (ROOT / "nemo_eppo" / room / "README.md").read_text(), re.S
        )
        assert blocks
        for file, code in blocks:
            (tmp_path / file).write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))

    class Scorer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"score": len(asked["response"])}).encode())

    sample = Sample(prompt="1 + 2 =", response=" 3", token_ids=(5,), finished=True, fields={"answer": "3"})
    with HTTPServer(("127.0.0.1", 0), Scorer) as server, ThreadPoolExecutor(1) as pool:
        monkeypatch.setenv("SCORER", f"http://127.0.0.1:{server.server_port}/")
        pool.submit(server.handle_request)
        assert load_named("rewards", "my_endpoint:score", "module:function")(sample) == 2
    assert load_named("rewards", "my_rewards:exact", "module:function")(sample) == 1

    brief = {"name": "brief", "term": "my_terms:Brief", "after": "length_penalty", "settings": {"longest": 200}}
    assert "brief" in build_terms(load_config(ShapingConfig, {"terms": [brief]}))

    own = {"name": "entropy", "indicator": "my_signs:EntropyFall", "threshold": 4, "patience": 1, "action": "stop"}
    monitor = load_config(MonitorConfig, {"indicators": [own], "warmup_steps": 2, "energy": NONE, "length": NONE})
    watch = HackingMonitor(monitor)
    alarms = [watch.observe(step, {"rollout/entropy": entropy}).alarms for step, entropy in enumerate((2.0, 2.1, 0.5))]
    assert [len(raised) for raised in alarms] == [0, 0, 1]
    assert monitor.may_stop
