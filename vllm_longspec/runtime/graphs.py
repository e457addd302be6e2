"""Which batches get a CUDA graph: those that the menus of plans can produce."""

from collections.abc import Mapping, Sequence
from weakref import ref

from vllm.config.compilation import CUDAGraphMode
from vllm.utils.math_utils import next_power_of_2, round_up
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager

from vllm_longspec.runtime.menus import Menu, menu_of_each_batch

# Of the target in this worker; vLLM makes it just before it asks the proposer for its graphs, and
# passes it on to nobody.
_target_graphs: "ref[CudaGraphManager] | None" = None


def remember_target_graphs(graphs: CudaGraphManager) -> None:
    global _target_graphs
    _target_graphs = ref(graphs)


def target_graphs() -> CudaGraphManager | None:
    return None if _target_graphs is None else _target_graphs()


def coarse(batches: Sequence[int]) -> list[int]:
    """Batch sizes, ascending, that hold each of `batches` with at most a quarter more: eight from a
    power of two to the next. Rows that pad a proposal cost little, a graph costs start-up."""
    if not batches:
        return []
    rounded = (round_up(batch, max(1, next_power_of_2(batch) // 8)) for batch in batches)
    return sorted({min(size, max(batches)) for size in rounded})


def graph_sizes(graphs: CudaGraphManager, rows: int) -> list[int]:
    """The batch sizes, ascending, that vLLM would capture for `rows` tokens a request
    (`CudaGraphManager._init_candidates`)."""
    config = graphs.compilation_config
    most = config.max_cudagraph_capture_size or 0
    sizes = {round_up(size, rows) // rows for size in config.cudagraph_capture_sizes or ()}
    return sorted(size for size in sizes if size * rows <= most and size <= graphs.max_num_reqs)


def batches_to_capture(
    menus: Sequence[Menu], max_num_reqs: int, adaptive: bool
) -> dict[int, list[int]]:
    """Batch sizes by tokens a request: each one where plain decoding or the default plan has so
    many, coarse ones where another plan has."""
    of_each = menu_of_each_batch(menus, max_num_reqs)
    exact: dict[int, set[int]] = {}
    others: dict[int, list[int]] = {}
    for batch in range(1, max_num_reqs + 1):
        menu = of_each[batch]
        if adaptive or menu.default is None:
            exact.setdefault(1, set()).add(batch)
        if menu.default is not None:
            exact.setdefault(1 + menu.default.m, set()).add(batch)
        if adaptive:
            for rows in {1 + plan.m for plan in menu.plans}:
                others.setdefault(rows, []).append(batch)
    return {
        rows: sorted(exact.get(rows, set()) | set(coarse(others.get(rows, ()))))
        for rows in sorted({*exact, *others})
    }


def choose_graphs(graphs: CudaGraphManager, batches: Mapping[int, Sequence[int]]) -> None:
    """Captures for each number of tokens a request the graphs that pad one of its batch sizes
    least, in place of vLLM's: it captures every batch size for every number of tokens in a
    schedule, though each number serves few, and none for a number that is in no schedule.

    Graphs of mixed batches stay. A batch that no graph holds runs as a mixed one.
    """
    mode = graphs.cudagraph_mode
    if not mode or not mode.separate_routine() or mode.decode_mode() != CUDAGraphMode.FULL:
        return
    needed: set[BatchExecutionDescriptor] = set()
    for rows, counts in batches.items():
        sizes = graph_sizes(graphs, rows)
        for batch in counts:
            size = next((size for size in sizes if size >= batch), None)
            if size is not None:
                needed |= {
                    BatchExecutionDescriptor(
                        cg_mode=CUDAGraphMode.FULL,
                        num_tokens=size * rows,
                        num_reqs=size,
                        uniform_token_count=rows,
                        num_active_loras=num_loras,
                    )
                    for num_loras in graphs.lora_capture_cases
                }
    ascending = sorted(needed, key=lambda desc: desc.num_tokens)
    mixed = [
        desc
        for desc in graphs._capture_descs.get(CUDAGraphMode.FULL, ())
        if desc.uniform_token_count is None
    ]
    graphs._capture_descs[CUDAGraphMode.FULL] = [*reversed(ascending), *mixed]
    for num_tokens in range(1 + max((desc.num_tokens for desc in ascending), default=0)):
        for num_loras in graphs.lora_capture_cases:
            graphs._candidates.setdefault((num_tokens, num_loras), [])
    for (num_tokens, num_loras), candidates in graphs._candidates.items():
        smallest: dict[int | None, BatchExecutionDescriptor] = {}
        for desc in ascending:
            if desc.num_tokens >= num_tokens and desc.num_active_loras == num_loras:
                smallest.setdefault(desc.uniform_token_count, desc)
        mixed = [desc for desc in candidates if desc.uniform_token_count is None]
        graphs._candidates[num_tokens, num_loras] = [*smallest.values(), *mixed]
