"""Shares tensors with another process of the machine: CUDA IPC on GPUs, shared memory on a CPU.

The other process gets a handle as text, a few hundred bytes for a tensor of any size.
"""

import base64
import pickle
from collections.abc import Sequence
from multiprocessing.reduction import ForkingPickler

import torch
import torch.multiprocessing
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

_DEVICE, _MEMORY = 6, 7  # index of the device number, and of the memory's handle, in a GPU tensor's handle


def allocate(size: int, device: torch.device) -> Tensor:
    """Allocate uint8 [size], of undefined content, whose parts `handles` can share."""
    buffer = torch.empty(size, dtype=torch.uint8, device=device)
    if device.type == "cpu":
        torch.multiprocessing.set_sharing_strategy("file_system")  # the default would need a connection for each tensor
        buffer.share_memory_()
    return buffer


def handles(named: Sequence[tuple[str, Tensor]]) -> str:
    """Return handles of tensors, all in memory of `allocate`, as AsyncLLM.update_weights takes those of one device:
    base64 of a pickled [(name, reduce_tensor(tensor)), ...]. Keep the tensors until the other process has read them.
    Open the text once: torch counts openings to free the memory."""
    return base64.b64encode(ForkingPickler.dumps([(name, reduce_tensor(tensor)) for name, tensor in named])).decode()


def _readable(handle: bytes) -> bytes:
    # version, kind, content: for cudaMalloc's memory torch 2.13 writes version 3, equal to the 2 that older ones expect
    return b"\x02" + handle[1:] if handle[:2] == b"\x03c" else handle


def open_handles(text: str, device_number: int) -> list[tuple[str, Tensor]]:
    """Open the tensors of `handles` without copying them.

    Args:
        device_number: number of their GPU in this process; ignored on a CPU.
    """
    named = []
    for name, (rebuild, arguments) in pickle.loads(base64.b64decode(text)):
        arguments = list(arguments)
        if len(arguments) > _DEVICE:
            arguments[_DEVICE], arguments[_MEMORY] = device_number, _readable(arguments[_MEMORY])
        named.append((name, rebuild(*arguments)))
    return named
