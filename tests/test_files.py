"""Files and directories appear whole or not at all, whatever ends the process that writes them."""

import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nemo_eppo.cli import main
from nemo_eppo.config import ConfigError
from nemo_eppo.files import (
    NotAnObject,
    complete_lines,
    directory_made_whole,
    disk_trouble,
    json_object,
    replacing,
    write_atomically,
)


def test_a_directory_gets_everything_or_nothing(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"

    def write(name: str, error: BaseException | None) -> None:
        with directory_made_whole(target) as directory:
            (directory / "sub").mkdir()
            (directory / name).write_text("x")
            assert not (target / name).exists()
            if error:
                raise error

    with pytest.raises(RuntimeError, match="stop"):
        write("half", RuntimeError("stop"))
    assert list(tmp_path.iterdir()) == [], "the parents that were made for it"
    target.mkdir(parents=True)  # an empty directory of that name is as good as none
    with pytest.raises(KeyboardInterrupt):
        write("half", KeyboardInterrupt())
    assert list(target.iterdir()) == []
    assert list(target.parent.iterdir()) == [target]
    write("whole", None)
    assert {entry.name for entry in target.iterdir()} == {"sub", "whole"}
    assert list(target.parent.iterdir()) == [target]


def test_a_directory_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(ConfigError, match="not empty"), directory_made_whole(tmp_path):
        pass
    with pytest.raises(ConfigError, match="mine"), directory_made_whole(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine").read_text() == "precious"


def test_a_directory_that_appears_meanwhile_is_not_overwritten_either(tmp_path: Path) -> None:
    target = tmp_path / "out"

    def write_meanwhile() -> None:
        with directory_made_whole(target) as directory:
            (directory / "late").write_text("x")
            target.mkdir()
            (target / "first").write_text("precious")

    with pytest.raises(OSError, match="not empty"):
        write_meanwhile()
    assert [entry.name for entry in target.iterdir()] == ["first"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_mount_point_is_refused_before_anything_is_written() -> None:
    with pytest.raises(ConfigError, match="'/proc' is a mount point"), directory_made_whole(Path("/proc")):
        pass


def test_a_symbolic_link_to_an_empty_directory_is_filled_where_it_points(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    with directory_made_whole(tmp_path / "out") as directory:
        (directory / "new").write_text("x")
    assert (tmp_path / "out").is_symlink()
    assert [entry.name for entry in (tmp_path / "disk").iterdir()] == ["new"]


def test_a_new_run_takes_over_after_a_killed_one(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from nemo_eppo.files import directory_made_whole\n"
        "with directory_made_whole(Path(sys.argv[1])) as directory:\n"
        "    (directory / 'stale').write_text('x')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    for name in ("out", "out.v2"):
        run = subprocess.run([sys.executable, "-c", script, str(tmp_path / name)], check=False)
        assert run.returncode == -signal.SIGKILL
    left = {path for path in tmp_path.iterdir() if path.name.startswith(".out.v2.")}
    assert len(list(tmp_path.iterdir())) == 2
    with directory_made_whole(tmp_path / "out") as directory:
        (directory / "new").write_text("x")
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["new"]
    assert set(tmp_path.iterdir()) == {tmp_path / "out", *left}, "what is left of another output is not ours to remove"


def test_a_file_that_cannot_be_written_keeps_its_old_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new" * 100_000 + "\ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_is_moved_in_one_step(tmp_path: Path) -> None:
    def point(name: str, interrupt: bool = False) -> None:
        with replacing(tmp_path / "best") as link:
            link.symlink_to(name)
            if interrupt:
                raise KeyboardInterrupt

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        point(name)
        assert os.readlink(tmp_path / "best") == name
    with pytest.raises(KeyboardInterrupt):
        point("a", interrupt=True)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "best"}
    assert (tmp_path / "a").is_dir()
    assert os.readlink(tmp_path / "best") == "b"


def test_a_line_without_its_newline_is_not_complete(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    for content, lines in (
        (b"", []),
        (b"torn", []),
        (b"a\nto", [b"a"]),
        (b"a\n\nb\r\n", [b"a", b"", b"b\r"]),
        ("one\u2028line\n".encode(), ["one\u2028line".encode()]),
    ):
        path.write_bytes(content)
        assert complete_lines(path) == lines


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1, "b": 2, "a": 1}', "field 'a' occurs more than once"),
        ('{"rows": [{"b": {"c": 1, "c": 2}}]}', "field 'c' occurs more than once"),
        ('{"\\u0061": 1, "a": 2}', "field 'a' occurs more than once"),
        ("{'a': 1}", "not JSON"),
        ('{"a": 1} {}', "not JSON"),
        (b'{"a": "caf\xe9"}', "not JSON"),
        ("[]", "not a JSON object"),
        ("null", "not a JSON object"),
    ],
)
def test_only_an_object_with_every_key_once_is_a_row(text: str | bytes, reason: str) -> None:
    with pytest.raises(NotAnObject) as refused:
        json_object(text)
    assert refused.value.reason == reason
    assert str(refused.value).startswith(reason)


def test_an_object_is_what_it_says() -> None:
    assert json_object(b' {"a": {"x": [1.5, null]}, "b": {"x": "\xc3\xbc"}}\n') == {
        "a": {"x": [1.5, None]},
        "b": {"x": "ü"},
    }


@contextmanager
def files_stay_below(size: int) -> Iterator[None]:
    """Refuse to let a file grow beyond `size` bytes; to Python that is what a full disk is, and needs no root."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(bytes(100_000)),
        lambda path: torch.save(torch.zeros(100_000), path),
        lambda path: save_file({"a": torch.zeros(100_000)}, path),
    ],
    ids=["Python", "torch", "safetensors"],
)
def test_a_write_that_the_disk_refuses_names_the_file_whoever_writes(
    write: Callable[[Path], None], tmp_path: Path
) -> None:
    with pytest.raises(OSError) as caught, files_stay_below(10_000), replacing(tmp_path / "new") as temporary:
        write(temporary)
    assert caught.value.errno == errno.EFBIG
    told = disk_trouble(caught.value, None)
    assert told is not None
    assert told.startswith(f"{tmp_path / 'new'}: File too large; raise the limit on the size of files (ulimit -f)")
    assert list(tmp_path.iterdir()) == []


def test_errors_that_are_not_the_disk_s_stay_as_they_are(tmp_path: Path) -> None:
    for error in (ValueError("wrong"), FileNotFoundError(errno.ENOENT, "none", "input.jsonl")):
        with pytest.raises(type(error)) as caught, replacing(tmp_path / "new"):
            raise error
        assert caught.value is error
    assert disk_trouble(FileNotFoundError(errno.ENOENT, "none", "input.jsonl"), tmp_path) is None
    assert disk_trouble(OSError(errno.ENOSPC, "full"), None) is None


def test_a_command_names_the_output_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "data"
    with files_stay_below(1_000):
        assert main(["prepare", "noun-task", "--output", str(output)]) == 2
    assert capsys.readouterr().err.startswith(f"nemo-eppo: error: {output}: File too large; raise the limit")
    assert list(tmp_path.iterdir()) == []
