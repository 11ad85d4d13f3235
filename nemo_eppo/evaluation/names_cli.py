"""How commands that take several runs or files tell them apart: by `--names`, or by the parts of paths that differ."""

import argparse
from pathlib import Path

from nemo_eppo.config import ConfigError


def add_names(parser: argparse.ArgumentParser, of: str) -> None:
    """Add --names; `of` says what gets a name."""
    parser.add_argument(
        "--names",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"a name for each {of} (default: what its path alone has)",
    )


def named(paths: list[Path], names: list[str]) -> dict[str, Path]:
    """Return the paths by their names: `names`, or the parts of each path that not all have, without ".jsonl".

    Raises:
        ConfigError: there are not as many names as paths, or two are equal.
    """
    chosen = names or _differing(paths)
    if len(chosen) != len(paths):
        raise ConfigError(f"--names: {len(chosen)} names for {len(paths)} paths: {' '.join(map(str, paths))}")
    if twice := [name for name in chosen if chosen.count(name) > 1]:
        raise ConfigError(f"{'--names' if names else 'paths'}: {twice[0]} occurs more than once")
    return dict(zip(chosen, paths, strict=True))


def _differing(paths: list[Path]) -> list[str]:
    every = [[*path.resolve().parts[1:-1], path.resolve().name.split(".jsonl")[0]] for path in paths]
    while len({parts[-1] for parts in every}) == 1 and min(map(len, every)) > 1 and len(every) > 1:
        every = [parts[:-1] for parts in every]
    while len({parts[0] for parts in every}) == 1 and min(map(len, every)) > 1:
        every = [parts[1:] for parts in every]
    return ["/".join(parts) for parts in every]
