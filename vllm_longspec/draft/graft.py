"""Letting copies of the text into grown trees; `tree/graft.py` has the plain version."""

import torch
import triton
import triton.language as tl

from vllm_longspec.draft.beam import Nodes, TreePlan, launch_or_torch
from vllm_longspec.tree.graft import LEAST_LEFT, UNDRAFTED
from vllm_longspec.tree.graft import graft as graft_one

LEAST_NODES = 128  # of a block: trees of usual sizes share one compiled kernel


@triton.jit(do_not_specialize=["nodes_stride", "copies_stride", "num_drafted", "num_copies"])
def _graft_kernel(
    node_tokens_ptr,
    node_scores_ptr,
    node_parents_ptr,
    nodes_stride,
    copy_leaves_ptr,
    copy_tokens_ptr,
    copy_scores_ptr,
    copies_stride,
    num_drafted,
    num_copies,
    NODES: tl.constexpr,
    UNDRAFTED: tl.constexpr,
    LEAST_LEFT: tl.constexpr,
):
    req = tl.program_id(0).to(tl.int64)
    first, copies = req * nodes_stride, req * copies_stride
    node = tl.arange(0, NODES)
    exists = (node > 0) & (node < num_drafted)
    tokens = tl.load(node_tokens_ptr + first + node, mask=exists, other=-1)
    scores = tl.load(node_scores_ptr + first + node, mask=exists, other=float("-inf"))
    parents = tl.load(node_parents_ptr + first + node, mask=exists, other=-1)

    current = tl.full([], 0, tl.int64)
    score = 0.0
    above = 0.0
    drafted = 0.0  # score of the current node before
    for i in range(num_copies):
        own = first + num_drafted + i
        token = tl.load(copy_tokens_ptr + copies + i)
        copy_score = tl.load(copy_scores_ptr + copies + i)
        child = tl.full([], NODES, tl.int32)
        if (token >= 0) & (current < num_drafted):
            children = exists & (parents == current)
            child = tl.min(tl.where(children & (tokens == token), node, NODES), axis=0)
            if (child == NODES) & (tl.max(children.to(tl.int32), axis=0) > 0):
                left = 1.0
                if drafted > float("-inf"):
                    left -= tl.sum(tl.where(children, tl.exp(scores - drafted), 0.0), axis=0)
                # A comparison with NaN is false.
                score += tl.log(UNDRAFTED * tl.where(left > LEAST_LEFT, left, LEAST_LEFT))
        if token >= 0:
            score += tl.minimum(copy_score - above, 0.0)
            above = copy_score
        if child < NODES:
            drafted = tl.load(node_scores_ptr + first + child)
            drafted = tl.where(drafted == drafted, drafted, float("-inf"))
            score = tl.maximum(score, drafted)
            tl.store(node_scores_ptr + first + child, score)
        appended = (token >= 0) & (child == NODES)
        tl.store(node_tokens_ptr + own, tl.where(appended, token, -1))
        tl.store(node_scores_ptr + own, tl.where(appended, score, float("-inf")))
        tl.store(node_parents_ptr + own, tl.where(appended, current, 0))
        current = tl.where(appended, num_drafted + i, tl.where(child < NODES, child, current))
    tl.store(copy_leaves_ptr + req, current)


def triton_graft(
    nodes: Nodes,  # read: drafted nodes; written: scores of shared ones, copied nodes, copy_leaves
    plan: TreePlan,
    tokens: torch.Tensor,  # [num_reqs, plan.copies] int64 copied; -1: none from there on
    scores: torch.Tensor,  # [num_reqs, plan.copies] float32 cumulative log-probabilities
) -> None:
    """The copy of each request becomes a path of its tree. While it goes along drafted nodes these
    are shared and get at least its probability; the rest takes the tree's last columns, less
    probable where the draft has other tokens."""
    num_reqs, num_nodes = nodes.tokens.shape
    assert num_nodes == plan.num_nodes and tokens.shape == (num_reqs, plan.copies)
    assert tokens.stride() == scores.stride() and tokens.stride(1) == 1
    node_block = max(LEAST_NODES, triton.next_power_of_2(plan.num_drafted))
    _graft_kernel[(num_reqs,)](
        *nodes.launch_arguments(),
        nodes.copy_leaves,
        tokens,
        scores,
        tokens.stride(0),
        plan.num_drafted,
        plan.copies,
        NODES=node_block,
        UNDRAFTED=UNDRAFTED,
        LEAST_LEFT=LEAST_LEFT,
        # One warp needs no barrier to find a child.
        num_warps=1 if node_block <= 256 else 4,
    )


def torch_graft(
    nodes: Nodes,
    plan: TreePlan,
    tokens: torch.Tensor,  # [num_reqs, plan.copies] int64
    scores: torch.Tensor,  # [num_reqs, plan.copies] float32
) -> None:
    """`triton_graft`, request by request in Python."""
    for req in range(len(tokens)):
        rows = nodes.tokens[req], nodes.scores[req], nodes.parents[req]
        lists = [row.tolist() for row in rows]
        copy = tokens[req].tolist(), scores[req].tolist()
        nodes.copy_leaves[req] = graft_one(lists[0], lists[1], lists[2], plan.num_drafted, *copy)
        for row, values in zip(rows, lists, strict=True):
            row.copy_(torch.tensor(values, dtype=row.dtype))


graft = launch_or_torch(triton_graft, torch_graft)
