"""What the tokens before a node do to its logits: penalties, bad words and thinking budgets.

vLLM's processors take the rows of a request for a chain. Here each node's history is the committed
text and the path to the node, as in plain decoding of that path. The state of each processor and
all of its arithmetic over whole rows stay vLLM's.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from vllm.sampling_params import SamplingParams
from vllm.v1.worker.gpu.sample.bad_words import BadWordsState, apply_bad_words
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext, LogitsProcessor
from vllm.v1.worker.gpu.sample.penalties import PenaltiesState
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.sample.thinking_budget import ThinkingBudgetState, apply_thinking_budget
from vllm.v1.worker.gpu.states import RequestState

from vllm_longspec.verify.tree_state import TreeState

FORCED = 1e9  # the logit of a forced token; vLLM's `_thinking_budget_kernel`


def follow_paths(sampler: Sampler, req_states: RequestState, state: TreeState) -> None:
    """Puts processors that know trees in the place of vLLM's own. Custom ones stay as they are."""
    histories = {PenaltiesState: Penalties, BadWordsState: BadWords}
    processors = sampler.logits_processors
    for i, processor in enumerate(processors):
        if type(processor) in histories:
            processors[i] = histories[type(processor)](processor, req_states, state)
    thinking = ThinkingBudget(sampler.thinking_budget_state, req_states, state)
    sampler.thinking_budget_state = thinking


class AlongPaths(LogitsProcessor):
    """One of vLLM's processors, and the trees that its rows may be nodes of."""

    def __init__(self, chains: Any, req_states: RequestState, state: TreeState) -> None:
        self.chains = chains
        self.req_states = req_states
        self.state = state

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        return self.chains.add_request(req_idx, sampling_params)

    def apply_staged_writes(self) -> None:
        self.chains.apply_staged_writes()

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        one_row_each = len(ctx.expanded_idx_mapping) == len(ctx.idx_mapping)
        if one_row_each or not self.is_used(ctx.idx_mapping_np):
            self.chains.apply(logits, ctx)
        else:
            self.apply_to_trees(logits, ctx)
        return logits

    def texts(self, ctx: LogitsContext, tail: int) -> tuple[torch.Tensor, torch.Tensor]:
        states = self.req_states
        return node_texts(
            ctx.input_ids, ctx.expanded_idx_mapping, ctx.expanded_local_pos, self.state,
            states.all_token_ids.gpu, states.total_len.gpu, tail,
        )  # fmt: skip

    def is_used(self, slots: np.ndarray) -> bool:
        """Whether a request asks for it."""
        raise NotImplementedError

    def apply_to_trees(self, logits: torch.Tensor, ctx: LogitsContext) -> None:
        raise NotImplementedError


class Penalties(AlongPaths):
    """Of repetition, frequency and presence: vLLM's kernel for the committed text, then the tokens
    of each path anew."""

    chains: PenaltiesState

    def is_used(self, slots: np.ndarray) -> bool:
        return bool(self.chains.use_penalty[slots].any())

    def apply_to_trees(self, logits: torch.Tensor, ctx: LogitsContext) -> None:
        paths, _ = self.texts(ctx, tail=0)
        before = logits.gather(1, paths.clamp(min=0).long())
        nothing = torch.zeros_like(ctx.expanded_local_pos)
        self.chains.apply(logits, replace(ctx, expanded_local_pos=nothing))
        penalise_paths(
            logits,
            before,
            paths,
            ctx.expanded_idx_mapping,
            self.chains.repetition_penalty.gpu,
            self.chains.frequency_penalty.gpu,
            self.chains.presence_penalty.gpu,
            self.chains.output_bin_counts,
        )


class BadWords(AlongPaths):
    """vLLM's kernel, with each node as a request of its own whose text ends with the node."""

    chains: BadWordsState

    def __init__(self, chains: BadWordsState, req_states: RequestState, state: TreeState) -> None:
        super().__init__(chains, req_states, state)
        # By slot: tokens of the longest word, and of all.
        self.longest = np.zeros(req_states.max_num_reqs, dtype=np.int64)
        self.num_tokens = np.zeros(req_states.max_num_reqs, dtype=np.int64)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        words = sampling_params.bad_words_token_ids or ()
        self.longest[req_idx] = max(map(len, words), default=0)
        self.num_tokens[req_idx] = sum(map(len, words))
        return super().add_request(req_idx, sampling_params)

    def is_used(self, slots: np.ndarray) -> bool:
        return bool(self.longest[slots].any())

    def apply_to_trees(self, logits: torch.Tensor, ctx: LogitsContext) -> None:
        words, slots = self.chains, ctx.expanded_idx_mapping
        num_words = int(words.num_bad_words.np[ctx.idx_mapping_np].max())
        num_tokens = int(self.num_tokens[ctx.idx_mapping_np].max())
        texts, depths = self.texts(ctx, tail=int(self.longest[ctx.idx_mapping_np].max()))
        length = texts.shape[1]
        prompt_lens = self.req_states.prompt_len.gpu[slots]
        num_output = self.req_states.total_len.gpu[slots] - prompt_lens + depths
        nothing = torch.zeros_like(depths)
        apply_bad_words(
            logits,
            torch.arange(len(logits), device=logits.device),
            words.bad_word_token_ids.gpu[:, :num_tokens][slots],
            words.bad_word_offsets.gpu[:, : num_words + 1][slots],
            words.num_bad_words.gpu[slots],
            texts,
            (length - num_output).clamp(min=0),
            nothing + length,
            ctx.input_ids,
            nothing,
            num_words,
        )


class ThinkingBudget(AlongPaths):
    """vLLM keeps where markers stand in the committed text; those that a path adds are found here,
    and where a budget is used up the next token of the end is forced."""

    chains: ThinkingBudgetState

    def is_used(self, slots: np.ndarray) -> bool:
        return self.chains.enabled and bool(self.chains.use_thinking_budget[slots].any())

    def apply_to_trees(self, logits: torch.Tensor, ctx: LogitsContext) -> None:
        budgets, slots = self.chains, ctx.expanded_idx_mapping
        start, end = budgets.reasoning_start_token_ids, budgets.reasoning_end_token_ids
        natural_end = budgets.natural_reasoning_end_token_ids
        apply_thinking_budget(  # of no row: it brings the committed text's markers up to date
            logits[:0],
            ctx.idx_mapping,
            slots[:0],
            budgets.thinking_token_budget.gpu,
            self.req_states.all_token_ids.gpu,
            self.req_states.total_len.gpu,
            ctx.input_ids,
            ctx.expanded_local_pos,
            budgets.cached_last_start,
            budgets.cached_last_end,
            budgets.cached_scan_pos,
            start,
            natural_end,
            end,
        )
        texts, depths = self.texts(ctx, tail=max(map(len, (start, natural_end, end))))
        lens = self.req_states.total_len.gpu[slots] + depths
        first = lens - texts.shape[1]  # position of the first column, below 0 in a short text
        last_start = torch.maximum(budgets.cached_last_start[slots], first + last(texts, start))
        last_end = torch.maximum(budgets.cached_last_end[slots], first + last(texts, natural_end))
        budget = budgets.thinking_token_budget.gpu[slots]
        used_up = (budget >= 0) & (last_start >= 0) & (last_start > last_end)
        used_up &= lens - last_start - len(start) >= budget
        begun = torch.zeros_like(lens, dtype=torch.int64)  # of the end's tokens how many are there
        for n in range(1, len(end)):
            begun = torch.where((texts[:, -n:] == end[:n]).all(1), n, begun)
        force(logits, end.long()[begun], used_up)


def last(
    texts: torch.Tensor,  # [num_rows, length] int32
    marker: torch.Tensor,  # [num_tokens] int32
) -> torch.Tensor:  # [num_rows] int64 where it begins the last time; far below 0: nowhere
    is_there = (texts.unfold(1, len(marker), 1) == marker).all(2)
    columns = torch.arange(is_there.shape[1], device=texts.device)
    return torch.where(is_there, columns, torch.iinfo(torch.int32).min).amax(1)


def force(
    logits: torch.Tensor,  # [num_rows, vocab_size] float32, written
    tokens: torch.Tensor,  # [num_rows] int64
    where: torch.Tensor,  # [num_rows] bool
) -> None:
    column = tokens[:, None]
    kept = logits.gather(1, column)
    logits.scatter_(1, column, torch.where(where[:, None], FORCED, kept))


@triton.jit(do_not_specialize=["length", "tail"])
def _node_texts_kernel(
    tokens_ptr,
    slots_ptr,
    local_pos_ptr,
    parents_ptr,
    parents_stride,
    all_token_ids_ptr,
    all_token_ids_stride,
    total_lens_ptr,
    texts_ptr,
    depths_ptr,
    length,
    tail,
    MAX_DEPTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    node = tl.load(local_pos_ptr + row)
    first = row - node
    depth = 0
    for _ in range(MAX_DEPTH):
        if node > 0:
            token = tl.load(tokens_ptr + first + node)
            tl.store(texts_ptr + (row + 1) * length - 1 - depth, token)
            depth += 1
            node = tl.load(parents_ptr + slot * parents_stride + node)
    tl.store(depths_ptr + row, depth)
    column = tl.arange(0, BLOCK)
    before_path = length - depth
    position = tl.load(total_lens_ptr + slot) - before_path + column
    committed = tl.load(
        all_token_ids_ptr + slot * all_token_ids_stride + position,
        mask=(column < before_path) & (column >= before_path - tail) & (position >= 0),
        other=-1,
    )
    tl.store(texts_ptr + row * length + column, committed, mask=column < before_path)


def node_texts(
    tokens: torch.Tensor,  # [num_rows] int32 of each row
    slots: torch.Tensor,  # [num_rows] request slot of each row
    local_pos: torch.Tensor,  # [num_rows] int32 number of each row among its request's: its node
    state: TreeState,  # read: parents
    all_token_ids: torch.Tensor,  # [max_num_reqs, max_model_len] int32 committed
    total_lens: torch.Tensor,  # [max_num_reqs] int32 committed tokens, the root included
    tail: int,  # committed tokens wanted
) -> tuple[torch.Tensor, torch.Tensor]:
    """The end of each row's text: (texts [num_rows, depth of the deepest tree + tail] int32, the
    path to the node after the last committed tokens, -1 before them; depths [num_rows] int32,
    tokens of the path)."""
    num_rows, max_depth = len(tokens), state.path.shape[1]
    length = max_depth + tail
    texts = torch.empty(num_rows, length, dtype=torch.int32, device=tokens.device)
    depths = torch.empty(num_rows, dtype=torch.int32, device=tokens.device)
    _node_texts_kernel[(num_rows,)](
        tokens,
        slots,
        local_pos,
        state.parents,
        state.parents.stride(0),
        all_token_ids,
        all_token_ids.stride(0),
        total_lens,
        texts,
        depths,
        length,
        tail,
        MAX_DEPTH=max_depth,
        BLOCK=triton.next_power_of_2(length),
        num_warps=1,
    )
    return texts, depths


@triton.jit
def _penalise_paths_kernel(
    logits_ptr,
    logits_stride,
    before_ptr,
    paths_ptr,
    slots_ptr,
    repetition_penalty_ptr,
    frequency_penalty_ptr,
    presence_penalty_ptr,
    output_bin_counts_ptr,
    output_bin_counts_stride,
    length,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    repetition = tl.load(repetition_penalty_ptr + slot)
    frequency = tl.load(frequency_penalty_ptr + slot)
    presence = tl.load(presence_penalty_ptr + slot)
    column = tl.arange(0, BLOCK)
    tokens = tl.load(paths_ptr + row * length + column, mask=column < length, other=-1)
    exists = tokens >= 0
    logits = tl.load(before_ptr + row * length + column, mask=exists, other=0.0)
    counts = tl.load(
        output_bin_counts_ptr + slot * output_bin_counts_stride + tokens, mask=exists, other=0
    )
    for other in range(length):
        counts += (tokens == tl.load(paths_ptr + row * length + other)).to(tl.int32)
    # In the order and the operations of vLLM's kernel.
    is_there = counts > 0
    if repetition != 1.0:
        scale = tl.where(is_there, repetition, 1.0)
        logits *= tl.where(logits > 0, 1.0 / scale, scale)
    logits -= frequency * counts
    logits -= presence * is_there
    tl.store(logits_ptr + row * logits_stride + tokens, logits, mask=exists)


def penalise_paths(
    logits: torch.Tensor,  # [num_rows, vocab_size] float32 the committed text's are in; written
    before: torch.Tensor,  # [num_rows, length] float32 logits of the paths' tokens without penalty
    paths: torch.Tensor,  # [num_rows, length] int32 tokens that the row follows; -1: none
    slots: torch.Tensor,  # [num_rows] request slot of each row
    repetition: torch.Tensor,  # [max_num_reqs] float32
    frequency: torch.Tensor,  # [max_num_reqs] float32
    presence: torch.Tensor,  # [max_num_reqs] float32
    output_counts: torch.Tensor,  # [max_num_reqs, vocab_size] int32 committed, without the prompt
) -> None:
    length = paths.shape[1]
    _penalise_paths_kernel[(len(logits),)](
        logits,
        logits.stride(0),
        before,
        paths,
        slots,
        repetition,
        frequency,
        presence,
        output_counts,
        output_counts.stride(0),
        length,
        BLOCK=triton.next_power_of_2(length),
        num_warps=1,
    )
