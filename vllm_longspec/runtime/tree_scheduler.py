"""What the scheduler of an engine with trees does beside vLLM's: it counts trees, and caches what
the last one of a request brought.

vLLM's scheduler counts what it made room for, the nodes of the largest tree, and takes the n-th
draft token for one at position n: in its log, under /metrics and for each request. Here it counts
what workers say that they verified (`LongSpecProposer.num_verified`), and a position is a depth in
the tree. What it schedules, and what it takes as rejected, stays its own.
"""

import copy
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import RequestSpecDecodeMetrics
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from vllm_longspec.runtime.menus import most_accepted

NUM_VERIFIED = "longspec_num_verified"  # in a ModelRunnerOutput: nodes by request


class TreeScheduler(Scheduler):
    """Our part of a class that derives from vLLM's scheduler, too."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        self.most_accepted = most_accepted(vllm_config.speculative_config.menus)

    def add_request(self, request: Request) -> None:
        super().add_request(request)
        if request.spec_decode_metrics is not None:
            request.spec_decode_metrics = TreeRequestMetrics.new(self.most_accepted)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        verified = getattr(model_runner_output, NUM_VERIFIED, None)
        if verified is not None:
            scheduler_output = count_only(scheduler_output, verified)
        return super().update_from_output(scheduler_output, model_runner_output)

    def make_spec_decoding_stats(
        self,
        spec_decoding_stats: SpecDecodingStats | None,
        num_draft_tokens: int,
        num_accepted_tokens: int,
        num_invalid_spec_tokens: dict[str, int] | None,
        request_id: str,
    ) -> SpecDecodingStats | None:
        nodes = num_draft_tokens - (num_invalid_spec_tokens or {}).get(request_id, 0)
        if not self.log_stats or nodes <= 0:
            return spec_decoding_stats
        if spec_decoding_stats is None:
            spec_decoding_stats = SpecDecodingStats.new(self.most_accepted)
        depth = min(nodes, self.most_accepted)
        spec_decoding_stats.observe_draft(depth, num_accepted_tokens)
        spec_decoding_stats.num_draft_tokens += nodes - depth
        return spec_decoding_stats

    def _handle_stopped_request(self, request: Request) -> bool:
        """A session goes on from what is computed of its text. vLLM's synchronous scheduler counts
        what was accepted beyond the stop as computed, too."""
        if request.resumable:
            in_flight = request.num_output_placeholders
            computed = min(request.num_computed_tokens - in_flight, request.num_tokens - 1)
            request.num_computed_tokens = computed + in_flight
        return super()._handle_stopped_request(request)

    def _free_request_blocks(self, request: Request) -> None:
        """vLLM's synchronous scheduler caches blocks as it schedules, so that tokens of a request's
        last verification would be missing in the prefix that its next turn finds. All but the
        newest have keys and values."""
        if request.is_finished():
            computed = min(request.num_computed_tokens, request.num_tokens - 1)
            self.kv_cache_manager.cache_blocks(request, computed)
        super()._free_request_blocks(request)


class TreeRequestMetrics(RequestSpecDecodeMetrics):
    """A step that verified nothing is none of speculation."""

    def observe(self, num_draft_tokens: int, num_accepted: int, detailed: bool = False) -> None:
        if num_draft_tokens > 0:
            super().observe(num_draft_tokens, num_accepted, detailed)


def count_only(scheduled: SchedulerOutput, verified: dict[str, int]) -> SchedulerOutput:
    """The step with draft tokens beyond the verified ones as invalid. vLLM subtracts these, which a
    grammar forbids, from what it counts as drafted, and from nothing else."""
    invalid = scheduled.num_invalid_spec_tokens or {}
    counted = copy.copy(scheduled)  # others hold what was scheduled
    counted.num_invalid_spec_tokens = {
        req_id: max(len(tokens) - verified.get(req_id, 0), invalid.get(req_id, 0))
        for req_id, tokens in scheduled.scheduled_spec_decode_tokens.items()
    }
    return counted


def tree_scheduler(base: type) -> type:
    """Of a scheduler's class, synchronous or not, the one that counts trees; `base` itself where it
    is no class of vLLM's scheduler."""
    if not issubclass(base, Scheduler):
        return base
    return type(f"Tree{base.__name__}", (TreeScheduler, base), {})
