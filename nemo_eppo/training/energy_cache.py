"""Answers and energy losses of the reference, kept on disk: deterministic, so each prompt is answered once and for all.

A directory per key (model, tokenizer, generation and energy settings: whatever changes, changes the directory) holds
`key.json` and files of JSON lines. A process appends only to a file of its own, so runs can share the cache, and what a
crash tears is at most the last line of a file, which is not read: those prompts are answered again.
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
        directory: holds all caches.
        key: all that an answer and its energies depend on beside the prompt, as plain containers.
    """

    def __init__(self, directory: Path, key: Mapping[str, Any]) -> None:
        self._key = json.dumps(key, sort_keys=True, indent=1)
        self.directory = directory / hashlib.sha256(self._key.encode()).hexdigest()[:32]
        self._file: Path | None = None

    def load(self) -> dict[bytes, list[float]]:
        """Read everything that is known, as {digest of the prompt: energies}.

        Raises:
            ConfigError: a line other than the last of a file is damaged; names it.
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
        """Write `(prompt, answer, energies)` of new prompts; on disk when this returns."""
        if self._file is None:
            self.directory.mkdir(parents=True, exist_ok=True)
            write_atomically(self.directory / "key.json", self._key)  # for people; the same from every process
            self._file = self.directory / f"{uuid.uuid4().hex}.jsonl"
        with self._file.open("a", encoding="utf-8") as file:
            for prompt, answer, energies in rows:
                row = {"prompt": prompt_digest(prompt).hex(), "energies": energies, "answer": answer}
                file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())


def prompt_digest(prompt: list[int]) -> bytes:
    """Name a prompt by a digest of its token ids."""
    return hashlib.sha256(repr(prompt).encode()).digest()
