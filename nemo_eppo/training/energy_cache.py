"""A cache on disk of the reference's answers and energy losses, which are deterministic: each prompt is answered once.

Each key (model, tokenizer, generation and energy settings) has a directory of its own with `key.json` and files of JSON
lines. A process appends only to its own file, so runs can share the cache. A crash damages at most the last line of a
file, which is then not read: its prompt is answered again.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_eppo.config import ConfigError
from nemo_eppo.files import complete_lines, json_object, write_atomically


class EnergyCache:
    """Mean energy losses [E] of the reference's own answers, by prompt. Used by one process, rank 0.

    Args:
        directory: folder of the caches of all keys.
        key: everything but the prompt that an answer and its energies depend on, as plain containers.
    """

    def __init__(self, directory: Path, key: Mapping[str, Any]) -> None:
        self._key = json.dumps(key, sort_keys=True, indent=1)
        self.directory = directory / hashlib.sha256(self._key.encode()).hexdigest()[:32]
        self._file: Path | None = None

    def load(self) -> dict[bytes, list[float]]:
        """Read all entries as {digest of the prompt: energies}.

        Raises:
            ConfigError: a line other than the last of a file is damaged; the message names it.
        """
        known: dict[bytes, list[float]] = {}
        for path in sorted(self.directory.glob("*.jsonl")):
            lines = complete_lines(path)
            for number, line in enumerate(lines, start=1):
                try:
                    row = json_object(line)
                    known[bytes.fromhex(row["prompt"])] = [float(energy) for energy in row["energies"]]
                except (ValueError, KeyError, TypeError) as error:
                    if number < len(lines):
                        raise ConfigError(f"{path}, line {number} is damaged ({error}); remove the file") from None
        return known

    def append(self, rows: list[tuple[list[int], list[int], list[float]]]) -> None:
        """Write `(prompt, answer, energies)` of new prompts; they are on disk when this returns."""
        if self._file is None:
            self.directory.mkdir(parents=True, exist_ok=True)
            write_atomically(self.directory / "key.json", self._key)  # for people; every process writes the same
            self._file = self.directory / f"{uuid.uuid4().hex}.jsonl"
        with self._file.open("a", encoding="utf-8") as file:
            for prompt, answer, energies in rows:
                row = {"prompt": prompt_digest(prompt).hex(), "energies": energies, "answer": answer}
                file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())


def prompt_digest(prompt: list[int]) -> bytes:
    """Return a digest of a prompt's token ids."""
    return hashlib.sha256(repr(prompt).encode()).digest()
