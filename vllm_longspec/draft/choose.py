"""Choosing the nodes of grown trees that the target verifies, and writing them down for it.

One launch; `tree/prune.py` has the plain versions.
"""

import torch
import triton
import triton.language as tl

from vllm_longspec.draft.beam import Nodes, TreePlan, kernel_node_bits
from vllm_longspec.draft.inputs import OFF, TREE
from vllm_longspec.tree.shape import WORD_BITS
from vllm_longspec.verify.tree_state import TreeState

PAIRS_PER_STEP = 4096  # comparisons of nodes held in registers at once
LEAST_NODES = 128  # of a block: trees of usual sizes share one compiled kernel

_TREE = tl.constexpr(TREE)
_OFF = tl.constexpr(OFF)


@triton.jit
def _path(
    scores_ptr,
    parents_ptr,
    depths_ptr,
    node,  # [NODES]
    leaf,
    max_depth,
    m,
):
    """The nodes of the first `m` levels on the path to `leaf`: a mask [NODES], and the sum of their
    probabilities, which is the number of them expected to be right."""
    on_path = node < 0
    total = 0.0
    for _ in range(max_depth):
        score = tl.load(scores_ptr + leaf)
        counts = (leaf > 0) & (tl.load(depths_ptr + leaf) <= m)
        on_path = on_path | ((node == leaf) & counts)
        total += tl.where(counts & (score == score), tl.exp(score), 0.0)
        leaf = tl.load(parents_ptr + leaf)
    return on_path, total


@triton.jit(
    do_not_specialize=[
        "nodes_stride", "ancestors_stride", "leaf", "max_depth", "m", "num_drafted", "num_nodes",
        "num_columns", "spare_row",
    ]
)  # fmt: skip
def _choose_nodes_kernel(
    node_tokens_ptr,
    node_scores_ptr,
    node_parents_ptr,
    nodes_stride,
    node_depths_ptr,
    copy_leaves_ptr,
    number_ptr,
    modes_ptr,
    slots_ptr,
    parents_ptr,
    depths_ptr,
    copies_ptr,
    state_stride,
    ancestors_ptr,
    ancestors_stride,
    draft_tokens_ptr,
    draft_tokens_stride,
    leaf,
    max_depth,
    m,
    num_drafted,
    num_nodes,
    num_columns,
    spare_row,
    NODES: tl.constexpr,
    OTHERS: tl.constexpr,
    COLUMNS: tl.constexpr,
    NUM_WORDS: tl.constexpr,
    WORDS: tl.constexpr,
    WORD_BITS: tl.constexpr,
):
    req = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + req)
    row = tl.where(slot >= 0, slot, spare_row)
    first = req * nodes_stride
    node = tl.arange(0, NODES)
    exists = (node > 0) & (node < num_nodes)

    mode = tl.load(modes_ptr + req)
    if mode != _TREE:
        drafted, drafted_sum = _path(
            node_scores_ptr + first, node_parents_ptr + first, node_depths_ptr, node,
            leaf.to(tl.int64), max_depth, m,
        )  # fmt: skip
        copied, copied_sum = _path(
            node_scores_ptr + first, node_parents_ptr + first, node_depths_ptr, node,
            tl.load(copy_leaves_ptr + req), max_depth, m,
        )  # fmt: skip
        kept = tl.where(copied_sum > drafted_sum, copied, drafted) & (mode != _OFF)
    else:
        score = tl.load(node_scores_ptr + first + node, mask=exists, other=float("-inf"))
        score = tl.where(score == score, score, float("-inf"))
        rank = tl.full([NODES], 0, tl.int32)
        for start in range(0, num_nodes, OTHERS):
            other = start + tl.arange(0, OTHERS)
            other_exists = (other > 0) & (other < num_nodes)
            other_score = tl.load(
                node_scores_ptr + first + other, mask=other_exists, other=float("-inf")
            )
            other_score = tl.where(other_score == other_score, other_score, float("-inf"))
            better = other_score[None, :] > score[:, None]
            earlier = (other_score[None, :] == score[:, None]) & (other[None, :] < node[:, None])
            before = (better | earlier) & other_exists[None, :]
            rank += tl.sum(before.to(tl.int32), axis=1)
        # A copy's place is empty where it shares a drafted node or ends.
        token = tl.load(node_tokens_ptr + first + node, mask=exists, other=-1)
        kept = (token >= 0) & (rank < m)

    # A parent is never less probable than its child and precedes it, so the kept nodes are a tree.
    number = tl.where(kept, tl.cumsum(kept.to(tl.int32), axis=0), 0)
    num_kept = tl.max(number, axis=0)
    numbers = number_ptr + req * num_nodes
    tl.store(numbers + node, number, mask=node < num_nodes)
    tl.debug_barrier()  # other threads' numbers are read below

    token = tl.load(node_tokens_ptr + first + node, mask=kept, other=-1)
    depth = tl.load(node_depths_ptr + node, mask=kept, other=0)
    parent = tl.load(node_parents_ptr + first + node, mask=kept, other=0)
    word = tl.arange(0, WORDS)
    root_bit = tl.where(word == 0, 1, 0)[None, :]
    seen = kernel_node_bits(number, word, WORD_BITS) | root_bit
    ancestor = parent
    for _ in range(max_depth - 1):
        ancestor_number = tl.load(numbers + ancestor, mask=kept, other=0)
        seen = seen | kernel_node_bits(ancestor_number, word, WORD_BITS)
        ancestor = tl.load(node_parents_ptr + first + ancestor, mask=kept, other=0)
    state_row = row * state_stride
    parent_number = tl.load(numbers + parent, mask=kept, other=0)
    tl.store(parents_ptr + state_row + number, parent_number, mask=kept)
    tl.store(depths_ptr + state_row + number, depth, mask=kept)
    tl.store(copies_ptr + state_row + number, (node >= num_drafted).to(tl.int32), mask=kept)
    tl.store(draft_tokens_ptr + req * draft_tokens_stride + number - 1, token, mask=kept)
    masks = ancestors_ptr + row * ancestors_stride + word[None, :]
    in_mask = (word < NUM_WORDS)[None, :]
    tl.store(masks + number[:, None] * NUM_WORDS, seen, mask=kept[:, None] & in_mask)

    # The root, and the columns of nodes that are not used: these see the root and themselves.
    column = tl.arange(0, COLUMNS)
    rest = ((column == 0) | (column > num_kept)) & (column < num_columns)
    tl.store(parents_ptr + state_row + column, -1, mask=rest)
    tl.store(depths_ptr + state_row + column, 0, mask=rest)
    tl.store(copies_ptr + state_row + column, 0, mask=rest)
    tl.store(
        draft_tokens_ptr + req * draft_tokens_stride + column - 1, -1, mask=rest & (column > 0)
    )
    seen = kernel_node_bits(column, word, WORD_BITS) | root_bit
    tl.store(masks + column[:, None] * NUM_WORDS, seen, mask=rest[:, None] & in_mask)


def choose_nodes(
    nodes: Nodes,
    plan: TreePlan,
    modes: torch.Tensor,  # [num_reqs] int32: TREE, CHAIN or OFF
    slots: torch.Tensor,  # [num_reqs] int64 request slots; -1: no request, the spare row
    state: TreeState,  # written: parents, depths, copies, ancestors of the slots' rows
    draft_tokens: torch.Tensor,  # [num_reqs, num_columns - 1] int64, written; -1: unused node
) -> None:
    """TREE: the `plan.m` most probable nodes, the earlier one of two equals. CHAIN: the first
    `plan.m` nodes of one path, to the most probable leaf or, where more tokens are expected to be
    right, along the copy. OFF: none. Renumbered in their order."""
    num_reqs, num_nodes = nodes.tokens.shape
    num_columns, num_words = state.ancestors.shape[1:]
    assert num_nodes == plan.num_nodes
    assert plan.m < num_columns == draft_tokens.shape[1] + 1
    assert state.parents.stride() == state.depths.stride() == state.copies.stride()
    number = torch.empty(num_reqs, num_nodes, dtype=torch.int32, device=nodes.tokens.device)
    node_block = max(LEAST_NODES, triton.next_power_of_2(num_nodes))
    _choose_nodes_kernel[(num_reqs,)](
        *nodes.launch_arguments(),
        plan.depths,
        nodes.copy_leaves,
        number,
        modes,
        slots,
        state.parents,
        state.depths,
        state.copies,
        state.parents.stride(0),
        state.ancestors,
        state.ancestors.stride(0),
        draft_tokens,
        draft_tokens.stride(0),
        plan.leaf,
        plan.max_depth,
        plan.m,
        plan.num_drafted,
        num_nodes,
        num_columns,
        state.parents.shape[0] - 1,
        NODES=node_block,
        OTHERS=min(node_block, max(1, PAIRS_PER_STEP // node_block)),
        COLUMNS=triton.next_power_of_2(num_columns),
        NUM_WORDS=num_words,
        WORDS=triton.next_power_of_2(num_words),
        WORD_BITS=WORD_BITS,
        num_warps=4 if node_block <= 1024 else 8,  # else registers spill
    )
