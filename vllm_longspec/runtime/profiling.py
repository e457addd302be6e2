"""Proposals in vLLM's profiling capture, which is to tell what memory CUDA graphs will take.

Of the target's graphs vLLM captures the largest few there and adds what the others would take; what
a proposer captures it takes as all there will be. So here as few are captured, and memory for the
others is held until vLLM has measured.
"""

from collections.abc import Sequence
from weakref import finalize

import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.logger import init_logger
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

from vllm_longspec.runtime.graphs import target_graphs

logger = init_logger("vllm.longspec")

LEAST_GRAPH_BYTES = 2**20  # vLLM counts no less for a graph that it does not capture
MOST_PIECES = 8


def sample_graphs(managers: Sequence[CudaGraphManager]) -> None:
    """While vLLM profiles, makes them capture as many graphs as the target's."""
    target = target_graphs()
    if target is None or target._max_full_descs_to_capture is None:
        return
    for graphs in managers:
        graphs._max_full_descs_to_capture = target._max_full_descs_to_capture
        graphs._capture_mem_samples = []


def hold_other_graphs(managers: Sequence[CudaGraphManager]) -> None:
    """Takes the memory of the graphs that were left out, until vLLM drops the target's."""
    target = target_graphs()
    needed = other_graphs_bytes(managers)
    if target is None or needed == 0:
        return
    logger.debug("LongSpec: graphs not captured while profiling count %d MiB", needed >> 20)
    held: list[torch.Tensor] = []
    finalize(target, held.clear)
    try:
        hold(needed, target.device, held)
    except torch.OutOfMemoryError:
        logger.warning_once("LongSpec: no memory to profile CUDA graphs of %d MiB", needed >> 20)


def other_graphs_bytes(managers: Sequence[CudaGraphManager]) -> int:
    """vLLM's rule: as much for each as the second one took, the first one holds the pool. Drivers
    take memory in large pieces, so that it is no less than the mean of all plans' second ones."""
    samples = [graphs._capture_mem_samples or [] for graphs in managers]
    further = [size for sizes in samples for size in sizes[1:]]
    if not further:  # also where all were captured
        return 0
    least = max(sum(further) // len(further), LEAST_GRAPH_BYTES)
    return sum(
        (len(graphs._capture_descs[CUDAGraphMode.FULL]) - len(sizes)) * max(least, sizes[-1])
        for graphs, sizes in zip(managers, samples, strict=True)
        if sizes
    )


def hold(num_bytes: int, device: torch.device, held: list[torch.Tensor]) -> None:
    """Until so many bytes fewer are free: what torch has unused itself does not count."""
    free = torch.accelerator.get_memory_info()[0]
    for _ in range(MOST_PIECES):
        missing = num_bytes - (free - torch.accelerator.get_memory_info()[0])
        if missing <= 0:
            return
        held.append(torch.empty(missing, dtype=torch.uint8, device=device))
