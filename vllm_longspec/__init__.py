"""LongSpec for vLLM: lossless tree speculation for long contexts."""

__version__ = "0.1.0"
VLLM_VERSIONS = ("0.32", "0.33")  # minors, the newest last
SUPPORTED_VLLM = " or ".join(VLLM_VERSIONS)  # for messages
