"""Tiny random targets of many architectures, and what plain vLLM and LongSpec make of them.

`outputs_of` is for a process of its own, in which one engine after another is started: importing
vLLM and looking at a model's class takes longer than such an engine.
"""

import gc
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from helpers import TARGET, Engine, Output, text_prompt

SHAPE: dict[str, Any] = {
    "vocab_size": 4096, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "max_position_embeddings": 2048, "tie_word_embeddings": False,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
# vLLM's kernel on a CPU has no heads of 16, which such a config would derive.
TWO_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": None}
SLIDING = {
    "sliding_window": 40,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}  # fmt: skip
# As many full layers as share a block with the draft's ring, and sliding ones in two groups.
MORE_SLIDING = {
    "sliding_window": 40, "num_hidden_layers": 5, "layer_types": [
        "sliding_attention", "full_attention", "sliding_attention", "full_attention",
        "sliding_attention"],
}  # fmt: skip
# Of each `model_type`, and of some of its kinds, what its config has beside SHAPE; None: nothing of
# SHAPE.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": EXPERTS,
    "qwen2_moe": EXPERTS | TWO_HEADS | {"shared_expert_intermediate_size": 48},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "glm4_moe": EXPERTS | {
        "n_routed_experts": 6, "n_shared_experts": 1, "first_k_dense_replace": 1,
        "use_qk_norm": True, "num_experts": None,
    },
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen2": TWO_HEADS,
    "qwen3": {},
    "mistral": {"sliding_window": None},
    "gemma": {"hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True},
    "phi3": TWO_HEADS | {"sliding_window": None},
    "glm4": {"attention_bias": True},
    "granite": TWO_HEADS | {
        "embedding_multiplier": 4.0, "logits_scaling": 0.5, "residual_multiplier": 0.7,
        "attention_multiplier": 0.1,
    },
    "cohere": TWO_HEADS | {"use_qk_norm": True, "logit_scale": 0.5, "tie_word_embeddings": True},
    "stablelm": TWO_HEADS | {"use_qkv_bias": True, "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}},
    "olmoe": TWO_HEADS | {"num_experts": 6, "num_experts_per_tok": 2},
    "granitemoe": TWO_HEADS | {
        "num_local_experts": 4, "num_experts_per_tok": 2, "embedding_multiplier": 4.0,
        "logits_scaling": 0.5, "residual_multiplier": 0.7, "attention_multiplier": 0.1,
    },
    "ernie4_5": {"use_bias": True},
    "ernie4_5_moe": TWO_HEADS | {
        "moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 32, "moe_layer_start_index": 1,
        "moe_num_shared_experts": 1,
    },
    "exaone4": {"sliding_window": None, "layer_types": ["full_attention"] * 3},
    "apertus": TWO_HEADS | {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 256}},
    "nemotron": {"partial_rotary_factor": 0.5},
    # Layers that slide, each with its window, beside layers that do not, not always the last.
    "gemma3_text": SLIDING | {
        "query_pre_attn_scalar": 24, "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}}},
    "gpt_oss": SLIDING | {
        "layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4,
        "num_local_experts": 4, "num_experts_per_tok": 2},
    "cohere2": TWO_HEADS | SLIDING | {"logit_scale": 0.5, "tie_word_embeddings": True},
    "mistral with layer_types": MORE_SLIDING,
    "exaone4 with sliding layers": SLIDING,
    "gptj": TWO_HEADS | {"num_key_value_heads": None, "rotary_dim": 16},
}  # fmt: skip
# Compared on a GPU too, up to near-ties: with which vLLM, on what.
ON_A_GPU = {"llama": "0.32, 0.33: H200, H100"} | dict.fromkeys(
    (
        "qwen2", "qwen3", "mistral", "gemma", "phi3", "glm4", "granite", "cohere", "stablelm",
        "ernie4_5", "exaone4", "nemotron", "gptj", "qwen2_moe", "qwen3_moe", "mixtral", "glm4_moe",
        "olmoe", "granitemoe", "ernie4_5_moe", "gemma3_text", "gpt_oss", "cohere2", "ministral",
    ),
    "0.32: H200",
)  # fmt: skip
# Its config names key-value heads in a way of its own.
FALCON = TWO_HEADS | {
    "num_key_value_heads": None, "num_kv_heads": 1, "alibi": False,
    "new_decoder_architecture": True,
}  # fmt: skip

# Prompts in pieces, blocks that they cross.
PIECES: dict[str, Any] = {"block_size": 32, "max_num_batched_tokens": 192}
LENGTHS = (1, 5, 300, 130)
NEW_TOKENS, NEW_TOKENS_RANDOM = 32, 6  # of a draft that is never right each is a step


def slides(name: str) -> bool:
    return "sliding_attention" in ARCHITECTURES[name].get("layer_types", ())


def model_type_of(name: str) -> str:
    return name.partition(" ")[0]


def served_as(name: str) -> str:
    """The `model_type` of its folder's config: a Mistral with `layer_types` is read as another."""
    return "ministral" if name == "mistral with layer_types" else model_type_of(name)


def config_of(name: str, **changes: Any) -> Any:
    from transformers import AutoConfig

    fields = SHAPE | (FALCON if name == "falcon" else ARCHITECTURES[name]) | changes
    # A window is left out by saying so.
    said = {k: v for k, v in fields.items() if v is not None or k == "sliding_window"}
    return AutoConfig.for_model(model_type_of(name), **said)


def write_target(folder: Path, name: str) -> Any:
    """Its config. The weights are wide enough for outputs that go on changing."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    target = AutoModelForCausalLM.from_config(config_of(name), dtype=torch.float32)
    with torch.no_grad():
        for parameter in target.parameters():
            noise = torch.randn_like(parameter)
            if parameter.dim() > 1:
                parameter.copy_(0.2 * noise)
            else:  # norms and biases
                parameter.add_(0.1 * noise)
    target.save_pretrained(folder)
    for path in TARGET.glob("tokenizer*"):
        shutil.copy(path, folder)
    return target.config


def write_draft(folder: Path, target: Any) -> None:
    from vllm_longspec.config import draft_config_for
    from vllm_longspec.train.model import DraftLayer, save_draft

    torch.manual_seed(1)
    layer = DraftLayer(draft_config_for(target, window=64))
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    save_draft(layer, folder, torch.float32)


def small_tree(draft: Path) -> dict[str, Any]:
    return {
        "method": "longspec", "model": str(draft), "tree_shape": [2, 3, 3],
        "num_speculative_tokens": 6,
    }  # fmt: skip


@dataclass
class Outputs:
    prompts: list[list[int]]
    plain: list[Output]
    random: list[Output]  # the first tokens, with a draft that knows nothing
    right: list[Output]  # with one that proposes what plain vLLM wrote
    accepted_of_random: int
    accepted_of_right: int
    drafts_of_right: int
    cached: int  # tokens found in the prefix cache


def outputs_of(folder: Path, name: str) -> Outputs:
    """The last two prompts begin as one before, and find that in the cache. Prompts are computed
    in pieces, beside requests that decode."""
    from vllm import SamplingParams

    config = write_target(folder, name)
    write_draft(folder / "draft", config)
    inspect_here(config.architectures[0])
    prompts = [text_prompt(i, length) for i, length in enumerate(LENGTHS)]
    prompts += [[*prompts[2], *text_prompt(7, 60)], [*prompts[2][:200], *text_prompt(8, 33)]]

    def params(max_tokens: int) -> list[Any]:
        return [
            SamplingParams(
                temperature=0.8 * (i % 2), seed=i, max_tokens=max_tokens, ignore_eos=True
            )
            for i in range(len(prompts))
        ]

    def generate(engine: Engine, max_tokens: int) -> list[Output]:
        chosen = params(max_tokens)
        outputs = engine.generate(prompts[:4], chosen[:4])
        return outputs + engine.generate(prompts[4:], chosen[4:])

    options = PIECES | {"model": str(folder)}
    engine = Engine(**options)
    plain = generate(engine, NEW_TOKENS)
    close(engine)
    known = propose_what_is_known()
    engine = Engine(small_tree(folder / "draft"), **options)
    random = generate(engine, NEW_TOKENS_RANDOM)
    before = engine.counters()
    engine.llm.reset_prefix_cache()
    known += [[*prompt, *output.tokens] for prompt, output in zip(prompts, plain, strict=True)]
    cached = engine.counter("vllm:prefix_cache_hits")
    right = generate(engine, NEW_TOKENS)
    cached = engine.counter("vllm:prefix_cache_hits") - cached
    after = engine.counters()
    known.clear()
    close(engine)
    return Outputs(
        prompts, plain, random, right, before["accepted_tokens"],
        after["accepted_tokens"] - before["accepted_tokens"], after["drafts"] - before["drafts"],
        cached,
    )  # fmt: skip


def refusal_of(folder: Path, name: str) -> str:
    """What LongSpec says of a target that its config alone does not tell."""
    from vllm_longspec.errors import LongSpecError

    config = write_target(folder, name)
    write_draft(folder / "draft", config)
    inspect_here(config.architectures[0])
    try:
        Engine({"method": "longspec", "model": str(folder / "draft")}, model=str(folder))
    except LongSpecError as error:
        return str(error)
    return ""


def inspect_here(architecture: str) -> None:
    """vLLM looks at a model's class in a process of its own, which imports all of vLLM: 20 s where
    its cache does not know the class yet."""
    from vllm.model_executor.models.registry import ModelRegistry

    model = ModelRegistry.models[architecture].load_model_cls()
    ModelRegistry.register_model(architecture, model)


def close(engine: Engine) -> None:
    """And forgets the attention that LongSpec chose on a CPU: it is one for the process."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import _cached_get_attn_backend

    engine.close()
    engine.llm = None
    gc.collect()
    AttentionBackendEnum.CPU_ATTN.clear_override()
    _cached_get_attn_backend.cache_clear()


KNOWN: list[list[list[int]]] = []  # one list, once the draft asks it


def propose_what_is_known() -> list[list[int]]:
    """Makes the draft put first, at every node, the token that follows in one of the sequences of
    the list that is returned; as it was while that is empty."""
    from vllm_longspec.draft.longspec import LongSpecDraft

    if KNOWN:
        return KNOWN[0]
    known: list[list[int]] = []
    KNOWN.append(known)
    forward_level, top_tokens = LongSpecDraft.forward_level, LongSpecDraft.top_tokens

    def forward_level_and_look(
        self: Any, tokens: torch.Tensor, context_lens: torch.Tensor, *rest: Any
    ) -> torch.Tensor:
        depth = rest[4]
        self.next_tokens = []
        for row, length in enumerate(context_lens.tolist() if known else ()):
            ids = self.req_states.all_token_ids.gpu[int(self.inputs.slots[row]), :length].tolist()
            text = [*ids, int(self.inputs.root_tokens[row])]
            after = [s[len(text) + depth :] for s in known if s[: len(text)] == text]
            token = after[0][0] if after and after[0] else -1
            self.next_tokens += [token] * tokens.shape[1]
        return forward_level(self, tokens, context_lens, *rest)

    def top_tokens_and_right_ones(
        self: Any, hidden: torch.Tensor, next_width: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs, tokens = top_tokens(self, hidden, next_width)
        for row, token in enumerate(getattr(self, "next_tokens", [])):
            if token >= 0:
                tokens[row] = torch.where(tokens[row] == token, tokens[row, 0], tokens[row])
                tokens[row, 0], logprobs[row, 0] = token, 0.0
        return logprobs, tokens

    LongSpecDraft.forward_level = forward_level_and_look  # type: ignore[method-assign]
    LongSpecDraft.top_tokens = top_tokens_and_right_ones  # type: ignore[method-assign]
    return known
