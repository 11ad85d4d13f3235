"""Typed configuration: every key of every YAML file is declared, and a bad one is reported by its full path."""

import difflib
import importlib
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator


class ConfigError(ValueError):
    """A setting, file or combination of settings that cannot work; the message says which, and what was expected."""


class RunError(RuntimeError):
    """Something that a run needs, such as a server, failed; users are shown the message without a stack trace."""

    elsewhere = False
    """Whether it failed on another rank, which reports it too."""


class RunStopped(RunError):
    """A run saved and ended before its last step, by a signal or its time limit; the same command resumes it.

    The exit status is NOT_FINISHED, so that jobs that wait for the finished run do not start.
    """


NOT_FINISHED = os.EX_TEMPFAIL


def flat(node: Any, path: str = "", *, lists: bool = False) -> Iterator[tuple[str, Any]]:
    """Yield every value of nested settings with its dotted key.

    Args:
        lists: whether to descend into lists of sections, after yielding the length of each.
    """
    if lists and isinstance(node, list) and any(isinstance(item, Mapping) for item in node):
        yield path, f"a list of {len(node)}"
        node = dict(enumerate(node))
    if isinstance(node, Mapping) and (node or not path):
        for name, value in node.items():
            yield from flat(value, f"{path}.{name}" if path else str(name), lists=lists)
    else:
        yield path, node


def value_at(settings: Mapping[str, Any] | None, key: str) -> Any:
    """Return the value of a dotted key of nested settings; None if it is not set."""
    value: Any = settings
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


class Config(BaseModel):
    """Base of all settings. The docstring below a field describes it; unknown keys are errors."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        validate_default=True,
        allow_inf_nan=False,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_coercion(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse values that pydantic would coerce: true to 1, an empty path to the working directory."""
        kinds = kinds_of(cls.model_fields[str(info.field_name)].annotation)
        if isinstance(value, bool) and bool not in kinds and kinds & {int, float}:
            raise ValueError("expected a number")
        if value == "" and Path in kinds and str not in kinds:
            raise ValueError("expected a path")
        return value


def kinds_of(annotation: Any) -> set[Any]:
    """Return the types in a field's annotation, without those of a list's items."""
    if get_origin(annotation) in (Union, UnionType):
        return {kind for member in get_args(annotation) for kind in kinds_of(member)}
    if get_origin(annotation) is Annotated:
        return kinds_of(get_args(annotation)[0])
    return {annotation}


ConfigT = TypeVar("ConfigT", bound=Config)
ClassT = TypeVar("ClassT")


def load_config(schema: type[ConfigT], values: Mapping[str, Any], *, gpus: bool | None = None) -> ConfigT:
    """Check `values` (plain nested containers) against `schema`.

    Args:
        gpus: whether the job runs on GPUs, where some nulls stand for other values; None to look at this machine.

    Raises:
        ConfigError: one line per bad key: its dotted path, its value, what was expected, and the closest known key.
    """
    try:
        return schema.model_validate(dict(values), context={"gpus": gpus})
    except ValidationError as error:
        issues = error.errors(include_url=False)
        # pydantic calls a list with a wrong item too short as well
        outer = {issue["loc"][:depth] for issue in issues for depth in range(len(issue["loc"]))}
        shown = [issue for issue in issues if issue["type"] != "too_short" or issue["loc"] not in outer]
        lines = [_describe(schema, issue) for issue in shown]
        raise ConfigError("invalid configuration:\n" + "\n".join(f"  - {line}" for line in lines)) from None


def _describe(schema: type[Config], issue: Any) -> str:
    path = ".".join(str(part) for part in issue["loc"])
    if issue["type"] == "extra_forbidden":
        owner: Any = schema
        for part in issue["loc"][:-1]:  # parts that are no fields are positions in a list of sections, or their names
            if (field := owner.model_fields.get(part)) is not None:
                owner = next(iter(config_types(field.annotation)), owner)
        known = list(getattr(owner, "model_fields", {}))
        close = difflib.get_close_matches(str(issue["loc"][-1]), known, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"known keys: {', '.join(known)}"
        return f"{path}: unknown key ({hint})"
    if issue["type"] == "missing":
        return f"{path}: required, but not set"
    where = path or "settings do not fit together"
    if path and not isinstance(issue["input"], Mapping):  # for a section, the message names the values
        where += f" = {issue['input']!r}"
    message = issue["msg"].removeprefix("Value error, ").replace("valid tuple", "valid list").replace("Tuple", "List")
    return f"{where}: {message}"


def config_types(annotation: Any) -> list[type[Config]]:
    """Return the Config classes in a field's annotation."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    return [t for arg in getattr(annotation, "__args__", ()) for t in config_types(arg)]


def read_yaml(path: Path) -> Any:
    """Read a YAML file; ConfigError, which names the line, if it is not YAML (see `yaml_fault`)."""
    try:
        with path.open(encoding="utf-8") as file:  # an open file: errors then have its name and lines
            return yaml.safe_load(file)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(yaml_fault(error, path)) from None


def yaml_fault(error: yaml.YAMLError | UnicodeDecodeError, file: Path) -> str:
    """Return one line on an error in a YAML file: the file, the number and text of the line, and the error.

    Args:
        file: the file that was read; the error may be in another one that it includes.
    """
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if mark is not None and Path(mark.name).is_file():
        lines = Path(mark.name).read_text(encoding="utf-8").splitlines()[: mark.line + 1]
        while lines and not lines[-1].strip():  # at the end of the file, show the last line with text
            lines.pop()
        return f"{mark.name}:{len(lines)}: {getattr(error, 'problem', error)}: {''.join(lines[-1:])!r}"
    return f"{file}: {' '.join(str(error).split())}"


def load_subclass(key: str, path: str, base: type[ClassT]) -> type[ClassT]:
    """Import the user's subclass "module:Class" of `base`.

    Raises:
        ConfigError: there is none, or it is no such class; the message has the config key.
    """
    value = load_named(key, path, "module:Class")
    if not (isinstance(value, type) and issubclass(value, base)):
        raise ConfigError(f"{key} = {path!r} is no subclass of {base.__module__}.{base.__qualname__}")
    return value


def load_named(key: str, path: str, form: str) -> Any:
    """Import the object "module:name", from the working directory too.

    Raises:
        ConfigError: there is none; the message has the config key and the expected form.
    """
    module, _, name = path.partition(":")
    if (here := os.getcwd()) not in sys.path:  # a script's path has the script's own directory instead
        sys.path.append(here)
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError, TypeError) as error:  # TypeError: a path that begins with a dot
        raise ConfigError(f"{key} = {path!r}: expected '{form}' ({error})") from None
    except (Exception, SystemExit) as error:
        cause = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{key} = {path!r}: {module} cannot be imported ({cause})") from None
