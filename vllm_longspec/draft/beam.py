"""Growing trees on the device: the most probable tokens of each row of logits, the beam over paths.

They stand between the draft layer's forwards, so what they cost is the number of their launches:
two and one. Interpreted they would take longer than the layer, so there torch does the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
import triton
import triton.language as tl

from vllm_longspec.tree.expand import expand_level
from vllm_longspec.tree.shape import WORD_BITS, level_starts, mask_words, node_bits, node_depths

TOKENS_PER_GROUP = 128
GROUPS_PER_SPLIT = 8  # 128 programs for one row of a vocabulary of 128k: as many as a GPU has SMs
# Blocks are at least so large, that trees of usual sizes share one compiled kernel.
LEAST_TOP = 16
LEAST_CANDIDATES = 256

P = ParamSpec("P")
Out = TypeVar("Out")

_NO_KEY = tl.constexpr(-(2**63))  # below the key of every number
_ANY_KEY = tl.constexpr(2**63 - 1)  # above it


@dataclass(frozen=True, eq=False)
class TreePlan:
    """The tree to grow and how much of it is verified."""

    shape: tuple[int, ...]  # of what is drafted; () where nodes are copied only
    starts: tuple[int, ...]  # first node of each level, the root's included; one past the last node
    depths: torch.Tensor  # [num_nodes] int32
    m: int  # nodes verified
    copies: int  # nodes after the drafted ones, for a copy of the text: one below the other

    @classmethod
    def build(
        cls, shape: Sequence[int], m: int, device: torch.device, copies: int = 0
    ) -> "TreePlan":
        depths = torch.cat([node_depths(shape), torch.arange(1, 1 + copies, dtype=torch.int32)])
        return cls(tuple(shape), tuple(level_starts(shape)), depths.to(device), m, copies)

    @property
    def depth(self) -> int:
        """Levels that are drafted."""
        return len(self.shape)

    @property
    def max_depth(self) -> int:
        """Of a node, be it drafted or copied."""
        return max(self.depth, self.copies)

    @property
    def num_drafted(self) -> int:
        """Nodes that are no copies, the root included."""
        return self.starts[-1]

    @property
    def num_nodes(self) -> int:
        """The root included."""
        return self.num_drafted + self.copies

    @property
    def num_expanded(self) -> int:
        """Nodes of all levels but the last, the root included."""
        return self.starts[-2] if self.shape else 1

    @property
    def leaf(self) -> int:
        """Number of the most probable node of the last level; 0 where none is drafted."""
        return self.starts[-2] if self.shape else 0


@dataclass
class Nodes:
    """Trees while they grow; column 0 is the root, the last `plan.copies` are copied nodes."""

    tokens: torch.Tensor  # [num_reqs, num_nodes] int64; the root's is not here; -1: no node
    scores: torch.Tensor  # [num_reqs, num_nodes] float32 log-probability of the node's path
    parents: torch.Tensor  # [num_reqs, num_nodes] int64 node numbers; the root is its own
    # Masks of the nodes that are expanded, all drafted ones but the last level.
    ancestors: torch.Tensor  # [num_reqs, num_expanded, num_words] int64
    # Number of the last node of the copied path, which may be a drafted one; 0: nothing is copied.
    copy_leaves: torch.Tensor  # [num_reqs] int64

    @classmethod
    def allocate(cls, num_reqs: int, plan: TreePlan) -> "Nodes":
        num_nodes, num_expanded = plan.num_nodes, plan.num_expanded
        device = plan.depths.device
        ancestors = torch.zeros(
            num_reqs, num_expanded, mask_words(num_expanded - 1), dtype=torch.int64, device=device
        )
        ancestors[:, 0, 0].fill_(1)
        allocate = torch.empty if plan.copies else torch.zeros  # where there are, `graft` writes it
        copy_leaves = allocate(num_reqs, dtype=torch.int64, device=device)
        return cls(
            tokens=torch.empty(num_reqs, num_nodes, dtype=torch.int64, device=device),
            scores=torch.zeros(num_reqs, num_nodes, dtype=torch.float32, device=device),
            parents=torch.zeros(num_reqs, num_nodes, dtype=torch.int64, device=device),
            ancestors=ancestors,
            copy_leaves=copy_leaves,
        )

    def launch_arguments(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
        """Tokens, scores, parents; the stride of their requests."""
        assert self.tokens.stride() == self.scores.stride() == self.parents.stride()
        return self.tokens, self.scores, self.parents, self.tokens.stride(0)


@triton.jit
def _sort_key(
    value,  # [...] float32
    index,  # [...] int32
):
    """int64 keys that order by value, then by lower index, so that one plain maximum finds both;
    NaN counts as -inf."""
    value = tl.where(value == value, value, float("-inf"))
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)  # -0.0 is 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (index ^ 0x7FFFFFFF).to(tl.int64)


@triton.jit
def _key_index(key):
    return (key & 0x7FFFFFFF).to(tl.int32) ^ 0x7FFFFFFF


@triton.jit
def _key_value(key):
    ordered = (key >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _largest(
    keys,  # [KEYS], all different but for _NO_KEY
    count,
    COUNT: tl.constexpr,
):
    """The `count` largest keys in order, then zeros: [COUNT]."""
    slot = tl.arange(0, COUNT)
    chosen = tl.full([COUNT], 0, tl.int64)
    best = tl.full([1], _ANY_KEY, tl.int64)
    for i in range(count):
        best = tl.max(tl.where(keys < best, keys, _NO_KEY), axis=0, keep_dims=True)
        chosen = tl.where(slot == i, best, chosen)
    return chosen


@triton.jit
def kernel_node_bits(
    node,  # [NODES]
    word,  # [WORDS]
    WORD_BITS: tl.constexpr,
):
    """Masks [NODES, WORDS] with the bit of each node set."""
    bit = tl.full(node.shape, 1, tl.int64) << (node % WORD_BITS).to(tl.int64)
    return tl.where((node // WORD_BITS)[:, None] == word[None, :], bit[:, None], 0)


@triton.jit
def _group_maxima_kernel(
    logits_ptr,
    logits_stride,
    group_max_ptr,
    split_max_ptr,
    split_sum_ptr,
    vocab_size,
    num_groups,
    num_splits,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    group = split * GROUPS + tl.arange(0, GROUPS)
    token = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    logits = tl.load(
        logits_ptr + row * logits_stride + token, mask=token < vocab_size, other=float("-inf")
    ).to(tl.float32)
    logits = tl.where(logits == logits, logits, float("-inf"))
    group_max = tl.max(logits, axis=1)
    tl.store(group_max_ptr + row * num_groups + group, group_max, mask=group < num_groups)
    split_max = tl.max(group_max, axis=0)
    # A split of nothing but -inf: exp(-inf - -inf) would be NaN.
    safe_max = tl.where(split_max == float("-inf"), 0.0, split_max)
    split_sum = tl.sum(tl.sum(tl.exp(logits - safe_max), axis=1), axis=0)
    tl.store(split_max_ptr + row * num_splits + split, split_max)
    tl.store(split_sum_ptr + row * num_splits + split, split_sum)


@triton.jit(do_not_specialize=["k", "num_chosen"])
def _top_tokens_kernel(
    logprobs_ptr,
    tokens_ptr,
    ids_ptr,
    logits_ptr,
    logits_stride,
    group_max_ptr,
    split_max_ptr,
    split_sum_ptr,
    vocab_size,
    num_groups,
    num_splits,
    k,
    num_chosen,
    SPLITS: tl.constexpr,
    GROUPS: tl.constexpr,
    CHOSEN: tl.constexpr,
    GROUP: tl.constexpr,
    TOP: tl.constexpr,
    HAS_IDS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)

    split = tl.arange(0, SPLITS)
    in_split = split < num_splits
    part = row * num_splits + split
    split_max = tl.load(split_max_ptr + part, mask=in_split, other=float("-inf"))
    split_sum = tl.load(split_sum_ptr + part, mask=in_split, other=0.0)
    row_max = tl.max(split_max, axis=0)
    safe_max = tl.where(row_max == float("-inf"), 0.0, row_max)
    row_sum = tl.sum(split_sum * tl.exp(split_max - safe_max), axis=0)
    # A row of nothing but -inf has no distribution; its tokens then get -inf.
    row_lse = safe_max + tl.log(tl.where(row_sum == 0.0, 1.0, row_sum))

    # The k most probable tokens lie in the k groups with the largest maxima.
    group = tl.arange(0, GROUPS)
    group_exists = group < num_groups
    group_max = tl.load(
        group_max_ptr + row * num_groups + group, mask=group_exists, other=float("-inf")
    )
    keys = tl.where(group_exists, _sort_key(group_max, group), _NO_KEY)
    chosen = _key_index(_largest(keys, num_chosen, CHOSEN))
    # The block's other groups are one without tokens.
    chosen = tl.where(tl.arange(0, CHOSEN) < num_chosen, chosen, num_groups)

    token = chosen[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    token_exists = token < vocab_size
    logits = tl.load(
        logits_ptr + row * logits_stride + token, mask=token_exists, other=float("-inf")
    ).to(tl.float32)
    keys = tl.where(token_exists, _sort_key(logits, token), _NO_KEY)
    best = _largest(tl.reshape(keys, (CHOSEN * GROUP,)), k, TOP)
    logprob = _key_value(best) - row_lse
    logprob = tl.where(logprob == logprob, logprob, float("-inf"))
    slot = tl.arange(0, TOP)
    tokens = _key_index(best).to(tl.int64)
    if HAS_IDS:
        tokens = tl.load(ids_ptr + tokens, mask=slot < k, other=0)
    tl.store(tokens_ptr + row * k + slot, tokens, mask=slot < k)
    tl.store(logprobs_ptr + row * k + slot, logprob, mask=slot < k)


def _top_block(count: int) -> int:
    return max(LEAST_TOP, triton.next_power_of_2(count))


def triton_top_tokens(
    logits: torch.Tensor,  # [num_rows, vocab_size]; rows may be further apart
    k: int,  # at most the vocabulary
    ids: torch.Tensor | None = None,  # [vocab_size] int64; None: a token is its column
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `k` most probable tokens of each row, most probable first and the left one of two
    equals, and their log-probabilities: (logprobs float32, tokens int64), each [num_rows, k].

    NaN counts as -inf; in a row that holds +inf all log-probabilities are -inf.
    """
    num_rows, vocab_size = logits.shape
    assert k <= vocab_size and logits.stride(1) == 1
    num_groups = triton.cdiv(vocab_size, TOKENS_PER_GROUP)
    num_splits = triton.cdiv(num_groups, GROUPS_PER_SPLIT)
    num_chosen = min(k, num_groups)
    groups = triton.next_power_of_2(num_groups)
    chosen = _top_block(num_chosen)
    group_max = torch.empty(num_rows, num_groups, dtype=torch.float32, device=logits.device)
    split_max = torch.empty(num_rows, num_splits, dtype=torch.float32, device=logits.device)
    split_sum = torch.empty_like(split_max)
    of_both = (
        logits, logits.stride(0), group_max, split_max, split_sum, vocab_size, num_groups,
        num_splits,
    )  # fmt: skip
    _group_maxima_kernel[(num_rows, num_splits)](
        *of_both, GROUPS=GROUPS_PER_SPLIT, GROUP=TOKENS_PER_GROUP
    )
    logprobs = torch.empty(num_rows, k, dtype=torch.float32, device=logits.device)
    tokens = torch.empty(num_rows, k, dtype=torch.int64, device=logits.device)
    _top_tokens_kernel[(num_rows,)](
        logprobs,
        tokens,
        tokens if ids is None else ids,
        *of_both,
        k,
        num_chosen,
        SPLITS=triton.next_power_of_2(num_splits),
        GROUPS=groups,
        CHOSEN=chosen,
        GROUP=TOKENS_PER_GROUP,
        TOP=_top_block(k),
        HAS_IDS=ids is not None,
        num_warps=4 if max(groups, chosen * TOKENS_PER_GROUP) <= 2048 else 8,
    )
    return logprobs, tokens


def torch_top_tokens(
    logits: torch.Tensor,  # [num_rows, vocab_size]
    k: int,
    ids: torch.Tensor | None = None,  # [vocab_size] int64
) -> tuple[torch.Tensor, torch.Tensor]:
    """`triton_top_tokens`, but of equals any may come first."""
    logits = logits.float()
    logits = torch.where(logits.isnan(), float("-inf"), logits)
    top, tokens = logits.topk(k, dim=-1)
    logprobs = top - logits.logsumexp(dim=-1, keepdim=True)
    logprobs = torch.where(logprobs.isnan(), float("-inf"), logprobs)
    return logprobs, tokens if ids is None else ids[tokens]


@triton.jit(
    do_not_specialize=[
        "nodes_stride", "ancestors_stride", "first", "width", "k", "next_width", "num_expanded",
    ]
)  # fmt: skip
def _expand_kernel(
    node_tokens_ptr,
    node_scores_ptr,
    node_parents_ptr,
    nodes_stride,
    ancestors_ptr,
    ancestors_stride,
    level_tokens_ptr,
    top_logprobs_ptr,
    top_tokens_ptr,
    first,
    width,
    k,
    next_width,
    num_expanded,
    CANDIDATES: tl.constexpr,
    NEXT_WIDTH: tl.constexpr,
    NUM_WORDS: tl.constexpr,
    WORDS: tl.constexpr,
    WORD_BITS: tl.constexpr,
):
    req = tl.program_id(0).to(tl.int64)
    nodes, top = req * nodes_stride, req * width * k
    candidate = tl.arange(0, CANDIDATES)
    exists = candidate < width * k
    score = tl.load(
        node_scores_ptr + nodes + first + candidate // k, mask=exists, other=0.0
    ) + tl.load(top_logprobs_ptr + top + candidate, mask=exists, other=0.0)
    keys = tl.where(exists, _sort_key(score, candidate), _NO_KEY)

    best = _largest(keys, next_width, NEXT_WIDTH)
    slot = tl.arange(0, NEXT_WIDTH)
    exists = slot < next_width
    candidate = _key_index(best)
    parent = first + candidate // k
    node = first + width + slot
    token = tl.load(top_tokens_ptr + top + candidate, mask=exists, other=0)
    tl.store(node_tokens_ptr + nodes + node, token, mask=exists)
    tl.store(node_scores_ptr + nodes + node, _key_value(best), mask=exists)
    tl.store(node_parents_ptr + nodes + node, parent.to(tl.int64), mask=exists)
    tl.store(level_tokens_ptr + req * next_width + slot, token, mask=exists)
    if first + width < num_expanded:  # the last level's nodes are never expanded
        word = tl.arange(0, WORDS)
        in_mask = exists[:, None] & (word < NUM_WORDS)[None, :]
        masks = ancestors_ptr + req * ancestors_stride + word[None, :]
        seen = tl.load(masks + parent[:, None] * NUM_WORDS, mask=in_mask, other=0)
        seen = seen | kernel_node_bits(node, word, WORD_BITS)
        tl.store(masks + node[:, None] * NUM_WORDS, seen, mask=in_mask)


def triton_expand(
    nodes: Nodes,  # read: the level to expand; written: the level after it
    top_logprobs: torch.Tensor,  # [num_reqs * width, k] float32 of the tokens after each node
    top_tokens: torch.Tensor,  # [num_reqs * width, k] int64
    first: int,  # node number of the level to expand
    next_width: int,  # at most width * k
) -> torch.Tensor:  # [num_reqs, next_width] int64 tokens of the new nodes
    """The `next_width` most probable (node, token) pairs become the next level, most probable
    first and the earlier one of two equals. No score may be NaN, and `top_tokens` yields none."""
    num_reqs = nodes.tokens.shape[0]
    num_rows, k = top_tokens.shape
    width = num_rows // num_reqs
    assert next_width <= width * k
    assert top_logprobs.is_contiguous() and top_tokens.is_contiguous()
    num_expanded, num_words = nodes.ancestors.shape[1:]
    level_tokens = torch.empty(num_reqs, next_width, dtype=torch.int64, device=top_tokens.device)
    candidates = max(LEAST_CANDIDATES, triton.next_power_of_2(width * k))
    _expand_kernel[(num_reqs,)](
        *nodes.launch_arguments(),
        nodes.ancestors,
        nodes.ancestors.stride(0),
        level_tokens,
        top_logprobs,
        top_tokens,
        first,
        width,
        k,
        next_width,
        num_expanded,
        CANDIDATES=candidates,
        NEXT_WIDTH=_top_block(next_width),
        NUM_WORDS=num_words,
        WORDS=triton.next_power_of_2(num_words),
        WORD_BITS=WORD_BITS,
        # One warp needs no barrier to find a maximum.
        num_warps=1 if candidates <= 512 else 8,
    )
    return level_tokens


def torch_expand(
    nodes: Nodes,
    top_logprobs: torch.Tensor,  # [num_reqs * width, k] float32
    top_tokens: torch.Tensor,  # [num_reqs * width, k] int64
    first: int,
    next_width: int,
) -> torch.Tensor:  # [num_reqs, next_width] int64
    """`triton_expand`, but of equals any may come first."""
    num_reqs = nodes.tokens.shape[0]
    width = top_tokens.shape[0] // num_reqs
    level = slice(first + width, first + width + next_width)
    tokens, scores, parents = expand_level(
        nodes.scores[:, first : first + width],
        top_logprobs.view(num_reqs, width, -1),
        top_tokens.view(num_reqs, width, -1),
        next_width,
    )
    parents = parents + first
    nodes.tokens[:, level], nodes.scores[:, level], nodes.parents[:, level] = (
        tokens, scores, parents,
    )  # fmt: skip
    num_expanded, num_words = nodes.ancestors.shape[1:]
    if level.start < num_expanded:
        number = torch.arange(level.start, level.stop, device=parents.device)
        seen = nodes.ancestors.gather(1, parents[..., None].expand(-1, -1, num_words))
        nodes.ancestors[:, level] = seen | node_bits(number, num_words)
    return tokens


def launch_or_torch(launch: Callable[P, Out], in_torch: Callable[P, Out]) -> Callable[P, Out]:
    """`launch`, or where kernels are interpreted `in_torch`."""

    def either(*args: P.args, **kwargs: P.kwargs) -> Out:
        return (in_torch if triton.knobs.runtime.interpret else launch)(*args, **kwargs)

    return either


top_tokens = launch_or_torch(triton_top_tokens, torch_top_tokens)
expand = launch_or_torch(triton_expand, torch_expand)
