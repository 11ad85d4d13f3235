"""The kinds of rules for a key of NeMo-Aligner, and the state of a conversion. The rules are in aligner_keys.py."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nemo_eppo.config import ConfigError

REQUIRED = "???"
"""OmegaConf's mark for a value that has to be set."""


@dataclass(frozen=True)
class Rule:
    """How a key is translated. Without `target` it has no counterpart; `note` gives the reason, or the difference."""

    target: str = ""
    """Our key, or several separated by commas; if the key is joint, it is only shown in the report."""
    note: str = ""
    convert: Callable[[Any], Any] | None = None
    """Turns the key's value into ours; raises ValueError if that is impossible."""
    default: Any = None
    """The value that the key has in NeMo-Aligner if a file does not set it."""
    harmless: tuple[Any, ...] | None = None
    """If the key has no counterpart, its values that do not change results; None: no value does."""
    joint: bool = False
    """Whether a function over several keys translates it."""


def to(target: str, default: Any = None, convert: Callable[[Any], Any] | None = None, note: str = "") -> Rule:
    """Make the rule for a key that becomes one of our settings."""
    return Rule(target, note, convert, default)


def joint(target: str, default: Any = None, note: str = "") -> Rule:
    """Make the rule for a key that becomes part of one of our settings or, without `target`, of a remark."""
    return Rule(target, note, default=default, joint=True)


def dropped(note: str) -> Rule:
    """Make the rule for a key that changes no result, or has no meaning here."""
    return Rule(note=note)


def lost(note: str, *harmless: Any) -> Rule:
    """Make the rule for a key without counterpart that changes results, unless its value is one of `harmless`."""
    return Rule(note=note, harmless=harmless)


@dataclass(frozen=True)
class Row:
    """One line of the report."""

    key: str
    value: Any
    status: str
    """mapped, default (not in the file: NeMo-Aligner's default), changed, dropped, lost, conflict or unknown."""
    target: str = ""
    note: str = ""


@dataclass
class Conversion:
    """The state of a conversion: the file's values, the settings made of them, and the things to do by hand."""

    kind: str
    source: Mapping[str, Any]
    """Maps the file's keys to values, interpolations resolved, NeMo-Aligner's defaults included."""
    values: dict[str, Any] = field(default_factory=dict)
    """Maps our dotted keys to values."""
    notes: dict[str, str] = field(default_factory=dict)
    """Remarks for keys of `values`."""
    rows: list[Row] = field(default_factory=list)
    todo: list[str] = field(default_factory=list)

    def number(self, key: str, default: float | None = None) -> float:
        """Return the number at one of the file's keys, `default` for null; ConfigError if it is none."""
        value = self.source.get(key)
        try:
            return float(default if value is None else value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            raise ConfigError(f"{key} = {value!r}: expected a number") from None

    def integer(self, key: str, default: int | None = None) -> int:
        """Return the whole number at one of the file's keys, `default` for null; ConfigError if it is none."""
        try:
            number = self.number(key, default)
        except ConfigError:
            number = math.nan
        self.require(key, number.is_integer(), "expected a whole number")
        return int(number)

    def put(self, key: str, value: Any, note: str = "") -> None:
        """Set one of our keys, with a remark if there is one."""
        self.values[key] = value
        if note:
            self.notes[key] = note

    def conflict(self, key: str, note: str) -> None:
        """Report that the file contradicts itself at `key`; `note` says how that is resolved."""
        self.rows.append(Row(key, self.source.get(key), "conflict", note=note))

    def require(self, key: str, condition: bool, message: str) -> None:
        """Raise a ConfigError about the value of `key` unless `condition` holds."""
        if not condition:
            raise ConfigError(f"{key} = {self.source.get(key)!r}: {message}")


class Changed(Exception):
    """Raised by a `Rule.convert` if there is only a similar value, `value`; the message names the difference."""

    def __init__(self, value: Any, note: str) -> None:
        super().__init__(note)
        self.value = value


def precision(value: Any) -> str:
    """Translate the precision of weights and activations."""
    name = str(value).lower().removesuffix("-mixed").removesuffix("-true").removeprefix("fp").removeprefix("float")
    if name in ("bf16", "b16"):
        return "bf16"
    if name == "32":
        return "fp32"
    if name == "16":
        raise Changed("bf16", "there is no fp16; bf16 needs no loss scaling")
    raise ValueError("expected bf16, 16 or 32")


def steps(value: Any) -> int:
    """Translate an interval in steps; 0 and None mean never."""
    if value is None:
        return 0
    if float(value) < 0 or not float(value).is_integer() or (isinstance(value, float) and value == 1):
        raise Changed(0, f"{value}: only whole numbers of steps; 0 is for the end alone")
    return int(value)


def clip_norm(value: Any) -> float:
    """Translate the largest norm of gradients; 0 and None mean no clipping."""
    return 0.0 if value is None else float(value)


def recompute(value: Any) -> bool:
    """Translate the granularity of activation checkpointing."""
    if value == "selective":
        raise Changed(True, "selective: whole layers are recomputed instead, which is slower and saves more memory")
    if value not in (None, "full"):
        raise ValueError("expected full, selective or null")
    return value == "full"


def schedule(value: Any) -> str:
    """Translate the schedule of the learning rate; None means a constant one."""
    if value in (None, "CosineAnnealing"):
        return "cosine" if value else "constant"
    raise Changed("constant", f"{value}: there are constant, linear and cosine")


def answer_only(value: Any) -> bool:
    """Translate `answer_only_loss`, which NeMo-Aligner ignores: its SFT learns responses only."""
    if value is False:
        raise Changed(
            True, "NeMo-Aligner does not use the key and always learns responses only; false learns prompts too"
        )
    return True


def texts(value: Any) -> list[str]:
    """Translate a list of texts; None means none."""
    if not isinstance(value, list | None) or not all(isinstance(text, str) for text in value or []):
        raise ValueError("expected a list of texts")
    return [text for text in value or [] if text]


def pooling(value: Any) -> str:
    """Translate `use_avg_pool`: how a score is read from a response."""
    if value:
        raise Changed("mean", "the mean over the response's tokens, not over the prompt's as well")
    return "last"
