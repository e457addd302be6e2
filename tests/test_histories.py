"""What depends on the tokens before: at each node of a tree as vLLM's own processors have it at the
end of a chain that is the node's path."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.worker.gpu.sample.bad_words import BadWordsState
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext
from vllm.v1.worker.gpu.sample.penalties import PenaltiesState
from vllm.v1.worker.gpu.sample.thinking_budget import ThinkingBudgetState

from vllm_longspec.verify.histories import BadWords, Penalties, ThinkingBudget, node_texts
from vllm_longspec.verify.tree_state import TreeState

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCAB, MAX_REQS, MAX_LEN = 40, 5, 64


def on_both(values: Any, dtype: torch.dtype) -> Any:
    """As vLLM's buffers that the host writes and kernels read."""
    gpu = torch.tensor(values, dtype=dtype, device=DEVICE)
    return SimpleNamespace(np=gpu.cpu().numpy(), gpu=gpu)


def random_tree(rng: np.random.Generator, num_nodes: int, depth: int) -> list[int]:
    """Parents, the root's first; none deeper than `depth`."""
    parents, depths = [-1], [0]
    for _ in range(num_nodes):
        parent = int(rng.choice([i for i, d in enumerate(depths) if d < depth]))
        parents.append(parent)
        depths.append(depths[parent] + 1)
    return parents


def path_to(node: int, parents: list[int]) -> list[int]:
    path: list[int] = []
    while node > 0:
        path.insert(0, node)
        node = parents[node]
    return path


class Batch:
    """Requests in slots of their own, with trees of various sizes; one has no tree."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = np.random.default_rng(seed)
        self.m, self.depth = int(rng.integers(1, 12)), int(rng.integers(1, 5))
        self.state = TreeState.allocate(MAX_REQS, self.m, self.depth, DEVICE)
        self.slots = rng.permutation(MAX_REQS)[: rng.integers(1, 4)]
        self.prompt_lens = rng.integers(1, 20, MAX_REQS)
        self.total_lens = self.prompt_lens + rng.integers(1, 30, MAX_REQS)
        text = rng.integers(0, 6, (MAX_REQS, MAX_LEN))
        self.req_states: Any = SimpleNamespace(
            max_num_reqs=MAX_REQS,
            vocab_size=VOCAB,
            device=DEVICE,
            all_token_ids=on_both(text, torch.int32),
            prompt_len=on_both(self.prompt_lens, torch.int32),
            total_len=on_both(self.total_lens, torch.int32),
        )
        self.trees: list[list[int]] = []
        tokens: list[int] = []
        for slot in self.slots:
            parents = random_tree(rng, int(rng.integers(0, self.m + 1)), self.depth)
            self.trees.append(parents)
            # Unused nodes are verified, too; what comes of them is looked at by nobody.
            unused = int(rng.integers(0, self.m + 2 - len(parents)))
            self.state.parents[slot] = -1
            self.state.parents[slot, : len(parents)] = torch.tensor(parents)
            root = int(text[slot, self.total_lens[slot] - 1])
            tokens += [root, *rng.integers(0, 6, len(parents) - 1).tolist(), *[-1] * unused]
            parents += [-1] * unused
        self.tokens = torch.tensor(tokens, dtype=torch.int32, device=DEVICE)
        self.rows = [(i, node) for i, tree in enumerate(self.trees) for node in range(len(tree))]

    def context(self, rows: list[tuple[int, int]], tokens: torch.Tensor) -> LogitsContext:
        """`rows`: request and number among its rows."""
        requests = self.slots[sorted({i for i, _ in rows})]
        idx_mapping = torch.tensor(requests, device=DEVICE)
        expanded = torch.tensor([self.slots[i] for i, _ in rows], device=DEVICE)
        local_pos = torch.tensor([node for _, node in rows], dtype=torch.int32, device=DEVICE)
        return LogitsContext(
            expanded, idx_mapping, requests, local_pos, tokens, local_pos.long(), requests
        )

    def compare(self, ours: Any, theirs: Any) -> None:
        logits = torch.tensor(self.rng.normal(size=(len(self.rows), VOCAB)), dtype=torch.float32)
        logits = logits.to(DEVICE)
        found = ours.apply(logits.clone(), self.context(self.rows, self.tokens))
        for row, (i, node) in enumerate(self.rows):
            if node > 0 and self.trees[i][node] < 0:
                continue
            path = [0, *path_to(node, self.trees[i])]
            chain = self.tokens[[row - node + step for step in path]]
            rows = [(i, step) for step in range(len(path))]
            expected = logits[row].repeat(len(path), 1)
            theirs.apply(expected, self.context(rows, chain))
            assert torch.equal(found[row], expected[-1]), (row, path)


def penalties_state(batch: Batch) -> Any:
    rng, states = batch.rng, batch.req_states
    state: Any = PenaltiesState.__new__(PenaltiesState)
    penalised = rng.random((3, MAX_REQS)) < 0.5
    values = np.where(penalised, rng.uniform(0.5, 2, (3, MAX_REQS)), [[1.0], [0.0], [0.0]])
    state.repetition_penalty, state.frequency_penalty, state.presence_penalty = (
        on_both(row, torch.float32) for row in values
    )
    state.use_penalty = penalised.any(0)
    state.output_bin_counts = torch.zeros(MAX_REQS, VOCAB, dtype=torch.int32, device=DEVICE)
    state.prompt_bin_mask = torch.zeros(MAX_REQS, 2, dtype=torch.int32, device=DEVICE)
    for slot in range(MAX_REQS):
        prompt, total = batch.prompt_lens[slot], batch.total_lens[slot]
        text = states.all_token_ids.gpu[slot].long()
        ones = torch.ones_like(text[prompt:total], dtype=torch.int32)
        state.output_bin_counts[slot].scatter_add_(0, text[prompt:total], ones)
        for token in text[:prompt].unique().tolist():
            state.prompt_bin_mask[slot, token // 32] |= 1 << token % 32
    return state


def bad_words_state(batch: Batch) -> tuple[Any, np.ndarray, np.ndarray]:
    rng = batch.rng
    state: Any = BadWordsState.__new__(BadWordsState)
    state.req_states = batch.req_states
    num_words = rng.integers(0, 4, MAX_REQS)
    tokens, offsets = np.zeros((MAX_REQS, 30)), np.zeros((MAX_REQS, 5))
    longest = np.zeros(MAX_REQS, dtype=np.int64)
    for slot, num in enumerate(num_words):
        lengths = rng.integers(1, 7, num)
        offsets[slot, 1 : num + 1] = lengths.cumsum()
        tokens[slot] = rng.integers(0, 3, 30)
        longest[slot] = max(lengths, default=0)
    state.bad_word_token_ids = on_both(tokens, torch.int32)
    state.bad_word_offsets = on_both(offsets, torch.int32)
    state.num_bad_words = on_both(num_words, torch.int32)
    return state, longest, offsets.max(1).astype(np.int64)


def thinking_state(batch: Batch) -> Any:
    rng = batch.rng
    state: Any = ThinkingBudgetState.__new__(ThinkingBudgetState)
    state.req_states, state.enabled = batch.req_states, True
    budgets = rng.integers(-1, 12, MAX_REQS)
    state.thinking_token_budget = on_both(budgets, torch.int32)
    state.use_thinking_budget = budgets >= 0
    for name, value in (("last_start", -1), ("last_end", -1), ("scan_pos", 0)):
        cached = torch.full((MAX_REQS,), value, dtype=torch.int32, device=DEVICE)
        setattr(state, f"cached_{name}", cached)
    end = rng.integers(0, 6, rng.integers(1, 4))
    markers = {
        "reasoning_start": rng.integers(0, 6, rng.integers(1, 3)),
        "reasoning_end": end,
        # A phrase may come before the end that a model writes itself.
        "natural_reasoning_end": end[-rng.integers(1, len(end) + 1) :],
    }
    for name, ids in markers.items():
        ids = torch.tensor(ids, dtype=torch.int32, device=DEVICE)
        setattr(state, f"{name}_token_ids", ids)
    return state


@given(st.integers(0, 2**32))
@settings(deadline=None, max_examples=40)
def test_texts(seed: int) -> None:
    batch = Batch(seed)
    tail = int(batch.rng.integers(0, 40))
    ctx, states = batch.context(batch.rows, batch.tokens), batch.req_states
    texts, depths = node_texts(
        batch.tokens, ctx.expanded_idx_mapping, ctx.expanded_local_pos, batch.state,
        states.all_token_ids.gpu, states.total_len.gpu, tail,
    )  # fmt: skip
    for row, (i, node) in enumerate(batch.rows):
        path = path_to(node, batch.trees[i])
        committed = states.all_token_ids.np[batch.slots[i], : batch.total_lens[batch.slots[i]]]
        tokens = batch.tokens[[row - node + step for step in path]].tolist()
        text = [*committed.tolist()[max(len(committed) - tail, 0) :], *tokens]
        padding = [-1] * (batch.depth + tail - len(text))
        if node > 0 and not path:
            continue
        assert texts[row].tolist() == [*padding, *text]
        assert depths[row] == len(path)


@given(st.integers(0, 2**32))
@settings(deadline=None, max_examples=60)
def test_penalties(seed: int) -> None:
    batch = Batch(seed)
    state = penalties_state(batch)
    batch.compare(Penalties(state, batch.req_states, batch.state), state)


@given(st.integers(0, 2**32))
@settings(deadline=None, max_examples=60)
def test_bad_words(seed: int) -> None:
    batch = Batch(seed)
    state, longest, num_tokens = bad_words_state(batch)
    ours = BadWords(state, batch.req_states, batch.state)
    ours.longest, ours.num_tokens = longest, num_tokens
    batch.compare(ours, state)


@given(st.integers(0, 2**32))
@settings(deadline=None, max_examples=100)
def test_thinking_budgets(seed: int) -> None:
    batch = Batch(seed)
    state = thinking_state(batch)
    batch.compare(ThinkingBudget(state, batch.req_states, batch.state), state)
