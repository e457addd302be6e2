"""Engines of two tensor-parallel ranks on a CPU: how they are started, what their workers are told.

vLLM spawns workers; here they are forks of a process that has imported everything, which takes a
fraction of the time, and brings what is replaced in that process into the workers. Ranks talk by
gloo, which sleeps while it waits: vLLM's shared memory spins, on cores that others want.
"""

import os
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from gpu_like import allow_async_scheduling, any_plan
from helpers import Engine
from torch.distributed import all_gather_object

RANKS = 2


def prepare_to_fork() -> None:
    """Once in a process whose own engines have two ranks each."""
    allow_async_scheduling()
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config.__func__  # type: ignore[attr-defined]

    def check_and_update_config(cls: type, vllm_config: Any) -> None:
        check(cls, vllm_config)
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)  # type: ignore
    CpuCommunicator._all_group_ranks_share_shm_group_name = lambda self: False


def start(speculative_config: dict[str, Any] | None, **options: Any) -> Engine:
    engine = Engine(
        speculative_config,
        tensor_parallel_size=RANKS,
        async_scheduling=True,
        **options,
    )
    assert engine.llm.llm_engine.engine_core.engine_core.batch_queue is not None  # runs ahead
    if speculative_config is not None:
        engine.llm.collective_rpc(watch)
    return engine


# What follows runs in the workers.


def watch(worker: Any) -> None:
    """Compares what the ranks choose and propose in each step, and keeps the plans. Ranks that
    differ would wait for each other for ever, or return other tokens much later."""
    proposer = worker.model_runner.speculator
    proposer.chosen = []
    proposer.choose_alone = proposer.choose
    propose = proposer.propose

    def choose(input_batch: Any, most: int) -> int:
        plan = proposer.choose_alone(input_batch, most)
        assert_alike("plans", plan)
        proposer.chosen.append(plan)
        return plan

    def propose_and_compare(input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        tokens = propose(input_batch, *args, **kwargs)
        sampled = proposer.req_states.last_sampled_tokens[input_batch.idx_mapping]
        computed = proposer.req_states.num_computed_tokens.gpu[input_batch.idx_mapping]
        assert_alike("trees", [sampled.tolist(), computed.tolist(), tokens.tolist()])
        return tokens

    proposer.choose, proposer.propose = choose, propose_and_compare


def assert_alike(what: str, own: Any) -> None:
    from vllm.distributed.parallel_state import get_tp_group

    of_all: list[Any] = [None] * RANKS
    all_gather_object(of_all, own, group=get_tp_group().cpu_group)
    assert of_all == [own] * RANKS, f"ranks have different {what}: {of_all}"


def chosen(worker: Any) -> list[int]:
    """The plans since somebody asked."""
    proposer = worker.model_runner.speculator
    plans, proposer.chosen = proposer.chosen, []
    return plans


def choose_at_random(worker: Any, folder: Path) -> None:
    """Each rank draws for itself, the same."""
    proposer, rng = worker.model_runner.speculator, random.Random(0)
    proposer.choose_alone = lambda batch, most: any_plan(rng, proposer, batch, most)


def choose_by_costs(worker: Any, folder: Path) -> None:
    """As on GPUs, once costs were measured. No plan is best for all requests: what they accept
    decides."""
    from vllm_longspec.runtime.controller import Controller
    from vllm_longspec.runtime.proposer import LongSpecProposer

    proposer = worker.model_runner.speculator
    measured, read = measured_costs(proposer, folder), measured_costs(proposer, folder)
    assert measured == read == made_up_costs(proposer.plans)
    proposer.controller = Controller(proposer.plans, read, proposer.max_num_reqs)
    proposer.choose_alone = lambda *args: LongSpecProposer.choose(proposer, *args)


def measured_costs(proposer: Any, folder: Path) -> Any:
    """Through what shares costs between ranks and keeps them in a file. Ranks measure different
    times; those of the first count, and go into the file."""
    from vllm.config.compilation import CUDAGraphMode
    from vllm.distributed.parallel_state import get_tp_group

    from vllm_longspec.runtime import measure

    file = folder / "costs.json"
    first = get_tp_group().is_first_rank
    graphs = SimpleNamespace(
        _capture_descs={CUDAGraphMode.FULL: ["a graph"]}, graphs=["a graph"],
        _max_full_descs_to_capture=None,
    )  # fmt: skip

    def times(*args: Any) -> Any:
        assert not (first and file.exists()), "costs are measured again"
        return made_up_costs(proposer.plans, plain=4.0 if first else 1.0)

    with (
        patch.multiple(
            measure, target_graphs=lambda: graphs, measure=times, cost_file=lambda of_what: file
        ),
        patch.multiple(proposer, device=torch.device("cuda"), graphs=[]),
        patch("torch.cuda.get_device_name", lambda device: "a GPU"),
    ):
        return measure.engine_costs(proposer)


def made_up_costs(plans: Any, plain: float = 4.0) -> Any:
    from vllm_longspec.runtime.costs import Costs, Curve

    def curve(ms: float) -> Any:
        return Curve((1, 4), (ms, 1.1 * ms), 0.0)

    target = {1: curve(plain)} | {1 + plan.m: curve(4.2 + 0.05 * plan.m) for plan in plans}
    proposals = tuple(curve(0.2 + 0.5 * len(plan.tree_shape)) for plan in plans)
    return Costs(tuple(plan.m for plan in plans), target, proposals)


def head_of_draft(worker: Any) -> tuple[list[int], float]:
    """Shape of the draft's own head, and a number that ranks with other rows would not share."""
    weight = worker.model_runner.speculator.draft.model.copied_head.weight
    return list(weight.shape), float(weight.double().abs().sum())
