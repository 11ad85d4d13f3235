"""Arguments that several commands share: options made of the fields of their settings, names of several files or runs,
and, for commands that run a model, precision, layout and a process for each rank."""

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from nemo_eppo.config import Config, ConfigError, ConfigT, kinds_of, load_config
from nemo_eppo.entry.torchrun import end_with_torchrun
from nemo_eppo.settings.evaluation import ModelRunConfig


def add_options(
    parser: argparse._ActionsContainer, schema: type[Config], *, required: bool = True, **metavars: str | None
) -> None:
    """Add an option for each of these fields; its help is the field's docstring, in argparse's style.

    Args:
        required: whether an option has to be given if its field has no default.
        metavars: name of the option's value in the help, by field; None for flags and choices.
    """
    for name, metavar in metavars.items():
        field = schema.model_fields[name]
        [kind] = kinds_of(field.annotation) - {NoneType}
        assert field.description, f"{schema.__name__}.{name} has no docstring"
        text = field.description[0].lower() + field.description[1:].removesuffix(".")
        add = partial(parser.add_argument, f"--{name.replace('_', '-')}", help=text)
        if kind is bool:
            add(action="store_true")
        elif choices := get_args(kind):
            add(choices=choices, default=field.default)
        elif field.is_required():
            add(type=kind, metavar=metavar, required=required)
        else:
            add(type=kind, metavar=metavar, default=field.default)


def chosen(arguments: argparse.Namespace, schema: type[Config]) -> dict[str, Any]:
    """Return the values of the options that are fields of `schema`."""
    return {name: getattr(arguments, name) for name in schema.model_fields if name in arguments}


def add_names(parser: argparse.ArgumentParser, of: str) -> None:
    """Add --names; `of` is the metavar of the argument whose values get names."""
    parser.add_argument(
        "--names",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"a name for each {of} (default: the part of its path that differs)",
    )


def named(paths: list[Path], names: list[str]) -> dict[str, Path]:
    """Return the paths by their names: `names`, or the parts of each path that differ, without ".jsonl".

    Raises:
        ConfigError: there are not as many names as paths, or two are equal.
    """
    chosen = names or _differing_parts(paths)
    if len(chosen) != len(paths):
        raise ConfigError(f"--names: {len(chosen)} names for {len(paths)} paths: {' '.join(map(str, paths))}")
    if twice := [(name, path) for name, path in zip(chosen, paths, strict=True) if chosen.count(name) > 1]:
        name, path = twice[0]
        raise ConfigError(f"--names: {name} occurs more than once" if names else f"{path} is given more than once")
    return dict(zip(chosen, paths, strict=True))


def _differing_parts(paths: list[Path]) -> list[str]:
    """Return each path without its first and last parts that are the same in all."""
    split = [[*path.resolve().parts[1:-1], path.resolve().name.split(".jsonl")[0]] for path in paths]
    while len({parts[-1] for parts in split}) == 1 and min(map(len, split)) > 1 and len(split) > 1:
        split = [parts[:-1] for parts in split]
    while len({parts[0] for parts in split}) == 1 and min(map(len, split)) > 1:
        split = [parts[1:] for parts in split]
    return ["/".join(parts) for parts in split]


def add_model_arguments(parser: argparse.ArgumentParser, schema: type[ModelRunConfig]) -> None:
    """Add --chat-template, --precision, --batch-size, --tp and --pp."""
    add_options(parser, schema, chat_template=None, precision=None, batch_size="N")
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="number of tensor-parallel processes")
    parser.add_argument(
        "--pp",
        type=int,
        default=1,
        metavar="N",
        help="number of pipeline-parallel processes; with more than tp x pp processes, as by `torchrun "
        "--nproc_per_node N -m nemo_eppo.cli COMMAND ...`, replicas of the model share the rows",
    )


def model_config(arguments: argparse.Namespace, schema: type[ConfigT], **others: Any) -> ConfigT:
    """Return the settings of a command that runs a model, checked: its options and `others`.

    From now on, a process that torchrun started ends with torchrun.
    """
    end_with_torchrun()
    layout = {"tensor_model_parallel_size": arguments.tp, "pipeline_model_parallel_size": arguments.pp}
    return load_config(schema, chosen(arguments, schema) | {"parallel": layout} | others)


def run_on_ranks(arguments: argparse.Namespace, run: Callable[[], None]) -> bool:
    """Run a checked job; with --tp or --pp, replace this process by torchrun, which starts the command on all ranks.

    Returns:
        whether this is rank 0, which reports to the user.
    """
    from nemo_eppo.megatron import runtime

    ranks = arguments.tp * arguments.pp
    if ranks > 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        threads = max(1, (os.cpu_count() or 1) // ranks)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        torchrun = ["-m", "nemo_eppo.entry.torchrun", "--nproc_per_node", str(ranks)]
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *torchrun, "-m", "nemo_eppo.cli", *arguments.command_line])
    try:
        run()
    finally:
        runtime.shutdown()
    return os.environ.get("RANK", "0") == "0"
