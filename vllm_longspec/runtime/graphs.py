"""Which batches get a CUDA graph: those that the schedule of node budgets can produce."""

from collections.abc import Mapping, Sequence
from typing import Any

from vllm.config.compilation import CUDAGraphMode
from vllm.utils.math_utils import next_power_of_2, round_up
from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager


def batches_of_budgets(
    speculative_config: Any, max_num_reqs: int, num_speculative_tokens: int
) -> dict[int, list[int]]:
    """The batch sizes at which each number of nodes is verified, as vLLM's scheduler has it."""
    schedule = speculative_config.num_speculative_tokens_per_batch_size
    if schedule is None:
        return {num_speculative_tokens: list(range(1, max_num_reqs + 1))}
    lookup = build_dynamic_sd_schedule_lookup(schedule, max_num_reqs, num_speculative_tokens)
    batches: dict[int, list[int]] = {}
    for batch, m in enumerate(lookup[1:], start=1):
        batches.setdefault(m, []).append(batch)
    return batches


def coarse(batches: Sequence[int]) -> list[int]:
    """Batch sizes, ascending, that hold each of `batches` with at most a quarter more: eight from a
    power of two to the next. Rows that pad a proposal cost little, a graph costs start-up."""
    rounded = (round_up(batch, max(1, next_power_of_2(batch) // 8)) for batch in batches)
    return sorted({min(size, max(batches)) for size in rounded})


def keep_graphs(graphs: CudaGraphManager, batches: Mapping[int, Sequence[int]]) -> None:
    """Of the full graphs that vLLM would capture for a uniform number of tokens a request, keep
    those that pad one of `batches` least: batch sizes by tokens a request.

    Graphs of mixed batches stay. A batch that no kept graph holds runs as a mixed one.
    """
    captured = graphs._capture_descs.get(CUDAGraphMode.FULL)
    if captured is None:
        return
    ascending = sorted(captured, key=lambda desc: desc.num_tokens)
    needed = {
        next((desc for desc in ascending if _holds(desc, num_tokens, batch)), None)
        for num_tokens, sizes in batches.items()
        for batch in sizes
    }
    kept = [desc for desc in ascending if desc in needed]
    graphs._capture_descs[CUDAGraphMode.FULL] = [
        desc for desc in captured if desc.uniform_token_count is None or desc in needed
    ]
    for (num_tokens, num_loras), candidates in graphs._candidates.items():
        smallest: dict[int | None, BatchExecutionDescriptor] = {}
        for desc in kept:
            if desc.num_tokens >= num_tokens and desc.num_active_loras == num_loras:
                smallest.setdefault(desc.uniform_token_count, desc)
        mixed = [desc for desc in candidates if desc.uniform_token_count is None]
        graphs._candidates[num_tokens, num_loras] = [*smallest.values(), *mixed]


def _holds(desc: BatchExecutionDescriptor, num_tokens: int, batch: int) -> bool:
    return (
        desc.uniform_token_count == num_tokens
        and desc.num_reqs is not None
        and desc.num_reqs >= batch
    )
