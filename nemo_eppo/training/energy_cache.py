"""A cache on disk of the reference's answers and energy losses, which are deterministic: each prompt is answered once.

Each key (model, tokenizer, generation and energy settings) has a directory of its own with `key.json` and files of JSON
lines. A process appends only to its own file, so jobs can share the cache while all of them run. A crash damages at
most the last line of a file, which is then not read: its prompt is answered again.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_eppo.config import ConfigError, flat
from nemo_eppo.files import json_line, json_object, write_atomically
from nemo_eppo.settings.ppo import AnsweringConfig
from nemo_eppo.training.setup import Plan


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
        self._read: dict[Path, tuple[int, int]] = {}  # bytes and lines read of each file

    def load(self) -> dict[bytes, list[float]]:
        """Return entries that other processes added since the last call, as {digest of the prompt: energies}.

        Raises:
            ConfigError: a line other than the last of a file is damaged; the message names it.
        """
        known: dict[bytes, list[float]] = {}
        for path in sorted(set(self.directory.glob("*.jsonl")) - {self._file}):
            offset, number = self._read.get(path, (0, 0))
            with path.open("rb") as file:
                file.seek(offset)
                lines = file.read().split(b"\n")[:-1]  # text after the last newline is torn or still being written
            last = number + len(lines)
            for line in lines:
                try:
                    row = json_object(line)
                    known[bytes.fromhex(row["prompt"])] = [float(energy) for energy in row["energies"]]
                except (ValueError, KeyError, TypeError) as error:
                    if number + 1 == last:
                        break
                    raise ConfigError(f"{path}, line {number + 1} is damaged ({error}); remove the file") from None
                offset, number = offset + len(line) + 1, number + 1
            self._read[path] = offset, number
        return known

    def others(self) -> dict[str, list[str]]:
        """Return how the keys of the folder's other caches differ from this cache's key, by directory name."""
        own, differences = dict(flat(json.loads(self._key))), {}
        for file in self.directory.parent.glob("*/key.json"):
            there = dict(flat(json.loads(file.read_text())))
            if differing := sorted(name for name in own | there if own.get(name) != there.get(name)):
                texts = (f"{name} = {there.get(name)!r}, here {own.get(name)!r}" for name in differing)
                differences[file.parent.name] = list(texts)
        return differences

    def append(self, rows: list[tuple[list[int], list[int], list[float]]]) -> None:
        """Write `(prompt, answer, energies)` of new prompts; they are on disk when this returns."""
        if self._file is None:
            self.directory.mkdir(parents=True, exist_ok=True)
            write_atomically(self.directory / "key.json", self._key)  # for people; every process writes the same
            self._file = self.directory / f"{uuid.uuid4().hex}.jsonl"
        with self._file.open("a", encoding="utf-8") as file:
            for prompt, answer, energies in rows:
                row = {"prompt": prompt_digest(prompt).hex(), "energies": energies, "answer": answer}
                file.write(json_line(row))
            file.flush()
            os.fsync(file.fileno())


def energy_cache(planned: Plan, config: AnsweringConfig, run_directory: Path) -> EnergyCache | None:
    """Return the cache that the settings name; None for fresh weights, which nothing identifies."""
    if planned.source is None:
        return None
    key = {
        "model": planned.identity(),
        "tokenizer": planned.tokenizer.digest,
        **config.answer_settings,
    }
    return EnergyCache(config.energy.cache or run_directory / "energy_cache", key)


def prompt_digest(prompt: list[int]) -> bytes:
    """Return a digest of a prompt's token ids."""
    return hashlib.sha256(repr(prompt).encode()).digest()
