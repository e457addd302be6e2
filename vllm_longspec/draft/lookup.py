"""Looking up what may be copied from a request's own text; `tree/lookup.py` has the plain version.

Two launches before the proposal's CUDA graph. Tensor-parallel ranks each run them and have to agree
bit for bit: no atomics, and one program learns and predicts for a request.
"""

import math

import torch
import triton
import triton.language as tl

from vllm_longspec.draft.beam import launch_or_torch
from vllm_longspec.draft.inputs import ProposalInputs
from vllm_longspec.tree.lookup import (
    BUCKETS,
    COPY_DEPTH,
    DECAY,
    MAX_MATCH,
    MIN_MATCH,
    PRIOR,
    PRIOR_WEIGHT,
    Seen,
    bucket,
    continuation,
    expected_copies,
    longest_match,
)

POSITIONS = 256  # looked at by a program at once
# Programs of a launch: several for each SM, since they wait for the host's memory, and few enough
# that those without work cost little.
PROGRAMS = 1024
MAX_SPLITS = 128

_POSITION_BITS = tl.constexpr(32)


class Lookup:
    """Persistent buffers; all but `find` and what it calls only reads them."""

    def __init__(self, max_num_reqs: int, max_model_len: int, device: torch.device) -> None:
        self.max_model_len = max_model_len

        def filled(value: float, *shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        # What is copied, in batch order.
        rows, slots = max_num_reqs, max_num_reqs + 1  # a spare slot for rows without a request
        # [max_num_reqs, COPY_DEPTH] int64; -1: none
        self.tokens = filled(-1, rows, COPY_DEPTH, dtype=torch.int64)
        # [max_num_reqs, COPY_DEPTH] float32 cumulative log-probabilities; -inf: none
        self.scores = filled(-math.inf, rows, COPY_DEPTH, dtype=torch.float32)
        # [max_num_reqs] float32 tokens of the copy expected to be right
        self.expected = filled(0, rows, dtype=torch.float32)

        # What a request showed, by slot, as long as the slot's generation is the one here: a
        # request that takes it starts afresh.
        self.generation = filled(-1, slots, dtype=torch.int32)  # [slots]
        self.copied = filled(-1, slots, COPY_DEPTH, dtype=torch.int64)  # [slots, COPY_DEPTH]
        self.length = filled(0, slots, dtype=torch.int32)  # [slots] of the match; 0: no copy
        self.root = filled(0, slots, dtype=torch.int32)  # [slots] position it followed
        self.hits = filled(0, slots, len(BUCKETS), dtype=torch.float32)  # [slots, num_buckets]
        self.tries = filled(0, slots, len(BUCKETS), dtype=torch.float32)

        # Constants: the bucket of each length, and the priors by bucket.
        self.buckets = torch.tensor(
            [bucket(n) for n in range(MAX_MATCH + COPY_DEPTH)], dtype=torch.int32, device=device
        )
        self.prior = torch.tensor(PRIOR, dtype=torch.float32, device=device)
        self.prior_weight = torch.tensor(PRIOR_WEIGHT, dtype=torch.float32, device=device)
        # The splits' best matches: length, then position.
        self.best = filled(0, rows, MAX_SPLITS, dtype=torch.int64)  # [max_num_reqs, MAX_SPLITS]

    def find(
        self,
        inputs: ProposalInputs,  # read
        all_token_ids: torch.Tensor,  # [max_num_reqs, max_model_len] int32 by slot
        generations: torch.Tensor,  # [max_num_reqs] int32 by slot; another one: another request
        num_rows: int,  # of the batch; those without a slot or a new token get no copy
    ) -> None:
        """Learns from the tokens that the last step committed and writes `tokens`, `scores` and
        `expected` of the batch's first `num_rows` rows."""
        find(self, inputs, all_token_ids, generations, num_rows)


@triton.jit(do_not_specialize=["num_new"])
def _match_kernel(
    best_ptr,
    best_stride,
    slots_ptr,
    context_lens_ptr,
    new_positions_ptr,
    num_new,
    all_token_ids_ptr,
    all_token_ids_stride,
    MATCH: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split, num_splits = tl.program_id(1), tl.num_programs(1)
    slot = tl.load(slots_ptr + row)
    # Of a prompt in pieces the newest token is not there before its last piece.
    if (slot < 0) | (tl.load(new_positions_ptr + row * num_new) < 0):
        return
    text = all_token_ids_ptr + slot * all_token_ids_stride
    root = tl.minimum(tl.load(context_lens_ptr + row), all_token_ids_stride - 1)
    back = tl.arange(0, MATCH)
    suffix = tl.load(text + root - back, mask=back <= root, other=-1)
    newest = tl.load(text + root)
    best = tl.full([POSITIONS], 0, tl.int64)
    for start in range(split * POSITIONS, root, num_splits * POSITIONS):
        position = start + tl.arange(0, POSITIONS)
        token = tl.load(text + position, mask=position < root, other=-1)
        alike = (position < root) & (token == newest)
        if tl.max(alike.to(tl.int32), axis=0) > 0:
            # All at once: the text lies in the host's memory, each load waits for it.
            other = position[:, None] - back[None, :]
            tokens = tl.load(text + other, mask=alike[:, None] & (other >= 0), other=-2)
            length = tl.min(tl.where(tokens == suffix[None, :], MATCH, back[None, :]), axis=1)
            key = (length.to(tl.int64) << _POSITION_BITS) | position.to(tl.int64)
            best = tl.maximum(best, tl.where(alike, key, 0))
    tl.store(best_ptr + row * best_stride + split, tl.max(best, axis=0))


@triton.jit(do_not_specialize=["num_new", "num_splits"])
def _copy_kernel(
    tokens_ptr,
    scores_ptr,
    expected_ptr,
    best_ptr,
    best_stride,
    slots_ptr,
    context_lens_ptr,
    new_positions_ptr,
    num_new,
    all_token_ids_ptr,
    all_token_ids_stride,
    generations_ptr,
    generation_ptr,
    copied_ptr,
    length_ptr,
    root_ptr,
    hits_ptr,
    tries_ptr,
    buckets_ptr,
    prior_ptr,
    prior_weight_ptr,
    num_splits,
    SPLITS: tl.constexpr,
    COPIES: tl.constexpr,
    NUM_BUCKETS: tl.constexpr,
    BUCKETS: tl.constexpr,
    MIN_MATCH: tl.constexpr,
    LOG2_DECAY: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, COPIES)
    slot = tl.load(slots_ptr + row)
    if (slot < 0) | (tl.load(new_positions_ptr + row * num_new) < 0):
        tl.store(tokens_ptr + row * COPIES + i, tl.full([COPIES], -1, tl.int64))
        tl.store(scores_ptr + row * COPIES + i, tl.full([COPIES], float("-inf"), tl.float32))
        tl.store(expected_ptr + row, 0.0)
        return
    text = all_token_ids_ptr + slot * all_token_ids_stride
    root = tl.minimum(tl.load(context_lens_ptr + row), all_token_ids_stride - 1)
    bucket = tl.arange(0, BUCKETS)
    in_buckets = bucket < NUM_BUCKETS
    seen = slot * NUM_BUCKETS + bucket

    # Learn.
    generation = tl.load(generations_ptr + slot)
    known = tl.load(generation_ptr + slot) == generation
    hits = tl.load(hits_ptr + seen, mask=in_buckets & known, other=0.0)
    tries = tl.load(tries_ptr + seen, mask=in_buckets & known, other=0.0)
    length = tl.load(length_ptr + slot)
    length = tl.where(known, length, 0)
    last_root = tl.load(root_ptr + slot)
    committed = (i < root - last_root) & (length > 0)
    copied = tl.load(copied_ptr + slot * COPIES + i)
    token = tl.load(text + last_root + 1 + i, mask=committed, other=-1).to(tl.int64)
    right = tl.min(tl.where(committed & (token == copied), COPIES, i), axis=0)
    of_try = tl.load(buckets_ptr + length + i)[:, None] == bucket[None, :]
    tried = committed & (i <= right)
    new_tries = tl.sum(tl.where(of_try & tried[:, None], 1.0, 0.0), axis=0)
    hit = tried & (i < right)
    new_hits = tl.sum(tl.where(of_try & hit[:, None], 1.0, 0.0), axis=0)
    decay = tl.exp2(new_tries * LOG2_DECAY)
    hits = hits * decay + new_hits
    tries = tries * decay + new_tries

    # Predict.
    split = tl.arange(0, SPLITS)
    best = tl.load(best_ptr + row * best_stride + split, mask=split < num_splits, other=0)
    best = tl.max(best, axis=0)
    length = (best >> _POSITION_BITS).to(tl.int32)
    length = tl.where(length >= MIN_MATCH, length, 0)
    position = best.to(tl.int32)
    found = (length > 0) & (i >= 0)
    token = tl.load(text + position + 1 + i % tl.maximum(root - position, 1), mask=found, other=-1)
    token = token.to(tl.int64)
    prior = tl.load(prior_ptr + bucket, mask=in_buckets, other=1.0)
    weight = tl.load(prior_weight_ptr + bucket, mask=in_buckets, other=1.0)
    log_rate = tl.log((hits + prior * weight) / (tries + weight))
    of_copy = tl.load(buckets_ptr + length + i)[:, None] == bucket[None, :]
    score = tl.cumsum(tl.sum(tl.where(of_copy, log_rate[None, :], 0.0), axis=1), axis=0)
    score = tl.where(found, score, float("-inf"))
    tl.store(tokens_ptr + row * COPIES + i, token)
    tl.store(scores_ptr + row * COPIES + i, score)
    tl.store(expected_ptr + row, tl.sum(tl.exp(score), axis=0))

    tl.debug_barrier()  # other threads have read what is replaced
    tl.store(generation_ptr + slot, generation)
    tl.store(hits_ptr + seen, hits, mask=in_buckets)
    tl.store(tries_ptr + seen, tries, mask=in_buckets)
    tl.store(copied_ptr + slot * COPIES + i, token)
    tl.store(length_ptr + slot, length)
    tl.store(root_ptr + slot, root)


def triton_find(
    lookup: Lookup,
    inputs: ProposalInputs,
    all_token_ids: torch.Tensor,  # [max_num_reqs, max_model_len] int32
    generations: torch.Tensor,  # [max_num_reqs] int32
    num_rows: int,
) -> None:
    """`Lookup.find`."""
    blocks = triton.cdiv(lookup.max_model_len, POSITIONS)
    num_splits = min(blocks, MAX_SPLITS, max(1, PROGRAMS // num_rows))
    of_both = (
        lookup.best, lookup.best.stride(0), inputs.slots, inputs.context_lens,
        inputs.new_positions, inputs.new_positions.stride(0), all_token_ids,
        all_token_ids.stride(0),
    )  # fmt: skip
    _match_kernel[(num_rows, num_splits)](
        *of_both, MATCH=MAX_MATCH, POSITIONS=POSITIONS, num_warps=8
    )
    _copy_kernel[(num_rows,)](
        lookup.tokens,
        lookup.scores,
        lookup.expected,
        *of_both,
        generations,
        lookup.generation,
        lookup.copied,
        lookup.length,
        lookup.root,
        lookup.hits,
        lookup.tries,
        lookup.buckets,
        lookup.prior,
        lookup.prior_weight,
        num_splits,
        SPLITS=MAX_SPLITS,
        COPIES=COPY_DEPTH,
        NUM_BUCKETS=len(BUCKETS),
        BUCKETS=triton.next_power_of_2(len(BUCKETS)),
        MIN_MATCH=MIN_MATCH,
        LOG2_DECAY=math.log2(DECAY),
        num_warps=1,
    )


def torch_find(
    lookup: Lookup,
    inputs: ProposalInputs,
    all_token_ids: torch.Tensor,  # [max_num_reqs, max_model_len] int32
    generations: torch.Tensor,  # [max_num_reqs] int32
    num_rows: int,
) -> None:
    """`Lookup.find`, request by request in Python."""
    for row in range(num_rows):
        slot = int(inputs.slots[row])
        lookup.tokens[row], lookup.scores[row], lookup.expected[row] = -1, -math.inf, 0
        if slot < 0 or inputs.new_positions[row, 0] < 0:
            continue
        root = min(int(inputs.context_lens[row]), all_token_ids.shape[1] - 1)
        text = all_token_ids[slot, : root + 1]
        generation, seen = int(generations[slot]), Seen.nothing()
        if lookup.generation[slot] == generation:
            seen = Seen(lookup.hits[slot].clone(), lookup.tries[slot].clone())
            length, last_root = int(lookup.length[slot]), int(lookup.root[slot])
            if length > 0:
                seen.learn(lookup.copied[slot].tolist(), length, text[last_root + 1 :].tolist())
        length, position = longest_match(text)
        lookup.length[slot] = length if length >= MIN_MATCH else 0
        lookup.copied[slot] = -1
        if length >= MIN_MATCH:
            scores = seen.scores(length)
            lookup.copied[slot] = torch.tensor(continuation(text, position))
            lookup.tokens[row] = lookup.copied[slot]
            lookup.scores[row] = torch.tensor(scores)
            lookup.expected[row] = expected_copies(scores)
        lookup.generation[slot], lookup.root[slot] = generation, root
        lookup.hits[slot], lookup.tries[slot] = seen.hits, seen.tries


find = launch_or_torch(triton_find, torch_find)
