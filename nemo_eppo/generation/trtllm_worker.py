"""Extends a TensorRT-LLM 1.2 worker, a process of one GPU, with refits whose tensors are described for checks."""

from typing import Any

from tensorrt_llm._torch.utils import get_device_uuid
from tensorrt_llm.llmapi.rlhf_utils import WorkerExtension
from torch import Tensor

from nemo_eppo.generation.ipc import open_handles
from nemo_eppo.generation.refit import TensorInfo, describe


class RefitWorker(WorkerExtension):
    """Mixed into TensorRT-LLM's worker class (ray_worker_extension_cls); `device_id` numbers its GPU among the
    engine's."""

    device_id: int
    engine: Any

    def load_bucket(self, handles: list[str]) -> list[TensorInfo]:
        """Load the tensors shared on this worker's GPU, and describe them.

        Args:
            handles: the text of `ipc.handles` for each GPU of the engine.
        """
        named = open_handles(handles[self.device_id], self.device_id)
        # update_weights also takes unpickled handles: (function, arguments), of which it sets argument 6. A handle can
        # be opened once, so the function returns the tensor that is open already.
        opened = [(name, (_returns(tensor), [None] * 7)) for name, tensor in named]
        self.update_weights({get_device_uuid(self.device_id): opened})
        return describe(named)  # waits until all is copied: the sender fills the buffer anew

    def own_tensors(self) -> list[TensorInfo]:
        """Describe the model's own tensors on this worker's GPU, fused and split as they are."""
        return describe(list(self.engine.model_engine.model.named_parameters()))


def _returns(tensor: Tensor) -> Any:
    return lambda *_: tensor
