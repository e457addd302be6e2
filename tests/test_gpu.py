"""What only a GPU can show: compiled kernels in bf16 over FlashAttention, and full CUDA graphs."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    TARGET,
    Engine,
    assert_same_up_to_near_ties,
    bf16_spacing,
    longspec,
    synthetic_prompt,
    text_prompt,
)
from openai import OpenAI

from vllm_longspec.attention.reference import masked_attention
from vllm_longspec.config import draft_config_for
from vllm_longspec.eval.server import Server, running_servers
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


def test_lossless_up_to_near_ties() -> None:
    """nano in bf16, full CUDA graphs for verification: where the outputs first differ, plain
    decoding's two best logits are closer than bf16 tells apart."""
    from vllm import SamplingParams

    prompts = [text_prompt(i, length) for i, length in enumerate((1, 40, 700, 1800, 3000, 3900))]
    prompts += [synthetic_prompt(i, 50 + 400 * i) for i in range(2)]
    # The last two draft chains.
    penalties: list[dict[str, float]] = [{}] * 6 + [
        {"repetition_penalty": 1.2}, {"frequency_penalty": 0.7},
    ]  # fmt: skip
    params = [
        SamplingParams(max_tokens=96, temperature=0, ignore_eos=True, logprobs=2, **penalty)
        for penalty in penalties
    ]
    options = {
        "dtype": "bfloat16", "max_model_len": 8192, "max_num_seqs": 8, "enforce_eager": False,
        "kv_cache_memory_bytes": 1 << 30, "logprobs_mode": "processed_logits",
        "gpu_memory_utilization": 0.05,
    }  # fmt: skip
    plain = Engine(**options)
    expected = plain.generate(prompts, params)
    plain.close()
    engine = Engine(longspec(), **options)
    got = engine.one_by_one(prompts[:4], params[:4]) + engine.generate(prompts[4:], params[4:])
    counters = engine.counters()
    engine.close()
    print(TARGET.name, counters)
    differing = assert_same_up_to_near_ties(expected, got)
    print(f"{len(prompts) - differing} of {len(prompts)} outputs identical, the rest near-ties")


LLAMA3_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256,
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "dtype": "bfloat16",
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}  # fmt: skip


@pytest.fixture(scope="module")
def llama3_8b(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a target and a draft without weights, for `--load-format dummy`."""
    from tokenizers import Tokenizer, models
    from transformers import AutoConfig, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("llama3-8b")
    target, draft = folder / "target", folder / "draft"
    target.mkdir()
    (target / "config.json").write_text(json.dumps(LLAMA3_8B))
    vocabulary = {f"t{i} ": i for i in range(LLAMA3_8B["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t0 "))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(target)
    draft_config_for(AutoConfig.from_pretrained(target)).save_pretrained(draft)
    return target, draft


def test_llama3_8b_shape_serves(llama3_8b: tuple[Path, Path]) -> None:
    """`vllm serve` with dummy weights: full CUDA graphs hold the verifications, and the tokens
    are plain vLLM's up to near-ties."""
    target, draft = map(str, llama3_8b)
    options = ["--load-format", "dummy", "--max-model-len", "40960", "--max-num-seqs", "4",
               "--gpu-memory-utilization", "0.45", "--logprobs-mode", "raw_logits"]  # fmt: skip
    prompts = [[(7919 * i) % 128000 for i in range(n)] for n in (1, 900, 4000, 32000)]

    def complete_all(name: str, server: Server) -> list[Any]:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
        answers = []
        for prompt in prompts:
            request = {
                "model": target, "prompt": prompt, "temperature": 0, "logprobs": 2,
                "extra_body": {"return_token_ids": True, "ignore_eos": True,
                               "return_tokens_as_token_ids": True},
            }  # fmt: skip
            client.completions.create(**request, max_tokens=8)
            start = time.perf_counter()
            answers.append(client.completions.create(**request, max_tokens=128).choices[0])
            print(f"{name}, {len(prompt)} tokens of context: {time.perf_counter() - start:.3f} s")
        return answers

    # One after the other: vLLM's memory profiling counts what other processes take meanwhile.
    with running_servers((target, [*options, "--speculative-model", draft])) as (server,):
        log = server.log.read_text()
        print(*[x for x in log.splitlines() if re.search(r"LongSpec: |took .* GiB", x)], sep="\n")
        assert "Capturing CUDA graphs (FULL)" in log
        assert re.search(r"Capturing LongSpec proposals of \d+ nodes \(FULL\)", log)
        speculated = complete_all("LongSpec", server)
        print({k: v for k, v in server.metrics().items() if "spec_decode" in k})
    with running_servers((target, options)) as (server,):
        plain = complete_all("plain", server)
    for prompt, expected, got in zip(prompts, plain, speculated, strict=True):
        pairs = zip(expected.token_ids, got.token_ids, strict=True)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if at is None:
            print(f"{len(prompt)} tokens of context: identical")
            continue
        best, second = sorted(expected.logprobs.top_logprobs[at].values(), reverse=True)[:2]
        print(f"{len(prompt)} tokens of context: from token {at} on, logits {best} and {second}")
        assert best - second <= bf16_spacing(best)
