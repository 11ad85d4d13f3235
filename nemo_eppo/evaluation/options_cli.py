"""Options of a command that are fields of its settings, which say their types, defaults and meaning."""

import argparse
from functools import partial
from types import NoneType
from typing import Any, get_args

from nemo_eppo.config import Config, kinds_of


def add_options(
    parser: argparse._ActionsContainer, schema: type[Config], *, required: bool = True, **metavars: str | None
) -> None:
    """Add an option for each of these fields; its help is the field's docstring, written as argparse writes its own.

    Args:
        required: whether an option has to be given if its field has no default.
        metavars: by field, what the option's value is called; None for flags and choices.
    """
    for name, metavar in metavars.items():
        field = schema.model_fields[name]
        [kind] = kinds_of(field.annotation) - {NoneType}
        assert field.description, f"{schema.__name__}.{name} has no docstring"
        meaning = field.description[0].lower() + field.description[1:].removesuffix(".")
        add = partial(parser.add_argument, f"--{name.replace('_', '-')}", help=meaning)
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
