"""What nemo_eppo imports from tensorrt_llm.llmapi, with its signature."""


class KvCacheConfig:
    def __init__(self, *, free_gpu_memory_fraction: float, enable_block_reuse: bool) -> None:
        self.free_gpu_memory_fraction, self.enable_block_reuse = free_gpu_memory_fraction, enable_block_reuse


class CudaGraphConfig:
    def __init__(self, *, enable_padding: bool, max_batch_size: int) -> None:
        self.enable_padding, self.max_batch_size = enable_padding, max_batch_size
