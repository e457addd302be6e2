"""Lossless acceptance: sample the target's token at every node, then the acceptance walk.

The target's own distribution decides every token, after all of vLLM's processing and with the
noise of (seed, position, token), so a request's tokens are those of plain decoding, whatever the
tree holds. `tree/accept.py` is the plain version of the walk.
"""

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from vllm.config import SpeculativeConfig
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.sample.ops.topk_topp_triton import _SPLIT_MAX_BATCH
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.sample.states import SamplingStates
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import (
    RejectionSampler,
    get_max_chunk_logits,
)

from vllm_longspec.verify.tree_state import TreeState


@triton.jit
def _walk_kernel(
    target_tokens_ptr,
    node_tokens_ptr,
    cu_num_logits_ptr,
    idx_mapping_ptr,
    parents_ptr,
    copies_ptr,
    state_stride,
    sampled_ptr,
    sampled_stride,
    num_sampled_ptr,
    row_order_ptr,
    path_ptr,
    path_stride,
    path_len_ptr,
    num_copied_ptr,
    MAX_DEPTH: tl.constexpr,
    NODES: tl.constexpr,
):
    req = tl.program_id(0)
    row = tl.load(idx_mapping_ptr + req)
    first = tl.load(cu_num_logits_ptr + req)
    num_nodes = tl.load(cu_num_logits_ptr + req + 1) - first
    node = tl.arange(0, NODES)
    exists = (node > 0) & (node < num_nodes)
    tokens = tl.load(node_tokens_ptr + first + node, mask=exists, other=-1)
    parents = tl.load(parents_ptr + row * state_stride + node, mask=exists, other=-1)

    # Rows the walk does not visit keep their own place in the order.
    tl.store(row_order_ptr + first + node, first + node, mask=node < num_nodes)
    tl.debug_barrier()  # the walk overwrites some of these
    current = 0
    length = 0
    copied = 0
    for _ in range(MAX_DEPTH):
        token = tl.load(target_tokens_ptr + first + current)
        tl.store(sampled_ptr + req * sampled_stride + length, token)
        child = tl.min(
            tl.where((parents == current) & (tokens == token) & exists, node, NODES), axis=0
        )
        if child < NODES:
            tl.store(path_ptr + row * path_stride + length, child)
            copied += tl.load(copies_ptr + row * state_stride + child)
            length += 1
            current = child
            tl.store(row_order_ptr + first + length, first + child)
    token = tl.load(target_tokens_ptr + first + current)
    tl.store(sampled_ptr + req * sampled_stride + length, token)
    tl.store(num_sampled_ptr + req, length + 1)
    tl.store(path_len_ptr + row, length)
    tl.store(num_copied_ptr + row, copied)


def walk(
    target_tokens: torch.Tensor,  # [num_logits] int64 the target's token after each node
    node_tokens: torch.Tensor,  # [num_logits] each node's own token; -1: never accepted
    cu_num_logits: torch.Tensor,  # [num_reqs + 1] int32
    idx_mapping: torch.Tensor,  # [num_reqs] int64 request slots
    state: TreeState,  # read: parents, copies; written: path, path_len, num_copied
    max_nodes: int,  # 1 + m
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The acceptance walk of each tree. Returns (sampled [num_reqs, 1 + m] int64, num_sampled
    [num_reqs] int32, row_order [num_logits] int64: for each request first the rows whose logits its
    tokens came from)."""
    assert state.parents.stride() == state.copies.stride()
    num_reqs = idx_mapping.shape[0]
    sampled = target_tokens.new_zeros(num_reqs, max_nodes)
    num_sampled = torch.empty(num_reqs, dtype=torch.int32, device=target_tokens.device)
    row_order = torch.empty_like(target_tokens)
    _walk_kernel[(num_reqs,)](
        target_tokens,
        node_tokens,
        cu_num_logits,
        idx_mapping,
        state.parents,
        state.copies,
        state.parents.stride(0),
        sampled,
        sampled.stride(0),
        num_sampled,
        row_order,
        state.path,
        state.path.stride(0),
        state.path_len,
        state.num_copied,
        MAX_DEPTH=state.path.shape[1],
        NODES=triton.next_power_of_2(max_nodes),
    )
    return sampled, num_sampled, row_order


def mask_as_plain_decoding(
    states: SamplingStates,
    logits: torch.Tensor,  # [num_rows, vocab_size] float32 where anything is masked; overwritten
    expanded_idx_mapping: torch.Tensor,  # [num_rows] request slot of each row
    idx_mapping_np: np.ndarray,  # [num_reqs] request slots
    num_plain_rows: int,  # that plain decoding of the whole batch has
) -> torch.Tensor:  # [num_rows, vocab_size]
    """vLLM's top-k and top-p by the kernels that plain decoding takes: up to `_SPLIT_MAX_BATCH`
    rows they are others, and a verification has more rows than a plain step, its parts fewer."""
    num_rows, most = len(logits), _SPLIT_MAX_BATCH

    def mask(x: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        return states.apply_top_k_top_p(x, slots, idx_mapping_np)

    if num_plain_rows > most:
        padding = max(0, most + 1 - num_rows)
        if not padding:
            return mask(logits, expanded_idx_mapping)
        rows = torch.arange(num_rows + padding, device=logits.device).clamp(max=num_rows - 1)
        return mask(logits[rows], expanded_idx_mapping[rows])[:num_rows]
    if num_rows <= most:
        return mask(logits, expanded_idx_mapping)
    for first in range(0, num_rows, most):
        part = slice(first, first + most)
        masked = mask(logits[part], expanded_idx_mapping[part])
        if masked.data_ptr() != logits[part].data_ptr():
            logits[part] = masked
    return logits


def sample(
    processed: torch.Tensor,  # [num_rows, vocab_size] logits, temperature and all applied
    expanded_idx_mapping: torch.Tensor,  # [num_rows] request slot of each row
    temperature: torch.Tensor,  # [max_num_reqs] float32; 0: greedy
    seeds: torch.Tensor,  # [max_num_reqs] int64
    positions: torch.Tensor,  # [num_rows] int64
    use_fp64: bool,
) -> torch.Tensor:  # [num_rows] int64
    """The target's token after each node, by vLLM's noise of (seed, position, token)."""
    return gumbel_sample(
        processed,
        expanded_idx_mapping,
        temperature,
        seeds,
        positions,
        apply_temperature=False,
        is_drafting=False,
        use_fp64=use_fp64,
    )


class TreeSampler(RejectionSampler):
    """In the place of vLLM's rejection sampler, which knows chains: chunking, NaN counts, invalid
    drafts and the output's format are inherited; verification and the order of logprobs differ."""

    def __init__(
        self,
        sampler: Sampler,
        spec_config: SpeculativeConfig,
        device: torch.device,
        state: TreeState,
    ) -> None:
        super().__init__(sampler, spec_config, device)
        self.state = state
        self.row_order: torch.Tensor | None = None
        # Of the batch, of which a chunk is verified at a time: requests, log-probabilities wanted.
        self.num_reqs = 0
        self.logprobs_dims: tuple[int, int] | None = None
        self.expanded_idx_mapping: torch.Tensor | None = None  # of the chunk's rows

    def _verify(
        self,
        logits: torch.Tensor,  # [num_logits, vocab_size]
        draft_logits: torch.Tensor | None,
        draft_sampled: torch.Tensor,  # [num_logits] token of each row
        pos: torch.Tensor,  # [num_logits] as if the rows were a chain
        cu_num_logits: torch.Tensor,  # [num_reqs + 1]
        idx_mapping: torch.Tensor,  # [num_reqs]
        idx_mapping_np: np.ndarray,
        expanded_idx_mapping: torch.Tensor,  # [num_logits]
        expanded_local_pos: torch.Tensor,  # [num_logits]
        seq_lens_upper_bound_np: np.ndarray,
        verify_draft_sampled: torch.Tensor,  # [num_logits] -1: not to be accepted
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        depth = self.state.depths[expanded_idx_mapping, expanded_local_pos.long()]
        positions = torch.where(verify_draft_sampled >= 0, pos - expanded_local_pos + depth, pos)
        processed = self.sampler.apply_sampling_params(
            logits,
            expanded_idx_mapping,
            idx_mapping,
            idx_mapping_np,
            positions,
            draft_sampled,
            expanded_local_pos,
            seq_lens_upper_bound_np,
            skip_top_k_top_p=True,
        )
        states = self.sampler.sampling_states
        processed = mask_as_plain_decoding(
            states, processed, expanded_idx_mapping, idx_mapping_np, self.num_reqs
        )
        self.expanded_idx_mapping = expanded_idx_mapping
        target_tokens = sample(
            processed,
            expanded_idx_mapping,
            states.temperature.gpu,
            states.seeds.gpu,
            positions,
            self.sampler.use_fp64_gumbel,
        )
        sampled, num_sampled, self.row_order = walk(
            target_tokens,
            verify_draft_sampled,
            cu_num_logits,
            idx_mapping,
            self.state,
            self.num_speculative_steps + 1,
        )
        return processed, sampled, num_sampled

    def _verify_in_chunks(
        self, logits: torch.Tensor, input_batch: InputBatch, *args: Any, **kwargs: Any
    ) -> Any:
        self.num_reqs = input_batch.num_reqs
        self.logprobs_dims = self.sampler.get_logprobs_dims(input_batch.idx_mapping_np)
        return super()._verify_in_chunks(logits, input_batch, *args, **kwargs)

    def _get_logprobs_tensors(
        self,
        sampled: torch.Tensor,  # [num_reqs, 1 + m]
        num_sampled: torch.Tensor,  # [num_reqs]
        logits: torch.Tensor,  # [num_logits, vocab_size]
        cu_num_logits: torch.Tensor,  # [num_reqs + 1]
        cu_num_logits_np: np.ndarray,
        max_num_logprobs: int,
    ) -> LogprobsTensors | None:
        """As in plain decoding, `logprob_token_ids` included, which vLLM's own method leaves out. A
        request's first rows are taken for its tokens; the walked rows are put there."""
        if self.logprobs_dims is None:
            return None
        num_logprobs, max_token_ids = self.logprobs_dims
        num_logits, num_reqs = len(logits), len(sampled)
        offset = torch.arange(sampled.shape[1], device=sampled.device)
        place = cu_num_logits[:-1, None] + offset
        place = torch.where(offset < num_sampled[:, None], place, num_logits)
        tokens = sampled.new_zeros(num_logits + 1).scatter_(0, place.flatten(), sampled.flatten())
        return compute_topk_scores(
            logits[self.row_order],
            num_logprobs,
            tokens[:-1],
            cu_num_logits_np.tolist() if num_logits != num_reqs else None,
            logprob_token_ids_state=self.sampler.logprob_token_ids_state,
            expanded_idx_mapping=self.expanded_idx_mapping,
            max_per_req_token_ids=max_token_ids,
            logits_mode=self.sampler.logprobs_mode in ("raw_logits", "processed_logits"),
        )


def profile_verification(
    logits: torch.Tensor,  # [num_rows, vocab_size]
) -> None:
    """Beside the logits of all nodes: of vLLM's largest chunk of them a copy in float32, which is
    sampled from, and one in the order of the walk, of which log-probabilities are taken."""
    processed = logits[: get_max_chunk_logits(logits.shape[1])].float()
    in_order = processed.clone()
    in_order.topk(min(20, logits.shape[1]))
