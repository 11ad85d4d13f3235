"""What a TensorRT-LLM worker, a process of one GPU, does in a refit beside what TensorRT-LLM 1.2 has for it."""

from typing import Any

from tensorrt_llm._torch.utils import get_device_uuid
from tensorrt_llm.llmapi.rlhf_utils import WorkerExtension
from torch import Tensor

from nemo_eppo.generation.ipc import open_handles
from nemo_eppo.generation.refit import TensorInfo, describe


class RefitWorker(WorkerExtension):
    """Is mixed into TensorRT-LLM's worker class (ray_worker_extension_cls), whose `device_id` is its GPU's number among
    those that the engine sees."""

    device_id: int
    engine: Any

    def load_bucket(self, handles: list[str]) -> list[TensorInfo]:
        """Load the tensors that are shared on this worker's GPU, and describe what was given to TensorRT-LLM to load.

        Args:
            handles: of each GPU of the engine, what `ipc.handles` made on it.
        """
        named = open_handles(handles[self.device_id], self.device_id)
        # update_weights also takes handles that are unpickled already: (function, arguments, of which it sets the 7th).
        # A handle can be opened once, so its function returns what is open.
        opened = [(name, (_returns(tensor), [None] * 7)) for name, tensor in named]
        self.update_weights({get_device_uuid(self.device_id): opened})
        return describe(named)  # waits until all is copied: the sender fills the buffer anew

    def own_tensors(self) -> list[TensorInfo]:
        """Describe the model's own tensors on this worker's GPU, fused and split as they are."""
        return describe(list(self.engine.model_engine.model.named_parameters()))


def _returns(tensor: Tensor) -> Any:
    return lambda *_: tensor
