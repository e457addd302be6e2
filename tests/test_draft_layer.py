"""The served layer and the trained layer against the plain one (`draft/reference.py`)."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

from vllm_longspec.config import LongSpecConfig
from vllm_longspec.draft.reference import draft_layer
from vllm_longspec.errors import LongSpecError
from vllm_longspec.train.model import DraftLayer, init_weights
from vllm_longspec.tree.shape import ancestor_masks, level_starts, mask_words

WINDOW = 64
VOCAB = 300
TOLERANCE = 1e-4
PROMPTS = [WINDOW // 3, WINDOW, 5 * WINDOW + 7]
MAX_POSITION = 4096


def small_config(num_heads: int, num_kv_heads: int, head_dim: int) -> LongSpecConfig:
    return LongSpecConfig(
        vocab_size=VOCAB,
        hidden_size=96,
        intermediate_size=160,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=1e-5,
        max_position_embeddings=MAX_POSITION,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        window=WINDOW,
    )


def random_layer(config: LongSpecConfig) -> DraftLayer:
    """Weights large enough that every part of the layer matters."""
    generator = torch.Generator().manual_seed(1)
    layer = DraftLayer(config)
    init_weights(layer, generator)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.15 + (
            1.0 if parameter.dim() == 1 and parameter.numel() == config.hidden_size else 0.0
        )
    return layer.requires_grad_(False)


@pytest.mark.parametrize("shift", [1, 4])
@pytest.mark.parametrize("length", PROMPTS)
def test_transformers_layer(length: int, shift: int) -> None:
    config = small_config(4, 2, 32)
    layer = random_layer(config)
    generator = torch.Generator().manual_seed(2)
    embeddings = torch.randn(2, length, config.hidden_size, generator=generator)
    key, value = (torch.randn(2, 2, length, 32, generator=generator) for _ in range(2))
    positions = torch.stack([torch.arange(length), torch.arange(length) + 1000])
    got = layer(embeddings, positions, key, value, shift)

    index = torch.arange(length)
    distance = index[:, None] - index[None, :]
    for row in range(2):
        expected = draft_layer(
            layer.state_dict(),
            config,
            embeddings[row],
            positions[row],
            (distance >= 0) & (distance <= WINDOW),
            key[row].transpose(0, 1),
            value[row].transpose(0, 1),
            distance >= shift,
        )
        assert (got[row] - expected).abs().max() < TOLERANCE


@pytest.fixture(scope="module")
def vllm_context(tmp_path_factory) -> Iterator[None]:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        init_distributed_environment,
        initialize_model_parallel,
    )

    with set_current_vllm_config(VllmConfig()):
        store = tmp_path_factory.mktemp("dist") / "store"
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        init_distributed_environment(1, 0, f"file://{store}", 0, backend)
        initialize_model_parallel(1)
        yield
        cleanup_dist_env_and_memory()


def served_layer(config: LongSpecConfig, quantization: str | None = None) -> Any:
    from vllm_longspec.draft.model import LongSpecDraftModel

    return LongSpecDraftModel(
        vllm_config=SimpleNamespace(
            speculative_config=SimpleNamespace(
                draft_model_config=SimpleNamespace(hf_config=config), quantization=quantization
            ),
            model_config=SimpleNamespace(max_model_len=MAX_POSITION),
        )
    )


def load(model: Any, trained: DraftLayer) -> None:
    model.load_weights(trained.state_dict().items())
    for module in model.modules():
        if hasattr(module, "quant_method"):
            module.quant_method.process_weights_after_loading(module)


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp32: FlashAttention has no such kernel")
@pytest.mark.parametrize("heads", [(3, 1, 64), (4, 4, 32), (4, 1, 128)])
@pytest.mark.parametrize("tree_shape", [(4, 6, 5), (1, 1, 1, 1, 1)])
def test_vllm_layer(vllm_context, tree_shape: tuple[int, ...], heads) -> None:
    """Three requests at once, with prompts shorter than, equal to and far longer than the window;
    ring of two blocks, target cache in shuffled pages."""
    from vllm.model_executor.layers.rotary_embedding import get_rope

    from vllm_longspec.draft.longspec import LongSpecDraft
    from vllm_longspec.draft.model import RingTokens, TargetParts

    num_heads, num_kv_heads, head_dim = heads
    config = small_config(num_heads, num_kv_heads, head_dim)
    trained = random_layer(config)
    generator = torch.Generator().manual_seed(3)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    embedding = rand(VOCAB, config.hidden_size)
    model = served_layer(config)
    load(model, trained)
    rope = get_rope(head_dim, MAX_POSITION, rope_parameters=config.rope_parameters)
    model.target = TargetParts(lambda ids: embedding[ids], None, lambda h: h, rope)

    num_reqs, page, ring_blocks = len(PROMPTS), 16, 2
    prompts = [torch.randint(0, VOCAB, (n,), generator=generator) for n in PROMPTS]
    target_kv = [rand(n, num_kv_heads, 2 * head_dim) for n in PROMPTS]
    pages_each = -(-max(PROMPTS) // page)
    table = torch.randperm(num_reqs * pages_each, generator=generator).view(num_reqs, -1).int()
    cache = torch.zeros(num_reqs * pages_each, page, num_kv_heads, 2 * head_dim)
    for req, tokens in enumerate(target_kv):
        for position, cell in enumerate(tokens):
            cache[table[req, position // page], position % page] = cell
    ring = rand(num_reqs * ring_blocks, WINDOW // ring_blocks, num_kv_heads, 2 * head_dim)
    ring_table = torch.randperm(num_reqs * ring_blocks, generator=generator).view(num_reqs, -1)
    model.ring = SimpleNamespace(kv_cache=ring.transpose(1, 2))

    starts = level_starts(tree_shape)
    draft = LongSpecDraft.__new__(LongSpecDraft)
    vars(draft).update(
        model=model,
        block_tables=SimpleNamespace(input_block_tables=[table, ring_table.int()]),
        target_group=0,
        ring_group=1,
        blocks_per_ring=ring_blocks,
        target_cache=lambda: cache.transpose(1, 2),
        max_model_len=MAX_POSITION,
    )
    for req, prompt in enumerate(prompts):
        positions = torch.arange(max(0, len(prompt) - WINDOW), len(prompt))
        rows = torch.full_like(positions, req)
        table = draft.ring_table()
        model.write_ring(RingTokens(prompt[positions], rows, positions, table))

    num_nodes = starts[-1]
    tokens = torch.randint(0, VOCAB, (num_reqs, num_nodes), generator=generator)
    parents = torch.full((num_reqs, num_nodes), -1)
    depths = torch.zeros(num_nodes, dtype=torch.int64)
    for level in range(1, len(tree_shape) + 1):
        low, high = (starts[level - 2] if level > 1 else 0), starts[level - 1]
        width = starts[level] - starts[level - 1]
        parents[:, high : high + width] = torch.randint(
            low, high, (num_reqs, width), generator=generator
        )
        depths[high : high + width] = level
    ancestors = ancestor_masks(parents, len(tree_shape), mask_words(num_nodes - 1))
    context_lens = torch.tensor(PROMPTS, dtype=torch.int32)
    tree_key, tree_value = (
        torch.zeros(num_reqs, num_nodes, num_kv_heads, head_dim) for _ in range(2)
    )
    got = torch.cat(
        [
            draft.forward_level(
                tokens[:, first : first + width],
                context_lens,
                tree_key,
                tree_value,
                ancestors,
                first,
                depth,
            ).view(num_reqs, width, -1)
            for depth, (first, width) in enumerate(
                zip([0, *starts[:-1]], [1, *tree_shape], strict=True)
            )
        ],
        dim=1,
    )

    for req, prompt in enumerate(prompts):
        n = len(prompt)
        everything = torch.cat([prompt, tokens[req]])
        positions = torch.cat([torch.arange(n), n + depths])
        mask = torch.zeros(n + num_nodes, n + num_nodes, dtype=torch.bool)
        for node in range(num_nodes):
            mask[n + node, :n] = torch.arange(n) >= n + depths[node] - WINDOW
            ancestor = node
            while ancestor >= 0:
                mask[n + node, n + ancestor] = True
                ancestor = int(parents[req, ancestor])
        target_key, target_value = target_kv[req].chunk(2, dim=-1)
        expected = draft_layer(
            trained.state_dict(),
            config,
            embedding[everything],
            positions,
            mask,
            target_key,
            target_value,
            torch.ones(n + num_nodes, n, dtype=torch.bool),
        )
        assert (got[req] - expected[n:]).abs().max() < TOLERANCE


@pytest.mark.skipif(torch.cuda.is_available(), reason="weights are made on the CPU")
def test_new_tokens_with_the_root(vllm_context) -> None:
    """In one pass what two passes do: the committed tokens into the ring, the roots through the
    layer, keys and values into the tree's buffers."""
    from vllm.model_executor.layers.rotary_embedding import get_rope

    from vllm_longspec.draft.model import RingTokens, TargetParts

    config = small_config(4, 2, 32)
    model = served_layer(config)
    load(model, random_layer(config))
    generator = torch.Generator().manual_seed(8)
    embedding = torch.randn(VOCAB, config.hidden_size, generator=generator)
    rope = get_rope(32, MAX_POSITION, rope_parameters=config.rope_parameters)
    model.target = TargetParts(lambda ids: embedding[ids], None, lambda h: h, rope)
    positions = torch.tensor([70, 5])
    new = RingTokens(
        torch.arange(6),
        torch.tensor([0, 0, 0, 1, 1, 1]),
        torch.tensor([69, 68, -1, 4, -1, -1]),
        torch.tensor([[1], [0]], dtype=torch.int32),
    )
    results = []
    for together in (False, True):
        ring = torch.zeros(2, WINDOW, 2, 64).transpose(1, 2)
        model.ring = SimpleNamespace(kv_cache=ring)
        tree_kv = torch.zeros(2, 2, 5, 2, 32)
        if not together:
            model.write_ring(new)
        hidden = model(
            torch.tensor([7, 8]),
            positions,
            lambda query, key, value, ring=ring: query + ring.sum(),
            lambda query: query,
            (tree_kv[0, :, 1:2], tree_kv[1, :, 1:2]),
            new if together else None,
        )
        results.append((hidden, ring, tree_kv))
    assert results[0][1][1, :, 68 % WINDOW].any() and results[0][2][:, :, 1].all()
    for apart, at_once in zip(*results, strict=True):
        torch.testing.assert_close(at_once, apart, atol=1e-5, rtol=1e-5)


IDS = torch.tensor([0, 3, 7, 40, 150, 151, 152, 298, 299])


def target_with_head(weight: torch.Tensor) -> Any:  # [VOCAB, hidden_size]
    from vllm.model_executor.layers.logits_processor import LogitsProcessor
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    head = ParallelLMHead(*weight.shape)  # padded to 320 tokens
    head.weight_loader(head.weight, weight)
    head.quant_method.process_weights_after_loading(head)
    target: Any = nn.Module()
    target.lm_head, target.logits_processor = head, LogitsProcessor(VOCAB, scale=0.25)
    target.load_weights = lambda weights: None
    return target


def test_trimmed_head(vllm_context) -> None:
    """The log-probabilities are those of a softmax over the kept tokens' logits."""
    from vllm_longspec.draft.model import TargetParts

    config = small_config(4, 2, 32)
    config.draft_vocab_size = len(IDS)
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(VOCAB, config.hidden_size, generator=generator)
    hidden = torch.randn(5, config.hidden_size, generator=generator)
    target = target_with_head(weight)
    parts = TargetParts(
        lambda ids: ids, None, lambda h: target.logits_processor(target.lm_head, h), lambda *_: ()
    )
    weights = random_layer(config).state_dict()
    del weights["draft_token_ids"]
    with pytest.raises(LongSpecError, match="draft_token_ids: the checkpoint lacks"):
        served_layer(config).load_weights(weights.items())

    model = served_layer(config)
    assert model.draft_vocab_size == VOCAB
    model.load_weights([*weights.items(), ("draft_token_ids", IDS)])
    model.share_target(target, parts)
    assert model.draft_vocab_size == len(IDS)
    logits = parts.compute_logits(hidden)
    logprobs, tokens = model.top_tokens(hidden, 6)
    expected, columns = logits[:, IDS].log_softmax(-1).topk(6)
    assert torch.equal(tokens, IDS[columns])
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=1e-5)

    # A quantised head cannot be taken apart; nor can one that is not there.
    quantised = nn.Module()
    quantised.lm_head = nn.Module()
    for other in (quantised, nn.Module()):
        model.share_target(other, parts)
        assert model.draft_vocab_size == VOCAB
        logprobs, tokens = model.top_tokens(hidden, 6)
        expected, best = logits.log_softmax(-1).topk(6)
        assert torch.equal(tokens, best)
        torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=1e-5)


def test_trimmed_head_of_shards(vllm_context) -> None:
    """Every rank holds all kept rows, each summed from the shards of two ranks."""
    from vllm_longspec.draft import model

    weight = torch.randn(VOCAB, 96, generator=torch.Generator().manual_seed(6))
    whole = target_with_head(weight)
    hidden = torch.randn(4, 96)
    expected = whole.logits_processor(whole.lm_head, hidden)[:, IDS]
    sent: list[torch.Tensor] = []

    def all_reduce(rows: torch.Tensor) -> torch.Tensor:
        sent.append(rows)
        return torch.stack(sent).sum(0)

    for rank in range(2):
        target = target_with_head(weight)
        head, size = target.lm_head, 160  # 300 padded to 320
        head.tp_size = 2
        head.weight.data = head.weight[rank * size : (rank + 1) * size]
        head.shard_indices = head._get_indices(320, 320, VOCAB, VOCAB, rank, 2)
        with patch.object(model, "tensor_model_parallel_all_reduce", all_reduce):
            trimmed = model.copied_head(target, IDS, False)
    assert trimmed is not None
    got = whole.logits_processor(trimmed, hidden)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp32; test_fp8.py has the GPU's kernels")
def test_layer_in_fp8(vllm_context) -> None:
    """Every matrix of the layer is rounded, and what comes out stays near. With kernels that
    round before each product, as on a GPU, the layer is the same."""
    from vllm.model_executor.layers.rotary_embedding import get_rope

    from vllm_longspec.draft import fp8
    from vllm_longspec.draft.model import TargetParts

    config = small_config(4, 2, 32)
    generator = torch.Generator().manual_seed(9)
    embedding = torch.randn(VOCAB, config.hidden_size, generator=generator)
    rope = get_rope(32, MAX_POSITION, rope_parameters=config.rope_parameters)

    def run(
        model: Any, rounded_to: torch.dtype = fp8.E4M3, table: torch.Tensor | None = None
    ) -> torch.Tensor:
        model.target = TargetParts(lambda ids: embedding[ids], table, lambda h: h, rope)
        tree_kv = torch.zeros(2, 5, 1, 2, 32)
        with patch.object(fp8, "E4M3", rounded_to):
            hidden = model(
                torch.tensor([7, 8, 200, 3, 40]),
                torch.arange(5),
                lambda query, key, value: query,
                lambda query: query,
                (tree_kv[0], tree_kv[1]),
            )
        return torch.cat([hidden.flatten(), tree_kv.flatten()])

    exact, model = served_layer(config), served_layer(config, "fp8")
    trained = random_layer(config)
    load(exact, trained)
    load(model, trained)
    matrices = [p for p in model.parameters() if p.dim() == 2 and p.shape[1] > 1]
    assert len(matrices) == 6
    for matrix in matrices:
        again, scale = fp8.quantise_rows(matrix)  # rounded numbers stay
        torch.testing.assert_close(again.float() * scale, matrix, rtol=1e-5, atol=1e-6)
    assert 1e-4 < (run(model) - run(exact)).norm() / run(exact).norm() < 0.12

    # Interpreted, kernels cannot round to FP8.
    unrounded = run(model, torch.float32)
    model.fused_fp8 = True
    for table in (None, embedding):
        fused = run(model, torch.float32, table)
        torch.testing.assert_close(fused, unrounded, rtol=1e-4, atol=1e-4)


def test_head_in_fp8(vllm_context) -> None:
    """All of the target's or the kept rows; no copy where vLLM multiplies by the head itself."""
    from vllm_longspec.draft.model import copied_head

    generator = torch.Generator().manual_seed(2)
    target = target_with_head(torch.randn(VOCAB, 96, generator=generator))
    hidden = torch.randn(7, 96, generator=generator)
    exact = target.logits_processor(target.lm_head, hidden)
    assert copied_head(target, None, in_fp8=False) is None
    for ids in (None, IDS):
        head = copied_head(target, ids, in_fp8=True)
        assert head is not None
        wanted = exact if ids is None else exact[:, ids]
        got = target.logits_processor(head, hidden)[:, : wanted.shape[1]]
        assert len(head.weight) % 16 == 0
        assert 1e-4 < (got - wanted).norm() / wanted.norm() < 0.05
    target.logits_processor.head_dtype = torch.float64
    assert copied_head(target, None, in_fp8=True) is None
    kept = copied_head(target, IDS, in_fp8=True)
    assert kept is not None
    got = target.logits_processor(kept, hidden).float()
    torch.testing.assert_close(got, exact[:, IDS], atol=1e-5, rtol=1e-5)


def test_a_layer_whose_sizes_fp8_products_do_not_take(vllm_context) -> None:
    config = small_config(4, 2, 32)
    assert served_layer(config, "fp8").in_fp8
    config.intermediate_size = 168  # a multiple of 8
    layer = served_layer(config, "fp8")
    assert not layer.in_fp8 and not layer.fused_fp8
    methods = {type(m.quant_method).__name__ for m in layer.modules() if hasattr(m, "quant_method")}
    assert methods == {"UnquantizedLinearMethod"}


@pytest.mark.parametrize("in_fp8", [False, True])
def test_a_head_is_copied_again_when_the_target_is_loaded_again(vllm_context, in_fp8) -> None:
    """By whichever way the weights came."""
    from vllm_longspec.draft.model import TargetParts

    config = small_config(4, 2, 32)
    config.draft_vocab_size = len(IDS)
    generator = torch.Generator().manual_seed(8)
    target = target_with_head(torch.randn(VOCAB, config.hidden_size, generator=generator))
    model = served_layer(config, "fp8" if in_fp8 else None)
    model.draft_token_ids.copy_(IDS)
    model.share_target(target, TargetParts(lambda x: x, None, lambda x: x, lambda *_: ()))
    assert {n for n, _ in model.named_parameters() if n.startswith("copied_head")}
    hidden = torch.randn(5, config.hidden_size, generator=generator)

    def error() -> float:
        exact = 0.25 * hidden @ target.lm_head.weight[IDS].T
        return float((model.own_logits(hidden) - exact).norm() / exact.norm())

    model.refresh_head()
    assert error() < 0.05
    for by_loading in (True, False):
        new = torch.randn(target.lm_head.weight.shape, generator=generator)
        if by_loading:
            target.load_weights([])
            target.lm_head.weight.data.copy_(new)
        else:
            with torch.no_grad():
                target.lm_head.weight.copy_(new)
        assert error() > 0.5
        model.refresh_head()
        assert error() < 0.05


def test_embedding_table(vllm_context) -> None:
    """Found where to embed is to look up; not where rows are scaled, held by another rank or
    quantised."""
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    from vllm_longspec.draft.longspec import embedding_table

    layer = VocabParallelEmbedding(VOCAB, 96)
    layer.weight.data.normal_()
    target = SimpleNamespace(model=SimpleNamespace(embed_tokens=layer), embed_input_ids=layer)
    assert embedding_table(target) is layer.weight
    target.embed_input_ids = lambda ids: 2 * layer(ids)
    assert embedding_table(target) is None
    target.embed_input_ids = layer
    layer.tp_size = 2
    assert embedding_table(target) is None
    layer.tp_size, layer.quant_method = 1, None
    assert embedding_table(target) is None
    assert embedding_table(SimpleNamespace()) is None
