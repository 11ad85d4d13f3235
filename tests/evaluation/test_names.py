"""Names for several runs or files."""

from pathlib import Path

import pytest

from nemo_eppo.evaluation.arguments import named


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["runs/eta=1/actor", "runs/eta=2/actor"], ["eta=1", "eta=2"]),
        (["a/step_1.jsonl", "a/step_2.jsonl.gz"], ["step_1", "step_2"]),
        (["a/x", "b/x", "b/y"], ["a/x", "b/x", "b/y"]),
        (["a/b/run"], ["run"]),
        (["a", "a/b"], ["a", "a/b"]),
    ],
)
def test_paths_are_told_apart_by_what_they_do_not_share(paths: list[str], names: list[str]) -> None:
    assert list(named([Path(path) for path in paths], [])) == names
