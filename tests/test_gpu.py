"""What only a GPU can show: compiled kernels in bf16 over FlashAttention, and full CUDA graphs."""

import math

import pytest
import torch
from helpers import TARGET, Engine, longspec, synthetic_prompt, text_prompt

from vllm_longspec.attention.reference import masked_attention
from vllm_longspec.tree.shape import ancestor_masks, mask_words

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (32, 8), (16, 2)])
def test_hybrid_attention_in_bf16(heads: tuple[int, int], head_size: int) -> None:
    """Trees of 0 to 68 nodes over prefixes of 0 to 9,000 tokens, in pages of a block-outermost
    cache, against dense masked attention in fp32 on the same bf16 inputs."""
    from vllm_longspec.attention.cuda_backend import flash_prefix_attention
    from vllm_longspec.attention.kernels import tree_attention

    generator = torch.Generator("cuda").manual_seed(head_size + heads[0])
    num_heads, num_kv_heads = heads
    prefix_lens, nodes, page = [0, 1, 517, 9000], [31, 68, 0, 31], 16

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16, generator=generator)

    pages = -(-max(prefix_lens) // page)
    table = torch.randperm(len(nodes) * pages, device="cuda", generator=generator)
    table = table.view(len(nodes), pages).int()
    # Two layers interleaved, as in the block-outermost layout.
    cache = rand(len(nodes) * pages, 2, page, num_kv_heads, 2 * head_size)[:, 1].transpose(1, 2)
    max_nodes = max(nodes) + 1
    parents = torch.full((len(nodes), max_nodes), -1, device="cuda")
    for node in range(1, max_nodes):
        parents[:, node] = torch.randint(0, node, (len(nodes),), device="cuda")
    masks = ancestor_masks(parents, max_nodes, mask_words(max_nodes - 1))
    starts = torch.tensor([0, *torch.tensor([n + 1 for n in nodes]).cumsum(0)], device="cuda")
    starts, total = starts.int(), int(starts[-1])
    # Keys and values as a target's fused projection leaves them: slices of one row.
    qkv = rand(total, num_heads + 2 * num_kv_heads, head_size)
    query, key, value = qkv.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    query = query.contiguous()
    lens = torch.tensor(prefix_lens, dtype=torch.int32, device="cuda")
    scale = head_size**-0.5
    out = torch.full_like(query, float("nan"))
    lse = flash_prefix_attention(
        query, cache, table, lens, starts, max_nodes, max(prefix_lens), scale, out
    )
    tree_attention(out, lse, query, key, value, masks, starts, lens, scale)
    assert not out.isnan().any()
    for req, prefix_len in enumerate(prefix_lens):
        rows = slice(int(starts[req]), int(starts[req + 1]))
        size = nodes[req] + 1
        tokens = cache[table[req].long()].transpose(1, 2).flatten(0, 1)[:prefix_len]
        past_key, past_value = tokens.chunk(2, dim=-1)
        tree_mask = torch.zeros(size, size, dtype=torch.bool, device="cuda")
        for node in range(size):
            ancestor = node
            while ancestor >= 0:
                tree_mask[node, ancestor] = True
                ancestor = int(parents[req, ancestor])
        expected = masked_attention(
            query[rows],
            torch.cat([past_key, key[rows]]),
            torch.cat([past_value, value[rows]]),
            torch.cat([tree_mask.new_ones(size, prefix_len), tree_mask], dim=1),
            scale,
        )
        error = (out[rows].float() - expected).norm() / expected.norm()
        assert error < 8e-3, (req, float(error))


def bf16_spacing(value: float) -> float:
    """Distance from a number to the next one in bf16."""
    return 2.0 ** (math.floor(math.log2(max(abs(value), 1e-6))) - 7)


def test_lossless_up_to_near_ties() -> None:
    """nano in bf16, full CUDA graphs for verification: where the outputs first differ, plain
    decoding's two best logits are closer than bf16 tells apart."""
    from vllm import SamplingParams

    prompts = [text_prompt(i, length) for i, length in enumerate((1, 40, 700, 1800, 3000, 3900))]
    prompts += [synthetic_prompt(i, 50 + 400 * i) for i in range(2)]
    params = [
        SamplingParams(max_tokens=96, temperature=0, ignore_eos=True, logprobs=2)
        for _ in prompts
    ]
    options = {
        "dtype": "bfloat16", "max_model_len": 8192, "max_num_seqs": 8, "enforce_eager": False,
        "kv_cache_memory_bytes": 1 << 30, "logprobs_mode": "raw_logits",
    }  # fmt: skip
    plain = Engine(**options)
    expected = plain.generate(prompts, params)
    plain.close()
    engine = Engine(longspec(), **options)
    got = engine.one_by_one(prompts[:4], params[:4]) + engine.generate(prompts[4:], params[4:])
    counters = engine.counters()
    engine.close()
    print(TARGET.name, counters)
    differing = 0
    for i, (a, b) in enumerate(zip(expected, got, strict=True)):
        at = next((j for j in range(96) if a.tokens[j] != b.tokens[j]), None)
        if at is None:
            continue
        differing += 1
        best, second = sorted(a.logprobs[at].values(), reverse=True)[:2]
        print(f"prompt {i} differs from token {at} on: logits {best} and {second}")
        assert best - second <= bf16_spacing(best)
    print(f"{len(prompts) - differing} of {len(prompts)} outputs identical, the rest near-ties")
