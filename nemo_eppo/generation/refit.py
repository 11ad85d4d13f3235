"""New weights for an engine in another process: bucket by bucket, under a version, every tensor with a digest.

The sender packs whole, Hugging-Face-named tensors into one contiguous buffer at a time and describes what is in it. The
receiver lets nothing pass that is not exactly the refit it expects: all tensors, in order, of a version newer than any
it has seen, with the bytes that the sender's model holds. After a failure it has no weights until a whole refit came.

Needs torch alone, as `algorithms` does: the receiving process may live in an environment of its own.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nemo_eppo.algorithms.sampling import mix64

_ALIGNMENT = 256  # bytes; GPUs read aligned tensors faster
_ROW, _ROWS = 4096, 64  # words that a digest handles at once: 1 MiB stays in a CPU's cache
_GPU_ROWS = 4096


class RefitError(RuntimeError):
    """A refit that is incomplete, reordered, stale or corrupted; the message says which, and at which tensor."""


class TensorInfo(NamedTuple):
    """What a refit says about one tensor. All plain values."""

    name: str
    """As in Hugging Face's state dict."""
    shape: tuple[int, ...]
    dtype: str
    """As torch spells it: "torch.bfloat16"."""
    digest: int | None = None
    """Of its bytes; None in what a receiver expects, before there are any."""


class Bucket(NamedTuple):
    """The header of a bucket. All plain values."""

    version: int
    number: int
    """Counts from 0 in each refit."""
    tensors: list[TensorInfo]


def pack(
    named_tensors: Iterable[tuple[str, Tensor]], bucket_bytes: int, allocate: Callable[[int], Tensor]
) -> Iterator[list[tuple[str, Tensor, Tensor]]]:
    """Copy tensors into one buffer until it is full, and again.

    Args:
        named_tensors: read one at a time.
        bucket_bytes: size of the buffer; a larger tensor gets one of its own size, which then stays.
        allocate: uint8 [n] on the device of the tensors, in memory that another process can open.

    Yields:
        (name, digest, tensor in the buffer) of each tensor of a bucket, the digest being of the tensor before it was
        copied. The buffer is filled anew when the next bucket is asked for.
    """
    buffer = torch.empty(0, dtype=torch.uint8)
    packed: list[tuple[str, Tensor, Tensor]] = []
    used = 0
    for name, tensor in named_tensors:
        size = -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        if packed and used + size > buffer.numel():
            yield packed
            packed, used = [], 0
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
    """64-bit checksum of a contiguous tensor's bytes: an int64 scalar on its device, the same number on every device.

    Each 32-bit word is multiplied by the odd factor of its column and rows are mixed with their number, modulo 2^64: a
    changed word always shows, and so do two words that change places in a row of 4,096; anything else goes unseen with
    a probability of about 2^-64. Not a defence against an adversary.
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


_cached_factors: dict[torch.device, Tensor] = {}


def _factors(device: torch.device) -> Tensor:
    """The odd factors of a row's columns, int64 [4096]: no two agree in their low 33 bits."""
    if device not in _cached_factors:
        low_bits_differ = torch.arange(1, _ROW + 1)
        _cached_factors[device] = (mix64(low_bits_differ) | 1).to(device)
    return _cached_factors[device]


class Receiver:
    """Checks the refits that arrive. `version` is that of the complete weights, None while there are none.

    Args:
        expected: every tensor of the model, in order; digests are not looked at.
    """

    def __init__(self, expected: Sequence[TensorInfo]) -> None:
        self._expected = list(expected)
        self._newest = -1  # version that was begun
        self._buckets = self._received = 0
        self._pending: int | None = None
        self.version: int | None = None

    def forget(self) -> None:
        """The weights are gone: released memory, or a refit that failed."""
        self.version = self._pending = None

    def begin(self, version: int) -> None:
        """Start a refit. RefitError if `version` is not newer than all before, complete or not."""
        self.forget()
        if version <= self._newest:
            raise RefitError(f"stale refit: version {version} after version {self._newest}; versions have to increase")
        self._newest = self._pending = version
        self._buckets = self._received = 0

    def check(self, bucket: Bucket, copies: Sequence[Sequence[tuple[str, Tensor]]]) -> None:
        """RefitError if this is not the next bucket, or the tensors that arrived are not those it names.

        Args:
            copies: the bucket's tensors as they arrived; one list for each device they arrived on.
        """
        try:
            self._check(bucket, copies)
        except RefitError:
            self.forget()
            raise

    def finish(self, version: int) -> None:
        """The refit is over. RefitError if it was not complete."""
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

    def _check(self, bucket: Bucket, copies: Sequence[Sequence[tuple[str, Tensor]]]) -> None:
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
        for tensors in copies:
            self._check_content(where, bucket.tensors, tensors)
        self._buckets += 1
        self._received += len(bucket.tensors)

    def _check_content(self, where: str, named: list[TensorInfo], tensors: Sequence[tuple[str, Tensor]]) -> None:
        arrived = [TensorInfo(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in tensors]
        if arrived != [info._replace(digest=None) for info in named]:
            raise RefitError(f"corrupted {where}: the bucket holds other tensors than its header says")
        digests = torch.stack([digest(tensor) for _, tensor in tensors]).tolist()  # one wait for the device
        for info, found in zip(named, digests, strict=True):
            if info.digest != found:
                raise RefitError(f"corrupted {where}: {info.name} has digest {found}, the sender's has {info.digest}")
