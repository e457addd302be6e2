"""What `bench throughput` does inside vLLM's worker: it makes the draft right as often as a text's.

`worker_extension_cls="vllm_longspec.bench.synthetic_worker.SyntheticAcceptance"`; nothing else
imports this module. It replaces functions when it is imported, since vLLM does so before it
captures CUDA graphs and offers a worker extension no later moment before that.
"""

from typing import Any

import torch

import vllm_longspec.verify.sampler as tree_sampler
from vllm_longspec.bench.dummy_weights import DummyWeights
from vllm_longspec.bench.synthetic import SyntheticText, agree
from vllm_longspec.draft.longspec import LongSpecDraft
from vllm_longspec.draft.lookup import Lookup

_walk, _top_tokens, _find = tree_sampler.walk, LongSpecDraft.top_tokens, Lookup.find
_texts: list[SyntheticText] = []  # at most one


def _text(device: torch.device) -> SyntheticText:
    """Made by the first proposal, which profiles memory: before any graph is captured."""
    if not _texts:
        _texts.append(SyntheticText(device))
    return _texts[0]


def top_tokens(
    draft: LongSpecDraft, hidden: torch.Tensor, next_width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    logprobs, tokens = _top_tokens(draft, hidden, next_width)
    logprobs.copy_(_text(logprobs.device).logprobs[: logprobs.shape[1]].expand_as(logprobs))
    return logprobs, tokens


def walk(
    target_tokens: torch.Tensor,
    node_tokens: torch.Tensor,
    cu_num_logits: torch.Tensor,
    idx_mapping: torch.Tensor,
    state: Any,
    max_nodes: int,
) -> Any:
    ranks = _text(target_tokens.device).draw_ranks(len(idx_mapping), max_nodes)
    parents = state.parents[idx_mapping]
    targets, nodes = agree(target_tokens, node_tokens, cu_num_logits, parents, ranks)
    return _walk(targets, nodes, cu_num_logits, idx_mapping, state, max_nodes)


def find(lookup: Lookup, *arguments: Any) -> None:
    """At its cost, but the text has no say: what dummy weights write repeats itself."""
    _find(lookup, *arguments)
    lookup.tokens.fill_(-1)
    lookup.scores.fill_(float("-inf"))
    lookup.expected.zero_()


Lookup.find = find  # type: ignore[method-assign, assignment]
LongSpecDraft.top_tokens = top_tokens  # type: ignore[method-assign, assignment]
tree_sampler.walk = walk


class SyntheticAcceptance(DummyWeights):
    """Mixed into vLLM's worker, which has `device` and `model_runner`."""

    device: torch.device
    model_runner: Any

    def synthetic_text(self, name: str, seed: int) -> None:
        """From the next step on acceptance is that of `name` of NAMED_TEXTS."""
        _text(self.device).choose(name, seed)

    def steps_by_plan(self) -> dict[str, int]:
        """Since the start; a step counts when what it accepted is known, two steps later."""
        proposer = self.model_runner.speculator
        counts = proposer.counters.by_plan[0]
        return {
            name: int(n) for name, n in zip(proposer.usual_plan.plans, counts, strict=True) if n
        }

    def expected_ms(self, num_reqs: int, num_context: int) -> dict[str, list[float]]:
        """Of a step with each plan of the batch size: of the device, and with the host."""
        proposer = self.model_runner.speculator
        controller = proposer.controller
        if controller is None:
            return {}
        device = controller.of_device(num_reqs, num_context)
        both = controller.milliseconds(num_reqs, num_context)
        return {
            proposer.usual_plan.plans[1 + plan]: [float(device[plan]), float(both[plan])]
            for plan in (-1, *proposer.menus[num_reqs])
        }
