"""Times the CUDA graphs of an engine: the target's forwards and the proposals, once captured."""

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.distributed.parallel_state import get_tp_group
from vllm.logger import init_logger
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager
from vllm.v1.worker.gpu.input_batch import InputBatch, set_dummy_context

from vllm_longspec import __version__, release
from vllm_longspec.runtime.costs import (
    Costs,
    Curve,
    cost_file,
    read_costs,
    sizes_to_time,
    write_costs,
)
from vllm_longspec.runtime.graphs import target_graphs
from vllm_longspec.runtime.vllm_versions import installed_vllm
from vllm_longspec.verify.sampler import sample as sample_rows

if TYPE_CHECKING:
    from vllm_longspec.runtime.proposer import LongSpecProposer

logger = init_logger("vllm.longspec")

SHORT, LONG = 1024, 32768  # tokens of context at which attention is timed
LEAST_TIMES_LONGER = 4  # the longer one, for what a token of context costs
REPLAYS = 3  # of which the median counts; one before them is not timed


def engine_costs(proposer: "LongSpecProposer") -> Costs | None:
    """From the cache folder, or measured and put there; None where there are no graphs to time.
    All tensor-parallel ranks get the first one's."""
    graphs = target_graphs()
    if proposer.device.type != "cuda" or graphs is None or not proposer.plans:
        return None
    # vLLM captures a few, on a small cache, to see what memory they take.
    if graphs._max_full_descs_to_capture is not None:
        return None
    group = get_tp_group()
    for manager in (graphs, *proposer.graphs):
        captured = manager._capture_descs.get(CUDAGraphMode.FULL)
        if not captured or any(desc not in manager.graphs for desc in captured):
            return None
    of_what = names_of(proposer)
    file = cost_file(of_what)
    costs = read_costs(file, of_what) if group.is_first_rank else None
    costs = group.broadcast_object(costs, src=0)
    if costs is None:
        started = time.monotonic()
        costs = measure(proposer, graphs)  # together: the forwards hold collectives
        costs = group.broadcast_object(costs, src=0)
        logger.info_once("LongSpec: measured what steps cost in %.1f s", time.monotonic() - started)
        if costs is not None and group.is_first_rank:
            write_costs(file, of_what, costs)
    return costs


def names_of(proposer: "LongSpecProposer") -> dict[str, Any]:
    """Everything that the costs depend on."""
    config = proposer.vllm_config
    model, parallel = config.model_config, config.parallel_config
    target = model.hf_text_config.to_dict()
    return {
        "longspec": release(__version__),
        "vllm": installed_vllm(),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name(proposer.device),
        "tensor_parallel": parallel.tensor_parallel_size,
        "target": {k: v for k, v in sorted(target.items()) if isinstance(v, int | float | str)},
        "dtype": str(model.dtype),
        "quantization": str(model.quantization),
        "draft": [proposer.speculative_config.quantization, proposer.draft_model_config.model],
        "plans": [[list(plan.tree_shape), plan.m] for plan in proposer.plans],
        "batches": [[batches[0], batches[-1]] for batches in proposer.batches],
        "max_num_seqs": proposer.max_num_reqs,
        "max_model_len": proposer.max_model_len,
        "graphs": config.compilation_config.cudagraph_capture_sizes,
        "expert_parallel": parallel.enable_expert_parallel,
    }


def measure(proposer: "LongSpecProposer", graphs: CudaGraphManager) -> Costs | None:
    target: dict[int, Curve] = {}
    per_token = 0.0  # more rows read the same cache, and never for less
    for rows in sorted({1, *(1 + plan.m for plan in proposer.plans)}):
        descs = {
            desc.num_reqs: desc
            for desc in graphs.graphs
            if desc.uniform_token_count == rows and desc.num_active_loras == 0
        }
        if not descs:
            return None

        def forward(batch: int, context: int, descs: Any = descs, rows: int = rows) -> float:
            place(proposer, batch, rows, context)
            return milliseconds(lambda: graphs.run_fullgraph(descs[batch]))

        target[rows] = curve(sorted(descs), forward, proposer.max_model_len - rows, per_token)
        per_token = target[rows].per_token
    proposals = []
    for manager in proposer.graphs:
        by_size = {desc.num_reqs: desc for desc in manager.graphs}

        def proposal(
            batch: int, context: int, manager: Any = manager, by_size: Any = by_size
        ) -> float:
            place(proposer, batch, 1, context)
            # No longer than a block table.
            proposer.inputs.context_lens[:batch].fill_(context)
            return milliseconds(lambda: manager.run_fullgraph(by_size[batch]))

        proposals.append(curve(sorted(by_size), proposal, max(2, proposer.max_model_len - 64)))
        proposer.rest()
    most = max(desc.num_tokens for desc in graphs.graphs)
    nodes = tuple(plan.m for plan in proposer.plans)
    costs = Costs(nodes, target, tuple(proposals), sampling(proposer, min(most, 512)))
    proposer.block_tables.get_dummy_block_tables(proposer.max_num_reqs)  # zeroes them
    return costs


def curve(
    sizes: Sequence[int],
    run: Callable[[int, int], float],
    most_context: int,
    least_per_token: float = 0.0,
) -> Curve:
    """`run` takes a batch size and the context of each of its requests."""
    short = max(1, min(SHORT, most_context // 2))
    long = min(LONG, most_context)
    timed = sizes_to_time(sizes)
    times = [run(size, short) for size in timed]
    per_token = least_per_token
    if long >= LEAST_TIMES_LONGER * short:  # else the noise of two measurements is what differs
        # Where attention has enough requests to read the cache as fast as it can.
        size = max((size for size in timed if size <= 8), default=timed[0])
        more = run(size, long) - times[timed.index(size)]
        per_token = max(least_per_token, more / (size * (long - short)))
    # Noise apart, more requests never cost less.
    at_least = np.maximum.accumulate(times) - per_token * short * np.array(timed)
    return Curve(tuple(timed), tuple(float(ms) for ms in np.maximum(at_least, 1e-3)), per_token)


def place(proposer: "LongSpecProposer", batch: int, rows: int, context: int) -> None:
    """Inputs of a graph: random tokens, that wake as many experts as a text does, after a context
    of blocks that no two requests share, as far as there are any."""
    tables = proposer.block_tables
    inputs = InputBatch.make_dummy(
        batch, batch * rows, proposer.target_input_buffers, max_query_len=rows
    )
    inputs.input_ids.random_(0, proposer.vocab_size)
    if inputs.is_padding is not None:
        inputs.is_padding.fill_(False)
    dummies = tables.get_dummy_block_tables(batch)
    set_dummy_context(
        inputs, tables, context, proposer.kv_cache_config.num_blocks, proposer.max_model_len,
        input_block_tables=dummies,
    )  # fmt: skip
    proposer.model_state.prepare_attn(
        inputs,
        CUDAGraphMode.FULL,
        dummies,
        tables.get_dummy_slot_mappings(batch * rows),
        proposer.target_attn_groups,
        proposer.kv_cache_config,
        for_capture=True,
    )


def sampling(proposer: "LongSpecProposer", rows: int) -> tuple[float, float]:
    """Milliseconds of the head and of sampling: of any number of rows, of each row."""
    device = proposer.device
    hidden = torch.zeros(rows, proposer.hidden_size, dtype=proposer.dtype, device=device)
    zeros = torch.zeros(rows, dtype=torch.int64, device=device)
    temperature = torch.ones(proposer.max_num_reqs, device=device)
    seeds = torch.zeros(proposer.max_num_reqs, dtype=torch.int64, device=device)

    def sample(num_rows: int) -> float:
        def once() -> None:
            logits = proposer.compute_target_logits(hidden[:num_rows])
            slots = zeros[:num_rows].int()
            sample_rows(logits.float(), slots, temperature, seeds, zeros[:num_rows], False)

        return milliseconds(once)

    few, many = min(8, rows), rows
    of_few, of_many = sample(few), sample(many)
    if many == few:
        return of_few, 0.0
    of_a_row = max(0.0, of_many - of_few) / (many - few)
    return max(0.0, of_few - of_a_row * few), of_a_row


def milliseconds(work: Callable[[], Any]) -> float:
    """Of the device. The work before keeps it busy while the host launches what is timed."""
    work()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(200_000)  # cycles, 0.1 ms
        start.record()
        work()
        end.record()
        times.append((start, end))
    times[-1][1].synchronize()
    return float(np.median([start.elapsed_time(end) for start, end in times]))
