"""What TensorRT-LLM 1.2 mixes into its Ray workers: it loads weights from the handles of its own GPU."""

import base64
import pickle
from typing import Any

from tensorrt_llm._torch.utils import get_device_uuid


class WorkerExtension:
    device_id: int
    engine: Any

    def update_weights(self, ipc_handles: dict[str, Any] | None = None) -> None:
        if ipc_handles is None:
            self.engine.finalise()
            return
        handles = ipc_handles[get_device_uuid(self.device_id)]
        if isinstance(handles, str):
            handles = pickle.loads(base64.b64decode(handles))
        for name, (function, arguments) in handles:
            arguments = list(arguments)
            arguments[6] = self.device_id
            self.engine.load(self.device_id, name, function(*arguments))
