"""Sends new weights to an engine in another process: in buckets, under a version, every tensor with a digest.

The sender packs whole tensors under Hugging Face names into one contiguous buffer at a time and describes its content.
The receiver accepts only the refit it expects: all tensors, in order, of a version newer than any before, with the
bytes of the sender's model. After a failure it has no weights until a refit is complete.

Needs only torch, as `algorithms` does, because the receiving process may run in an environment of its own.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nemo_eppo.algorithms.sampling import mix64

_ALIGNMENT = 256  # bytes; GPUs read aligned tensors faster
_ROW, _ROWS = 4096, 64  # words that a digest handles at once: 1 MiB stays in a CPU's cache
_GPU_ROWS = 4096
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Names of tensors that an engine may fuse, and of their parts."""


class RefitError(RuntimeError):
    """A refit that is incomplete, reordered, stale or corrupted; the message says which, and at which tensor."""


class TensorInfo(NamedTuple):
    """Describes one tensor of a refit, in plain values."""

    name: str
    """Name in Hugging Face's state dict."""
    shape: tuple[int, ...]
    dtype: str
    """Dtype as torch spells it: "torch.bfloat16"."""
    digest: int | None = None
    """Digest of the bytes; None where a receiver describes what it expects."""


class Bucket(NamedTuple):
    """The header of a bucket, in plain values."""

    version: int
    number: int
    """Number of the bucket, counted from 0 in each refit."""
    tensors: list[TensorInfo]


def aligned(size: int) -> int:
    """Return the bytes that a tensor of `size` bytes takes in a bucket."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def pack(
    named_tensors: Iterable[tuple[str, Tensor]], bucket_bytes: int, allocate: Callable[[int], Tensor]
) -> Iterator[list[tuple[str, Tensor, Tensor]]]:
    """Copy tensors into a buffer until it is full, yield them as a bucket, and fill another buffer.

    Args:
        named_tensors: tensors by name, read one at a time.
        bucket_bytes: size of each of the two buffers; a larger tensor replaces one with one of its own size.
        allocate: returns uint8 [n] on the device of the tensors, in memory that another process can open.

    Yields:
        (name, digest of the original, copy in the buffer) of each tensor of a bucket. Asking for the next bucket
        overwrites the one before this.
    """
    buffer = other = torch.empty(0, dtype=torch.uint8)
    packed: list[tuple[str, Tensor, Tensor]] = []
    used = 0
    for name, tensor in named_tensors:
        size = aligned(tensor.nbytes)
        if packed and used + size > buffer.numel():
            yield packed
            buffer, other, packed, used = other, buffer, [], 0
        if size > buffer.numel():
            buffer = allocate(max(size, bucket_bytes))
        place = buffer[used : used + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        place.copy_(tensor)
        packed.append((name, digest(tensor), place))
        used += size
    if packed:
        yield packed


@torch.no_grad()
def digest(tensor: Tensor) -> Tensor:
    """Compute a 64-bit checksum of a contiguous tensor's bytes: an int64 scalar on its device, equal on all devices.

    Each 32-bit word is multiplied by the odd factor of its column, and rows are mixed with their number, modulo 2^64.
    It always detects one changed word, and two swapped words in a row of 4,096; it misses another change with a
    probability of about 2^-64. It is no defence against an adversary.
    """
    data = tensor.reshape(-1).view(torch.uint8)
    if data.numel() % 4 or data.storage_offset() % 4:
        data = torch.nn.functional.pad(data, (0, -data.numel() % 4))
    words = data.view(torch.int32)
    whole = words.numel() // _ROW * _ROW
    factors = _factors(tensor.device)
    rows_at_once = _ROWS if tensor.device.type == "cpu" else _GPU_ROWS
    sums = [(rows * factors).sum(1) for rows in words[:whole].view(-1, _ROW).split(rows_at_once)]
    sums.append((words[whole:] * factors[: words.numel() - whole]).sum(0, keepdim=True))
    rows = torch.cat(sums)
    return mix64(rows + mix64(torch.arange(1, len(rows) + 1, device=rows.device))).sum()


def describe(named: Sequence[tuple[str, Tensor]]) -> list[TensorInfo]:
    """Describe tensors with their digests, after all that was queued before on their device."""
    digests = torch.stack([digest(tensor) for _, tensor in named]).tolist()  # one wait for the device
    return [
        TensorInfo(name, tuple(tensor.shape), str(tensor.dtype), value)
        for (name, tensor), value in zip(named, digests, strict=True)
    ]


_cached_factors: dict[torch.device, Tensor] = {}


def _factors(device: torch.device) -> Tensor:
    """Return the odd factors of a row's columns, int64 [4096]; no two agree in their low 33 bits."""
    if device not in _cached_factors:
        low_bits_differ = torch.arange(1, _ROW + 1)
        _cached_factors[device] = (mix64(low_bits_differ) | 1).to(device)
    return _cached_factors[device]


class Receiver:
    """Checks the refits that arrive; `version` is the version of the complete weights, None while there are none.

    Args:
        expected: every tensor of the model, in order; their digests are ignored.
    """

    def __init__(self, expected: Sequence[TensorInfo]) -> None:
        self._expected = list(expected)
        self._newest = -1  # the newest version that was begun
        self._buckets = self._received = 0
        self._pending: int | None = None
        self.version: int | None = None
        self._given: dict[str, int | None] = {}  # digests of this refit's tensors
        self._last_given: dict[str, int | None] = {}  # and of the last complete refit's
        self._last_own: dict[str, list[int | None]] = {}  # digests of the engine's own tensors after it

    def forget(self) -> None:
        """Record that there are no weights: memory was released, or a refit has failed."""
        self.version = self._pending = None

    def begin(self, version: int) -> None:
        """Start a refit; RefitError unless `version` is newer than all before, complete or not."""
        self.forget()
        if version <= self._newest:
            raise RefitError(f"stale refit: version {version} after version {self._newest}; versions have to increase")
        self._newest = self._pending = version
        self._buckets = self._received = 0

    def expect(self, bucket: Bucket) -> None:
        """Raise RefitError if this is not the next bucket; nothing of it has been loaded yet."""
        try:
            self._expect(bucket)
        except RefitError:
            self.forget()
            raise

    def check(self, bucket: Bucket, loaded: Sequence[Sequence[TensorInfo]]) -> None:
        """Raise RefitError if the tensors that were loaded are not those of the bucket, which is the expected one.

        Args:
            loaded: what `describe` says of them, one list for each device.
        """
        for found in loaded:
            if damage := _difference(bucket, found):
                self.forget()
                raise RefitError(f"corrupted refit of version {bucket.version}: {damage}")
        self._buckets += 1
        self._received += len(bucket.tensors)
        self._given |= {info.name: info.digest for info in bucket.tensors}

    def finish(self, version: int) -> None:
        """End the refit; RefitError if it is not complete."""
        pending, missing = self._pending, self._expected[self._received :]
        self.forget()
        if version != pending:
            raise RefitError(f"stale refit: version {version} ends, but version {pending} is being received")
        if missing:
            raise RefitError(
                f"incomplete refit of version {version}: ended after {self._received} of {len(self._expected)} "
                f"tensors, {missing[0].name} is missing"
            )
        self.version = version

    def confirm(self, loaded: Sequence[Sequence[TensorInfo]]) -> list[str]:
        """Raise RefitError if one of the engine's tensors did not change in a complete refit that gave it new values.

        More cannot be checked: the engine's tensors are fused and split, so their digests are others than the sender's,
        and a tensor that was loaded in part has changed as well.

        Args:
            loaded: what `describe` says of the engine's own tensors, one list for each device.

        Returns:
            names of the tensors given that are not checked: by name, none of the engine's tensors is made of them.
        """
        own: dict[str, list[int | None]] = {}
        for name, info in ((info.name, info) for device in loaded for info in device):
            own.setdefault(name, []).append(info.digest)
        sources = {name: _sources(name) for name in own}
        changed = {name for name, value in self._given.items() if self._last_given.get(name, value) != value}
        for name, digests in own.items():
            if digests == self._last_own.get(name) and (given := sources[name] & changed):
                version, self.version = self.version, None
                raise RefitError(f"refit of version {version}: the engine did not load {min(given)} into its {name}")
        self._last_given, self._last_own = dict(self._given), own
        return sorted(set(self._given) - set().union(*sources.values()))

    def _expect(self, bucket: Bucket) -> None:
        if bucket.version != self._pending:
            raise RefitError(
                f"stale refit: a bucket of version {bucket.version} while version {self._pending} is being received"
            )
        where = f"refit of version {bucket.version}"
        if bucket.number != self._buckets:
            kind = "incomplete" if bucket.number > self._buckets else "reordered"
            raise RefitError(f"{kind} {where}: bucket {bucket.number} arrived, expected bucket {self._buckets}")
        due = self._expected[self._received : self._received + len(bucket.tensors)]
        for position, info in enumerate(bucket.tensors):
            if position >= len(due):
                raise RefitError(f"{where}: {info.name} arrived after the last tensor of the model")
            if info.name != due[position].name:
                known = any(info.name == other.name for other in self._expected)
                kind = "reordered or incomplete" if known else "foreign tensor in the"
                raise RefitError(f"{kind} {where}: {info.name} arrived, expected {due[position].name}")
            if (info.shape, info.dtype) != (due[position].shape, due[position].dtype):
                raise RefitError(
                    f"{where}: {info.name} is {info.dtype} {info.shape}, "
                    f"expected {due[position].dtype} {due[position].shape}"
                )


def _sources(name: str) -> set[str]:
    """Return the names of the sender's tensors of which an engine's tensor may be made."""
    return {name} | {name.replace(fused, part) for fused, parts in _FUSED.items() for part in parts}


def _difference(bucket: Bucket, loaded: Sequence[TensorInfo]) -> str | None:
    if [info._replace(digest=None) for info in loaded] != [info._replace(digest=None) for info in bucket.tensors]:
        return "the bucket holds other tensors than its header says"
    for info, found in zip(bucket.tensors, loaded, strict=True):
        if info.digest != found.digest:
            return f"{info.name} has digest {found.digest}, the sender's has {info.digest}"
    return None
