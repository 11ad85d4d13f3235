"""What becomes of one key of NeMo-Aligner, or of several together; the tables are in aligner_keys.py."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nemo_eppo.config import ConfigError

REQUIRED = "???"
"""OmegaConf's mark of a value that has to be set."""


@dataclass(frozen=True)
class Rule:
    """What is done with a key. Without `target` it has no counterpart; `note` says why, or what is different."""

    target: str = ""
    """Our key, or several, separated by commas; of a joint key for the report only."""
    note: str = ""
    convert: Callable[[Any], Any] | None = None
    """Turns its value into ours; ValueError for one that cannot be."""
    default: Any = None
    """The value that it has in that project where a file does not set it."""
    harmless: tuple[Any, ...] | None = None
    """For a key without counterpart: the values with which results do not change; None for all."""
    joint: bool = False
    """A function over several keys deals with it."""


def to(target: str, default: Any = None, convert: Callable[[Any], Any] | None = None, note: str = "") -> Rule:
    """The key becomes a setting of ours."""
    return Rule(target, note, convert, default)


def joint(target: str, default: Any = None, note: str = "") -> Rule:
    """The key becomes part of a setting of ours or, without `target`, of a remark."""
    return Rule(target, note, default=default, joint=True)


def dropped(note: str) -> Rule:
    """The key changes no result, or has no meaning with us."""
    return Rule(note=note)


def lost(note: str, *harmless: Any) -> Rule:
    """The key changes results, unless it has one of the values `harmless`; there is nothing like it with us."""
    return Rule(note=note, harmless=harmless)


@dataclass(frozen=True)
class Row:
    """A line of the report."""

    key: str
    value: Any
    status: str
    """mapped, default (not in the file: that project's default), changed, dropped, lost, conflict or unknown."""
    target: str = ""
    note: str = ""


@dataclass
class Conversion:
    """A file that is being converted: what it says, what has come of it, and what is left to do by hand."""

    kind: str
    source: Mapping[str, Any]
    """Maps its keys to values, interpolations resolved, that project's defaults included."""
    values: dict[str, Any] = field(default_factory=dict)
    """Maps our dotted keys to values."""
    notes: dict[str, str] = field(default_factory=dict)
    """Remarks for keys of `values`."""
    rows: list[Row] = field(default_factory=list)
    todo: list[str] = field(default_factory=list)

    def put(self, key: str, value: Any, note: str = "") -> None:
        """Set one of our keys, with a remark if there is one."""
        self.values[key] = value
        if note:
            self.notes[key] = note

    def conflict(self, key: str, note: str) -> None:
        """Report that the file contradicts itself at `key`; the note says what is done about it."""
        self.rows.append(Row(key, self.source.get(key), "conflict", note=note))

    def require(self, key: str, condition: bool, message: str) -> None:
        """End the conversion with a ConfigError about the value of `key` unless `condition` holds."""
        if not condition:
            raise ConfigError(f"{key} = {self.source.get(key)!r}: {message}")


class Changed(Exception):
    """Raised by a `Rule.convert`: `value` is the nearest that there is; the message says what is different."""

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
    """Translate an interval in steps; 0 and None stand for never."""
    if value is None:
        return 0
    if float(value) < 0 or not float(value).is_integer() or (isinstance(value, float) and value == 1):
        raise Changed(0, f"{value}: only whole numbers of steps; 0 is for the end alone")
    return int(value)


def limit(value: Any) -> int | None:
    """Translate a number of steps, of which -1 and None mean that there is no limit."""
    return None if value is None or int(value) < 0 else int(value)


def clip_norm(value: Any) -> float:
    """Translate the largest norm of gradients; None and 0 stand for no clipping."""
    return 0.0 if value is None else float(value)


def recompute(value: Any) -> bool:
    """Translate which activations are recomputed."""
    if value == "selective":
        raise Changed(True, "selective: whole layers are recomputed instead, which is slower and saves more memory")
    if value not in (None, "full"):
        raise ValueError("expected full, selective or null")
    return value == "full"


def schedule(value: Any) -> str:
    """Translate the schedule of the learning rate; None stands for a constant one."""
    if value in (None, "CosineAnnealing"):
        return "cosine" if value else "constant"
    raise Changed("constant", f"{value}: there are constant, linear and cosine")


def pooling(value: Any) -> str:
    """Translate `use_avg_pool`: how a score is read from a response."""
    if value:
        raise Changed("mean", "the mean over the response's tokens, not over the prompt's as well")
    return "last"
