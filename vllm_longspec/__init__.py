"""LongSpec for vLLM: lossless tree speculation for long contexts."""

__version__ = "0.1.0"
VLLM_VERSION = "0.32.0"
