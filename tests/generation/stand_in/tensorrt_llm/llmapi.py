"""What nemo_eppo imports from tensorrt_llm.llmapi, with its signature."""


class KvCacheConfig:
    def __init__(self, *, free_gpu_memory_fraction: float, enable_block_reuse: bool) -> None:
        self.enable_block_reuse = enable_block_reuse
