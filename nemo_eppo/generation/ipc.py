"""Tensors that another process of the machine opens in place: CUDA IPC on GPUs, shared memory on a CPU.

What goes to the other process is text that says where a tensor lies, a few hundred bytes whatever the tensor's size.
"""

import base64
import pickle
from collections.abc import Sequence
from multiprocessing.reduction import ForkingPickler

import torch
import torch.multiprocessing
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

_DEVICE = 6  # where a GPU tensor's handle has the number of its device


def allocate(size: int, device: torch.device) -> Tensor:
    """Uint8 [size], its content undefined, that `handles` can hand out."""
    buffer = torch.empty(size, dtype=torch.uint8, device=device)
    if device.type == "cpu":
        torch.multiprocessing.set_sharing_strategy("file_system")  # the default would need a connection for each tensor
        buffer.share_memory_()
    return buffer


def handles(named: Sequence[tuple[str, Tensor]]) -> str:
    """The tensors, all in memory of `allocate`, in the form in which AsyncLLM.update_weights takes one device's: base64
    of a pickled [(name, reduce_tensor(tensor)), ...]. They have to stay until the other process has read them.
    What is returned can be opened once, for memory is freed by counting who has opened it."""
    return base64.b64encode(ForkingPickler.dumps([(name, reduce_tensor(tensor)) for name, tensor in named])).decode()


def open_handles(text: str, device_number: int) -> list[tuple[str, Tensor]]:
    """The tensors of `handles`, not copied.

    Args:
        device_number: of the GPU they lie on, as this process counts; its meaning on a CPU is nothing.
    """
    named = []
    for name, (rebuild, arguments) in pickle.loads(base64.b64decode(text)):
        arguments = list(arguments)
        if len(arguments) > _DEVICE:
            arguments[_DEVICE] = device_number
        named.append((name, rebuild(*arguments)))
    return named
