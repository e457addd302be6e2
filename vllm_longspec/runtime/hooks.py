"""What vLLM asks LongSpec about, as functions; `runtime/patches.py` makes vLLM ask."""

import copy
from typing import Any

import numpy as np

from vllm_longspec.runtime.counters import shared_folder
from vllm_longspec.runtime.menus import most_accepted
from vllm_longspec.runtime.options import (
    METHOD,
    DraftPath,
    create_longspec_config,
    longspec_options,
)
from vllm_longspec.runtime.request_switch import check_request, has_grammar
from vllm_longspec.runtime.roles import check_roles


def create_config(args: Any, target_model_config: Any, target_parallel_config: Any) -> Any:
    """The speculative config of EngineArgs that ask for LongSpec; None if they do not. Raises
    LongSpecError, also for a draft in its target's place."""
    check_roles(args, target_model_config)
    options = longspec_options(args)
    if options is None:
        return None
    config = create_longspec_config(options, args, target_model_config, target_parallel_config)
    config.counters_folder = shared_folder()
    return config


def add_cli_args(parser: Any) -> None:
    """`--speculative-model` is gone from vLLM; it returns as the way to name a LongSpec draft."""
    group = parser.add_argument_group("LongSpec", "Tree speculation, by vllm-longspec.")
    one_of_both = group.add_mutually_exclusive_group()
    # They set the same field, the last one would win.
    one_of_both._group_actions.append(parser._option_string_actions["--spec-model"])
    one_of_both.add_argument(
        "--speculative-model",
        dest="spec_model",
        type=DraftPath,
        help="LongSpec draft: a folder or a Hugging Face repository. Further options go into "
        '--speculative-config as JSON: {"tree_shape": [4, 16, 16, 16, 16], '
        '"num_speculative_tokens": 31}.',
    )


def check_sampling_params(params: Any) -> None:
    """What LongSpec refuses of a request's; not min_p and logit_bias, which vLLM refuses whenever
    anything speculates: every node is sampled with vLLM's own sampler, which knows both. Raises
    VLLMValidationError."""
    check_request(params)


def create_speculator(vllm_config: Any, device: Any, req_states: Any) -> Any:
    """The proposer of a worker."""
    from vllm_longspec.runtime.proposer import LongSpecProposer

    return LongSpecProposer(vllm_config, device, req_states)


def filter_cudagraphs(graphs: Any) -> None:
    """Gives a ModelCudaGraphManager the candidates that the menus of plans can produce. vLLM
    captures every batch size for every number of nodes of a schedule, though each number serves
    few: hundreds of graphs, minutes of start-up."""
    from vllm_longspec.runtime.graphs import (
        batches_to_capture,
        choose_graphs,
        remember_target_graphs,
    )

    config = graphs.vllm_config.speculative_config
    if getattr(config, "method", None) != METHOD:
        return
    remember_target_graphs(graphs)
    choose_graphs(graphs, batches_to_capture(config.menus, graphs.max_num_reqs, config.adaptive))


def trim(scheduler_output: Any, runner: Any) -> Any:
    """The step that a worker makes of what was scheduled: of each request as many draft tokens as
    the trees have that were grown. The scheduler makes room for the largest tree of a batch size
    and takes what is not there as rejected."""
    drafts = scheduler_output.scheduled_spec_decode_tokens
    # A request that has all but its prompt's last token cached is padded to a verification. With a
    # grammar its masks are as many, and it has no slot yet that would say so.
    padded = [new for new in scheduler_output.scheduled_new_reqs if new.req_id in drafts]
    if not drafts or any(has_grammar(new.sampling_params) for new in padded):
        return scheduler_output
    slot_of = runner.req_states.req_id_to_index
    slots = np.array([slot_of[req_id] for req_id in drafts if req_id in slot_of], dtype=np.int64)
    most = runner.speculator.nodes_to_verify(slots)
    if most is None or all(len(tokens) <= most for tokens in drafts.values()):
        return scheduler_output
    scheduled = dict(scheduler_output.num_scheduled_tokens)
    kept = {}
    for req_id, tokens in drafts.items():
        scheduled[req_id] -= len(tokens[most:])
        if most > 0:
            kept[req_id] = tokens[:most]
    # The engine core may share the object and counts rejections by what it scheduled.
    trimmed = copy.copy(scheduler_output)
    trimmed.scheduled_spec_decode_tokens = kept
    trimmed.num_scheduled_tokens = scheduled
    trimmed.total_num_scheduled_tokens = sum(scheduled.values())
    return trimmed


def report_verified(output: Any, runner: Any) -> None:
    """In what a step's sampling returns, tells the scheduler how many nodes were verified."""
    from vllm_longspec.runtime.tree_scheduler import NUM_VERIFIED

    if output is not None:
        # One that is still being copied from the device holds what the scheduler gets.
        output = getattr(output, "model_runner_output", output)
        setattr(output, NUM_VERIFIED, runner.speculator.num_verified)


def loras_of_rows(loras: tuple[int, ...], runner: Any) -> tuple[int, ...]:
    """`loras`: of each request. Of each row of this step's logits, if it is no dummy one."""
    model_state = getattr(runner, "model_state", None)  # there is none before the cache
    num_rows = None if model_state is None else model_state.take_num_rows()
    return loras if num_rows is None else tuple(np.repeat(loras, num_rows))


def scheduler_class(base: type) -> type:
    """The scheduler of an engine with LongSpec."""
    from vllm_longspec.runtime.tree_scheduler import tree_scheduler

    return tree_scheduler(base)


def num_positions(config: Any) -> int:
    """At how many positions draft tokens are accepted: depths of a tree."""
    return most_accepted(config.menus)
