"""A .jsonl file that a command writes row by row, and resumes when it is started again."""

import fcntl
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from nemo_eppo.config import ConfigError
from nemo_eppo.files import complete_lines, json_row, write_json


def parts_folder(output: Path, what: str) -> Path:
    """Return the folder in a command's output directory for the rows of each phase, from which it resumes.

    Raises:
        ConfigError: the directory holds other files; `what` names the expected content in the message.
    """
    parts = output / "parts"
    if output.exists() and not parts.is_dir() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output: {output} holds something else than {what}; choose another")
    return parts


_locked: dict[Path, BinaryIO] = {}  # files that this process has locked


class RowsFile:
    """The output of a command. The settings that its rows depend on are in a file beside it.

    Creating it reads the rows of an interrupted run and writes nothing; call `begin` before the first `append`.

    Args:
        command: name of the command, for messages.
        settings: settings that the rows depend on, as JSON, with digests of model and data.

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
        """Number of complete rows of an interrupted run."""
        return len(self._complete)

    def rows(self) -> list[dict[str, Any]]:
        """Read the complete rows of an interrupted run; ConfigError if one is damaged."""
        try:
            return [json_row(line, f"{self.path}:{number}") for number, line in enumerate(self._complete, start=1)]
        except ConfigError as error:
            raise ConfigError(f"--output: {error}; remove the file or choose another") from None

    def begin(self) -> None:
        """Create the file, or cut off an incomplete last row, and lock it for this process.

        Raises:
            ConfigError: another process writes the file, or has done so since this object was created.
        """
        write_json(self._settings_file, self._settings)
        if earlier := _locked.pop(self.path, None):  # by a command that failed in this process
            earlier.close()
        file = _locked[self.path] = self.path.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"--output: {self.path} is being written by another process") from None
        except OSError:  # a file system without locks
            pass
        if complete_lines(self.path) != self._complete:
            raise ConfigError(f"--output: {self.path} has grown meanwhile: start the command again")
        file.truncate(sum(len(line) + 1 for line in self._complete))

    def append(self, lines: Iterable[str]) -> None:
        """Write rows, each a line of JSON that ends with a newline."""
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(lines)
