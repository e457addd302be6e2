"""What vLLM asks LongSpec about, as functions; `runtime/patches.py` makes vLLM ask."""

from typing import Any

from vllm_longspec.runtime.counters import shared_folder
from vllm_longspec.runtime.options import (
    METHOD,
    DraftPath,
    create_longspec_config,
    longspec_options,
)
from vllm_longspec.runtime.request_switch import check_request
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
    """Of a ModelCudaGraphManager's candidates, leave those that the schedule can produce. vLLM
    captures every batch size for every number of nodes of a schedule, though each number serves
    few: hundreds of graphs, minutes of start-up."""
    from vllm_longspec.runtime.graphs import batches_of_budgets, keep_graphs

    config = graphs.vllm_config
    if getattr(config.speculative_config, "method", None) != METHOD:
        return
    batches = batches_of_budgets(
        config.speculative_config, graphs.max_num_reqs, config.num_speculative_tokens
    )
    keep_graphs(graphs, {m + 1: sizes for m, sizes in batches.items()})
