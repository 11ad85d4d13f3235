"""A .jsonl file that a command writes row by row, and goes on with when it is started again."""

import fcntl
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from nemo_eppo.config import ConfigError
from nemo_eppo.files import complete_lines, json_row, write_json


def parts_folder(output: Path, what: str) -> Path:
    """Return the folder in a command's output directory that holds the rows of each phase, which it goes on with.

    Raises:
        ConfigError: the directory holds something else than `what`.
    """
    parts = output / "parts"
    if output.exists() and not parts.is_dir() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output: {output} holds something else than {what}; choose another")
    return parts


_held: dict[Path, BinaryIO] = {}  # files that this process has locked


class RowsFile:
    """The output of a command; beside it lie the settings that its rows belong to.

    Creating it reads what an interrupted run left and writes nothing; `begin` is called before the first `append`.

    Args:
        command: name of the command, for messages.
        settings: what the rows depend on, as JSON; another model under the same name is another setting.

    Raises:
        ConfigError: the file is of another command, or holds rows of other settings.
    """

    def __init__(self, path: Path, command: str, settings: Mapping[str, Any]) -> None:
        if not path.name or path.suffix == ".gz":
            raise ConfigError(f"--output: {path}: expected the name of a file, which is not compressed")
        self.path = path
        self._settings = settings
        self._settings_file = path.with_name(path.name + ".settings.json")
        self._complete: list[bytes] = []
        if path.exists():
            if not self._settings_file.is_file():
                raise ConfigError(
                    f"--output: {path} exists, but nemo-eppo {command} did not write it (there is no "
                    f"{self._settings_file.name}); choose another or remove it"
                )
            earlier = json.loads(self._settings_file.read_text())
            if different := [name for name, value in settings.items() if earlier.get(name) != value]:
                raise ConfigError(
                    f"--output: {path} holds rows of another {', '.join(different)} (see {self._settings_file.name}); "
                    "choose another or remove it"
                )
            self._complete = complete_lines(path)
        elif not path.parent.is_dir():
            raise ConfigError(f"--output: {path.parent} is not a directory")

    @property
    def done(self) -> int:
        """How many complete rows an interrupted run left."""
        return len(self._complete)

    def rows(self) -> list[dict[str, Any]]:
        """Read the complete rows that an interrupted run left; ConfigError if one is damaged."""
        try:
            return [json_row(line, f"{self.path}:{number}") for number, line in enumerate(self._complete, start=1)]
        except ConfigError as error:
            raise ConfigError(f"--output: {error}; remove the file or choose another") from None

    def begin(self) -> None:
        """Make the file, or cut off a last row that is not complete, and keep others from writing to it.

        Raises:
            ConfigError: another process writes it, or has done so since this object was made.
        """
        write_json(self._settings_file, self._settings)
        if earlier := _held.pop(self.path, None):  # of a command that failed, called from the same program
            earlier.close()
        held = _held[self.path] = self.path.open("ab")
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"--output: {self.path} is being written by another process") from None
        except OSError:  # a file system without locks
            pass
        if complete_lines(self.path) != self._complete:
            raise ConfigError(f"--output: {self.path} has grown meanwhile: start the command again")
        held.truncate(sum(len(line) + 1 for line in self._complete))

    def append(self, lines: Iterable[str]) -> None:
        """Write rows, each a line of JSON with its end."""
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(lines)
