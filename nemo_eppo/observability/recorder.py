"""Records the responses of the policy and every part of their rewards, one file per step."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_eppo.files import json_row, write_atomically


def record(directory: Path, step: int, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write the samples of one step to `<directory>/step_000123.jsonl` and return the file; only on global rank 0.

    A file that an interrupted run left is replaced.

    Args:
        directory: for instance `<run>/rollouts` or `<run>/validation`; it is made if it does not exist.
        step: the PPO step; 0 is before training.
        rows: for each sample, its columns, such as prompt, response, proxy_reward and energy_loss, with values that
            JSON knows: str, int, float, bool, None, lists and dicts of them.

    Raises:
        ValueError: a value is of another type, NaN or infinite. The message names step, row and column.
    """
    lines = [_line(step, number, row) for number, row in enumerate(rows)]
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"step_{step:06d}.jsonl"
    write_atomically(path, "".join(lines))
    return path


def _line(step: int, number: int, row: Mapping[str, Any]) -> str:
    try:
        return json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n"
    except (ValueError, TypeError):
        for name, value in row.items():
            try:
                json.dumps(value, allow_nan=False)
            except (ValueError, TypeError) as error:
                where = f"step {step}, row {number}, column {name!r}"
                raise ValueError(f"{where} cannot be recorded: {error}: {value!r}") from None
        raise


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of one recorded step.

    Raises:
        ConfigError: a line is not one JSON object; the message names file and line.
    """
    lines = enumerate(path.read_bytes().split(b"\n"), start=1)
    return [json_row(line, f"{path}:{number}") for number, line in lines if line]


def recorded_steps(directory: Path) -> dict[int, Path]:
    """Find the recorded steps in a directory: each step's number and its file, in ascending order."""
    return dict(sorted((int(path.stem.removeprefix("step_")), path) for path in directory.glob("step_*.jsonl")))
