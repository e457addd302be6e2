"""What only a GPU can show: compiled kernels in bf16 over FlashAttention, and full CUDA graphs."""

import json
import re
import time
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import (
    TARGET,
    Engine,
    assert_same_up_to_near_ties,
    bf16_spacing,
    longspec,
    spacings_of_a_difference,
    synthetic_prompt,
    text_prompt,
)
from openai import OpenAI

from vllm_longspec.config import draft_config_for
from vllm_longspec.eval.server import Server, running_servers
from vllm_longspec.tree.shape import ancestor_masks, mask_words
from vllm_longspec.verify.reference import masked_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize(
    ("heads", "head_size"),
    [
        *product([(4, 4), (6, 2), (32, 8), (16, 2)], [64, 128]),
        *product([(6, 2)], [80, 96, 112, 192, 256]),
        *product([(4, 2), (5, 1), (6, 1), (14, 2), (16, 1)], [128]),
    ],
)
def test_hybrid_attention_in_bf16(heads: tuple[int, int], head_size: int) -> None:
    """Trees of 0 to 68 nodes over prefixes of 0 to 9,000 tokens, in pages of a block-outermost
    cache, against dense masked attention in fp32 on the same bf16 inputs."""
    from vllm_longspec.verify.cuda_backend import flash_prefix_attention
    from vllm_longspec.verify.tree_attention import tree_attention

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


FULL_GRAPHS: dict[str, Any] = {
    "dtype": "bfloat16", "max_model_len": 4096, "enforce_eager": False,
    "kv_cache_memory_bytes": 1 << 30, "logprobs_mode": "processed_logits",
    "gpu_memory_utilization": 0.05,
}  # fmt: skip


# Full graphs without torch.compile, which takes most of a start.
UNCOMPILED = {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}}


def greedy_with_logprobs(prompts: list[list[int]], num_tokens: int) -> tuple[Any, Any]:
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True, logprobs=2)
    return prompts, [params] * len(prompts)


def test_requests_without_a_tree() -> None:
    """Sixteen at once verify nothing, after vLLM's warm-up verified 31 nodes of each of 64."""
    case = greedy_with_logprobs([text_prompt(i, 40 + 60 * i) for i in range(16)], 64)
    options = FULL_GRAPHS | {"max_num_seqs": 64}
    plain = Engine(**options)
    expected = plain.generate(*case)
    plain.close()
    schedule = [[1, 2, 31], [3, 64, 0]]
    engine = Engine(longspec(num_speculative_tokens_per_batch_size=schedule), **options)
    got = engine.generate(*case)
    engine.close()
    differing = assert_same_up_to_near_ties(expected, got)
    print(f"{16 - differing} of 16 outputs identical, the rest near-ties")


def test_lora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two adapters and none in one batch, in full graphs, of which there are some for adapters; the
    draft's own copy of the head is one of the base model's. Refused until this ran."""
    from adapters import RANK, write_adapter
    from vllm.lora.request import LoRARequest

    from vllm_longspec.runtime import supported

    monkeypatch.setattr(supported, "refused_adapters", lambda *_: ())
    paths = [write_adapter(tmp_path / str(i), seed=i, head=i == 1) for i in range(2)]
    requests = [None, *(LoRARequest(str(i), 1 + i, path) for i, path in enumerate(paths))]
    loras = [requests[i % 3] for i in range(12)]
    case = greedy_with_logprobs([text_prompt(i, 40 + 60 * i) for i in range(12)], 64)
    options = FULL_GRAPHS | UNCOMPILED | {
        "max_num_seqs": 16, "enable_lora": True, "max_loras": 2, "max_lora_rank": RANK,
    }  # fmt: skip
    outputs = []
    for speculative_config in (None, longspec()):
        engine = Engine(speculative_config, **options)
        outputs.append(engine.generate(*case, loras))
        accepted = engine.counters().get("accepted_tokens", 0)
        engine.close()
    differing = assert_same_up_to_near_ties(*outputs)
    print(f"{12 - differing} of 12 outputs identical, the rest near-ties; {accepted} accepted")
    assert accepted > 100


@pytest.mark.parametrize("quantization", ["fp8", "none"])
def test_sleep(quantization: str, tmp_path: Path) -> None:
    """After a sleep of either level, and weights loaded again, outputs are what they were, and as
    much is accepted: of a draft with a trimmed head, which is copied from the target's."""
    import shutil

    from safetensors.torch import load_file, save_file

    draft = Path(shutil.copytree(longspec()["model"], tmp_path / "draft"))
    tensors = load_file(draft / "model.safetensors")
    tensors["draft_token_ids"] = torch.arange(0, 3500)
    save_file(tensors, draft / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((draft / "config.json").read_text())
    (draft / "config.json").write_text(json.dumps(config | {"draft_vocab_size": 3500}))

    case = greedy_with_logprobs([text_prompt(i, 300 + 200 * i) for i in range(4)], 96)
    options = FULL_GRAPHS | {"max_num_seqs": 4, "enable_sleep_mode": True}
    engine = Engine(longspec(model=str(draft), quantization=quantization), **options)

    def run() -> tuple[list[Any], float]:
        before = engine.counters()
        engine.llm.reset_prefix_cache()
        outputs = engine.generate(*case)
        after = engine.counters()
        drafts = after["drafts"] - before.get("drafts", 0)
        return outputs, 1 + (after["accepted_tokens"] - before.get("accepted_tokens", 0)) / drafts

    expected, accepted = run()
    for level in (1, 2):
        engine.llm.sleep(level=level)
        engine.llm.wake_up(tags=["weights"])
        if level == 2:
            engine.llm.collective_rpc("reload_weights")
        engine.llm.wake_up(tags=["kv_cache"])
        got, again = run()
        print(f"{quantization}, level {level}: {accepted:.2f} accepted before, {again:.2f} after")
        assert_same_up_to_near_ties(expected, got)
        assert again > 0.9 * accepted
    engine.close()


@pytest.mark.parametrize("num_reqs", [1, 3, 16])
def test_top_k_top_p_of_a_verification(num_reqs: int) -> None:
    """A verification's rows keep the tokens that plain decoding's keep, up to the rounding of sums:
    vLLM has other kernels for more than 64 rows."""
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

    from vllm_longspec.verify.sampler import mask_as_plain_decoding

    nodes, vocab = 32, 128256
    generator = torch.Generator("cuda").manual_seed(num_reqs)
    for spread in (1.0, 3.0):
        rows = torch.randn(num_reqs * nodes, vocab, device="cuda", generator=generator) * spread
        for k, p in ((None, 0.9), (50, None), (50, 0.9), (None, 0.5)):
            top_k = None if k is None else torch.full((len(rows),), k, device="cuda").int()
            top_p = None if p is None else torch.full((len(rows),), p, device="cuda")

            def chosen(x: torch.Tensor | None, part: Any) -> torch.Tensor | None:
                return None if x is None else x[part]

            # Row by row of the tree, as plain decoding would come to them.
            plain = torch.cat(
                [
                    apply_top_k_top_p(
                        rows[node::nodes].clone(),
                        chosen(top_k, slice(node, None, nodes)),
                        chosen(top_p, slice(node, None, nodes)),
                    )
                    for node in range(nodes)
                ]
            ).view(nodes, num_reqs, vocab).transpose(0, 1).flatten(0, 1)  # fmt: skip
            states = SimpleNamespace(
                apply_top_k_top_p=lambda x, row, _, k=top_k, p=top_p: apply_top_k_top_p(
                    x, chosen(k, row), chosen(p, row)
                )
            )
            every = torch.arange(len(rows), device="cuda")
            ours = mask_as_plain_decoding(states, rows.clone(), every, every, num_reqs)
            at_once = apply_top_k_top_p(rows.clone(), top_k, top_p)
            kept = [x > float("-inf") for x in (plain, ours, at_once)]
            # What other tokens are kept weigh together, by row.
            odds = rows.softmax(-1)
            other = [(odds * (kept[0] ^ x)).sum(1) for x in kept[1:]]
            print(
                f"{num_reqs} requests, spread {spread}, top-k {k}, top-p {p}: of {len(rows)} rows "
                f"{int((other[0] > 0).sum())} keep other tokens, of at most {other[0].max():.1e}; "
                f"in one call {int((other[1] > 0).sum())}, {other[1].max():.1e}"
            )
            # Plain decoding's own differ so between batch sizes: the sums that reach p round
            # otherwise. All at once, nearly every row differs.
            assert other[0].max() < 1e-4
            assert (other[0] > 0).float().mean() < 0.5


@pytest.mark.parametrize(
    "shape, nodes",
    [([1] * 64, 64), ([128] * 7 + [127], 255)],
    ids=["64 levels", "255 nodes"],
)
def test_the_largest_trees(shape: list[int], nodes: int) -> None:
    """They are captured and verified; what they accept is what a smaller tree would."""
    case = greedy_with_logprobs([text_prompt(i, 60 + 300 * i) for i in range(3)], 48)
    options = FULL_GRAPHS | UNCOMPILED | {"max_num_seqs": 4}
    plain = Engine(**options)
    expected = plain.generate(*case)
    plain.close()
    engine = Engine(longspec(tree_shape=shape, num_speculative_tokens=nodes), **options)
    got = engine.generate(*case)
    print(nodes, engine.counters())
    engine.close()
    assert_same_up_to_near_ties(expected, got)


@pytest.mark.parametrize("head_size", [80, 96, 112, 192, 256])
def test_other_head_sizes(head_size: int, tmp_path: Path) -> None:
    """A small Llama of random weights, its random draft; 64 at once fill the largest programs."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from vllm_longspec.train.model import DraftLayer, init_weights, save_draft

    torch.manual_seed(head_size)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=512, intermediate_size=1024, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=2, head_dim=head_size,
        max_position_embeddings=4096, initializer_range=0.1, dtype="bfloat16",
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "target")
    AutoTokenizer.from_pretrained(TARGET).save_pretrained(tmp_path / "target")
    layer = DraftLayer(draft_config_for(config))
    init_weights(layer, torch.Generator().manual_seed(1))
    save_draft(layer.to(torch.bfloat16), tmp_path / "draft")
    case = greedy_with_logprobs([synthetic_prompt(i, 20 + 10 * i) for i in range(64)], 16)
    options = FULL_GRAPHS | UNCOMPILED
    options |= {"max_num_seqs": 64, "model": str(tmp_path / "target")}
    plain = Engine(**options)
    expected = plain.generate(*case)
    # Of random weights near-ties are wider than one spacing: as wide as plain decoding's own from
    # one batch size to another, whose matrix products sum in another order, as a verification's do.
    widest, by_batch_size = 1, []
    for first in range(0, 64, 16):
        part = slice(first, first + 16)
        by_batch_size += plain.generate(case[0][part], case[1][part])
    for one, other in zip(expected, by_batch_size, strict=True):
        widest = max([widest, *spacings_of_a_difference(one, other)])
    plain.close()
    engine = Engine(longspec(model=str(tmp_path / "draft"), num_speculative_tokens=15), **options)
    got = engine.generate(*case)
    engine.close()
    differing = assert_same_up_to_near_ties(expected, got, widest)
    print(
        f"heads of {head_size}: {64 - differing} of 64 identical, the rest within {widest} "
        "spacings, plain decoding's own from 64 to 16 at once"
    )


QWEN2_7B = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 152064,
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "dtype": "bfloat16",
    "use_sliding_window": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
}  # fmt: skip


def write_shape(folder: Path, config: dict[str, Any]) -> tuple[Path, Path]:
    """A target and a draft without weights, for `load_format="dummy"`."""
    from transformers import AutoConfig

    target, draft = folder / "target", folder / "draft"
    target.mkdir()
    (target / "config.json").write_text(json.dumps(config))
    draft_config_for(AutoConfig.from_pretrained(target)).save_pretrained(draft)
    return target, draft


def test_two_hundred_requests_with_logprobs(tmp_path: Path) -> None:
    """A 7B's shape with the schedule of the cost model: every batch size from 200 down to 1, with
    what log-probabilities and top-p need beside the logits of all nodes."""
    from vllm import SamplingParams

    target, draft = write_shape(tmp_path, QWEN2_7B)
    engine = Engine(
        longspec(model=str(draft)), model=str(target), load_format="dummy", dtype="bfloat16",
        skip_tokenizer_init=True, max_model_len=4096, max_num_seqs=256, enforce_eager=False,
        gpu_memory_utilization=0.9, kv_cache_memory_bytes=None,
    )  # fmt: skip
    prompts = [[(7919 * i + j) % 150000 for j in range(100 + i)] for i in range(200)]
    params = [
        SamplingParams(max_tokens=8 + i // 4, temperature=0.7 * (i % 2), top_p=0.9, seed=i,
                       ignore_eos=True, logprobs=5 * (i % 3), detokenize=False)
        for i in range(200)
    ]  # fmt: skip
    outputs = engine.llm.generate(
        [{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False
    )
    free, total = torch.cuda.mem_get_info()
    print(f"free {free / 2**30:.1f} of {total / 2**30:.0f} GiB; {engine.counters()}")
    engine.close()
    assert [len(o.outputs[0].token_ids) for o in outputs] == [8 + i // 4 for i in range(200)]
    assert all(o.outputs[0].logprobs for i, o in enumerate(outputs) if i % 3)
