"""The draft layer in vLLM: the target's embeddings, one layer, the target's head or rows of it.

The layer owns no attention state: the proposer passes in how its queries attend, to the ring and
the tree (`draft/ring_attention.py`) and to the target's last-layer cache.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import pad
from vllm import _custom_ops as ops
from vllm.compilation.counter import compilation_counter
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.logger import init_logger
from vllm.model_executor.layers.fusion.quant_activation import QuantizedActivation
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.llama import LlamaMLP
from vllm.platforms import current_platform

from vllm_longspec.config import ARCHITECTURE, FP8, LongSpecConfig, num_drafted_tokens
from vllm_longspec.draft.adapters import without_adapters
from vllm_longspec.draft.beam import top_tokens
from vllm_longspec.draft.checkpoint import TOKEN_IDS, check_token_ids
from vllm_longspec.draft.fp8 import (
    CUTLASS_MULTIPLE,
    Fp8LinearMethod,
    embed_to_fp8,
    fits_fp8,
    gated_to_fp8,
    norm_to_fp8,
)
from vllm_longspec.draft.ring import Ring
from vllm_longspec.draft.rope import rotate_into_ring, rotate_query, split_and_rotate

logger = init_logger("vllm.longspec")

# checkpoint name -> (parameter of this module, its shard)
STACKED = {
    "self_attn.q_proj": ("self_attn.qkv_proj", "q"),
    "self_attn.k_proj": ("self_attn.qkv_proj", "k"),
    "self_attn.v_proj": ("self_attn.qkv_proj", "v"),
    "mlp.gate_proj": ("mlp.gate_up_proj", 0),
    "mlp.up_proj": ("mlp.gate_up_proj", 1),
}
UNUSED = ("cross_attn.k_proj", "cross_attn.v_proj")


@dataclass
class TargetParts:
    """What the draft shares with its target. Not a module: the draft does not own these."""

    embed: Callable[[torch.Tensor], torch.Tensor]
    embeddings: torch.Tensor | None  # [vocab_size, hidden_size] all that `embed` reads, if it is
    compute_logits: Callable[[torch.Tensor], torch.Tensor]
    rotary: Callable[..., tuple[torch.Tensor, torch.Tensor]]


class RingTokens(NamedTuple):
    """Committed tokens whose keys and values are to enter the ring. No two of a row that are
    written may be a capacity apart: their slots would be the same."""

    tokens: torch.Tensor  # [num_tokens] int32 or int64
    rows: torch.Tensor  # [num_tokens] int64 row of the table
    positions: torch.Tensor  # [num_tokens] int64; -1: not written
    table: torch.Tensor  # [num_reqs, blocks_per_ring] int32


class SelfAttention(nn.Module):
    def __init__(self, config: LongSpecConfig, prefix: str) -> None:
        super().__init__()
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            config.head_dim,
            config.num_attention_heads,
            config.num_key_value_heads,
            bias=True,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * config.head_dim,
            config.hidden_size,
            bias=False,
            prefix=f"{prefix}.o_proj",
        )


class CrossAttention(nn.Module):
    """A query only: keys and values are the target's."""

    def __init__(self, config: LongSpecConfig, prefix: str) -> None:
        super().__init__()
        size = config.num_attention_heads * config.head_dim
        self.q_proj = ColumnParallelLinear(
            config.hidden_size, size, bias=True, prefix=f"{prefix}.q_proj"
        )
        self.o_proj = RowParallelLinear(
            size, config.hidden_size, bias=False, prefix=f"{prefix}.o_proj"
        )


class LongSpecDraftModel(nn.Module):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        # Seen, not compiled: it runs in a graph of its own. vLLM would warn that the target is not.
        compilation_counter.num_models_seen += 1
        config = vllm_config.speculative_config.draft_model_config.hf_config
        tp_size = get_tensor_model_parallel_world_size()
        self.config = config
        self.head_size = config.head_dim
        self.num_heads = config.num_attention_heads // tp_size
        self.num_kv_heads = max(1, config.num_key_value_heads // tp_size)
        self.scale = config.head_dim**-0.5
        self.window: int = getattr(config, "window", 512)
        self.max_position = vllm_config.model_config.max_model_len - 1

        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = SelfAttention(config, f"{prefix}.self_attn")
        self.post_self_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.cross_attn = CrossAttention(config, f"{prefix}.cross_attn")
        self.post_cross_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = LlamaMLP(
            config.hidden_size, config.intermediate_size, config.hidden_act, prefix=f"{prefix}.mlp"
        )
        linear = [layer for layer in self.modules() if isinstance(layer, LinearBase)]
        asked = vllm_config.speculative_config.quantization == FP8
        self.in_fp8 = asked and all(fits_fp8(layer.weight) for layer in linear)
        if self.in_fp8:
            for layer in linear:
                layer.quant_method = Fp8LinearMethod()
        elif asked:
            logger.info_once(
                "LongSpec: the draft is not rounded to FP8, since sizes of its layer on a device "
                "are no multiples of %d", CUTLASS_MULTIPLE,
            )  # fmt: skip
        # What comes before a product rounds for it; a CPU's products round for themselves.
        self.fused_fp8 = self.in_fp8 and current_platform.is_cuda()
        self.target: TargetParts
        self.ring: Ring
        self.draft_token_ids: torch.Tensor | None
        ids = None
        if getattr(config, "draft_vocab_size", None) is not None:
            # Without a checkpoint (vLLM's dummy weights) they stay the first tokens.
            ids = torch.arange(num_drafted_tokens(config), dtype=torch.int64)
        self.register_buffer(TOKEN_IDS, ids, persistent=False)
        self.own_logits: Callable[[torch.Tensor], torch.Tensor] | None = None

    def share_target(self, target_model: Any, parts: TargetParts) -> None:
        """To be called once both models are loaded."""
        self.target, self.own_logits = parts, None
        ids = self.draft_token_ids
        if ids is None and not self.in_fp8:
            return

        base: Any = without_adapters(target_model)

        def copy_head() -> nn.Module | None:
            return copied_head(base, ids, self.in_fp8)

        head = copy_head()
        if head is not None:
            # A part of the draft, so that a sleep preserves it with the draft's weights.
            self.copied_head = head
            size = self.config.vocab_size if ids is None else len(ids)
            self.own_logits = lambda hidden: base.logits_processor(self.copied_head, hidden)[
                :, :size
            ]
            self.copy_head = copy_head
            self.count_loads = counted_loads(target_model, base.lm_head)
            self.loads_copied = self.count_loads()
        elif ids is not None:
            # No reason not to serve: the draft is slower, its output the same.
            logger.warning(
                "LongSpec: draft_vocab_size is not used, since %s has no unquantised lm_head to "
                "take rows of; the draft reads the whole head",
                type(target_model).__name__,
            )

    def refresh_head(self) -> None:
        """Where the target's weights were loaded again, copies its head again. The output does not
        depend on it, what is accepted does."""
        if self.own_logits is None or self.count_loads() == self.loads_copied:
            return
        logger.info("LongSpec: the target was loaded again; its head is copied again")
        self.loads_copied = self.count_loads()
        again = self.copy_head()
        assert again is not None
        if not self.copied_head.weight.is_cuda:
            self.copied_head = again  # a CPU's products read a packed copy of the weight
            return
        for old, new in zip(self.copied_head.parameters(), again.parameters(), strict=True):
            old.data.copy_(new.data)  # CUDA graphs read this memory

    @property
    def is_trimmed(self) -> bool:
        return self.own_logits is not None and self.draft_token_ids is not None

    @property
    def draft_vocab_size(self) -> int:
        """How many tokens `top_tokens` chooses among."""
        return num_drafted_tokens(self.config) if self.is_trimmed else self.config.vocab_size

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.target.embed(input_ids)

    def embed_and_project(
        self,
        tokens: torch.Tensor,  # [num_tokens]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings; query, key and value of the self-attention side by side, not rotated."""
        embeddings = self.target.embeddings
        if embeddings is not None and self.fused_fp8:
            h, x = embed_to_fp8(self.input_layernorm, embeddings, tokens)
        else:
            x = self.embed_input_ids(tokens)
            h = norm(self.input_layernorm, x, self.fused_fp8)
        return x, self.self_attn.qkv_proj(h)[0]

    def write_ring(self, new: RingTokens) -> None:
        self._write_ring(self.embed_and_project(new.tokens)[1], new)

    def _write_ring(self, qkv: torch.Tensor, new: RingTokens) -> None:
        rotate_into_ring(
            qkv, new.positions, self.target.rotary, self.num_heads, new.rows, self.ring.kv_cache,
            new.table,
        )  # fmt: skip

    def forward(
        self,
        input_ids: torch.Tensor,  # [num_tokens]
        positions: torch.Tensor,  # [num_tokens]
        attend_to_tree: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
        attend_to_target: Callable[[torch.Tensor], torch.Tensor],
        tree_kv: tuple[torch.Tensor, torch.Tensor],
        new: RingTokens | None = None,
    ) -> torch.Tensor:  # [num_tokens, hidden_size], ready for the target's head
        """Keys and values are written into `tree_kv`, each [num_reqs, width, num_kv_heads,
        head_size] of the same strides. `attend_to_tree` takes a query and these two,
        `attend_to_target` a query; query and result are [num_tokens, num_heads, head_size].

        `new` enters the ring before anything attends to it, in the same projection: the weights
        are read once.
        """
        num_tokens, rotary = input_ids.shape[0], self.target.rotary
        x, qkv = self.embed_and_project(
            input_ids if new is None else torch.cat([input_ids, new.tokens])
        )
        if new is not None:
            self._write_ring(qkv[num_tokens:], new)
            x, qkv = x[:num_tokens], qkv[:num_tokens]
        query = split_and_rotate(qkv, positions, rotary, self.num_heads, *tree_kv)
        out, _ = self.self_attn.o_proj(attend_to_tree(query, *tree_kv).flatten(1))
        h, x = add_and_norm(self.post_self_attention_layernorm, out, x, self.fused_fp8)
        query, _ = self.cross_attn.q_proj(h)
        query = rotate_query(query, positions, rotary, self.head_size)
        out, _ = self.cross_attn.o_proj(attend_to_target(query).flatten(1))
        h, x = add_and_norm(self.post_cross_attention_layernorm, out, x, self.fused_fp8)
        gate_up, _ = self.mlp.gate_up_proj(h)
        gated = gated_to_fp8(gate_up) if self.fused_fp8 else self.mlp.act_fn(gate_up)
        return x + self.mlp.down_proj(gated)[0]

    def top_tokens(
        self,
        hidden: torch.Tensor,  # [num_tokens, hidden_size]
        k: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The `k` most probable next tokens of each row and their log-probabilities (float32),
        each [num_tokens, k]."""
        logits = (self.own_logits or self.target.compute_logits)(hidden)
        return top_tokens(logits, k, self.draft_token_ids if self.is_trimmed else None)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        parameters = dict(self.named_parameters())
        loaded, token_ids = set(), None
        for name, tensor in weights:
            if name == TOKEN_IDS:
                token_ids = tensor
                continue
            module, _, kind = name.rpartition(".")
            if module in UNUSED:
                continue
            stacked, shard = STACKED.get(module, (module, None))
            parameter = parameters.get(f"{stacked}.{kind}")
            if parameter is None:  # named when the checkpoint was checked
                continue
            loader: Any = getattr(parameter, "weight_loader", None)
            if shard is not None:
                loader(parameter, tensor, shard)
            elif loader is not None:
                loader(parameter, tensor)
            else:
                parameter.data.copy_(tensor)
            loaded.add(f"{stacked}.{kind}")
        # Of a folder they were checked before; a repository is first read here.
        check_token_ids(token_ids, self.config)
        if token_ids is not None:
            assert self.draft_token_ids is not None
            self.draft_token_ids.copy_(token_ids)
        return loaded


def norm(layer: RMSNorm, x: torch.Tensor, to_fp8: bool) -> torch.Tensor | QuantizedActivation:
    """Where vLLM compiles the target, its norms are plain torch, for the compiler to fuse; the
    draft is not compiled and calls the kernels itself."""
    if to_fp8:
        return norm_to_fp8(layer, x)
    if not x.is_cuda:
        return layer(x)
    out = torch.empty_like(x)
    ops.rms_norm(out, x, layer.weight, layer.variance_epsilon)
    return out


def add_and_norm(
    layer: RMSNorm, x: torch.Tensor, residual: torch.Tensor, to_fp8: bool
) -> tuple[torch.Tensor | QuantizedActivation, torch.Tensor]:
    """norm(x + residual) and x + residual, for which both may be overwritten."""
    if to_fp8:
        return norm_to_fp8(layer, x, residual), residual
    if not x.is_cuda:
        return layer(x, residual)
    ops.fused_add_rms_norm(x, residual, layer.weight, layer.variance_epsilon)
    return x, residual


def copied_head(
    target_model: Any,
    ids: torch.Tensor | None,  # [draft_vocab_size]; None: all tokens
    in_fp8: bool,
) -> nn.Module | None:
    """A copy of the rows of the target's head that give the logits of `ids` alone, the same on
    every rank, for the target's `logits_processor`; None if the head is quantised or of another
    kind, or if a copy would save nothing.

    Rows are copied into one matrix (32k x 4096 in bf16: 256 MiB), since a GEMM cannot skip rows.
    """
    head: Any = getattr(target_model, "lm_head", None)
    processor: Any = getattr(target_model, "logits_processor", None)
    plain = (UnquantizedEmbeddingMethod, UnquantizedLinearMethod)
    if (
        processor is None
        or not isinstance(getattr(head, "quant_method", None), plain)
        or getattr(head, "bias", None) is not None
    ):
        return None
    # vLLM's products with a head in another dtype than the model's read the weight themselves.
    in_fp8 = in_fp8 and processor.head_dtype in (None, head.weight.dtype)
    if ids is None:
        if head.tp_size > 1 or not in_fp8:
            return None
        rows = head.weight
    else:
        shard = head.shard_indices
        first, last = shard.org_vocab_start_index, shard.org_vocab_end_index
        held = (ids >= first) & (ids < last)
        rows = head.weight[torch.where(held, ids - first, 0)]
        rows = torch.where(held[:, None], rows, 0)
        if head.tp_size > 1:
            rows = tensor_model_parallel_all_reduce(rows)
    if in_fp8:  # the rows that are added give logits that nobody reads
        rows = pad(rows, (0, 0, 0, -len(rows) % CUTLASS_MULTIPLE))
    # What `logits_processor` reads of a head; it applies the target's scale and soft cap.
    copied: Any = nn.Module()
    copied.weight = nn.Parameter(rows, requires_grad=False)
    copied.tp_size = 1
    copied.quant_method = Fp8LinearMethod() if in_fp8 else UnquantizedEmbeddingMethod()
    copied.quant_method.process_weights_after_loading(copied)
    return copied


def counted_loads(target_model: Any, head: nn.Module) -> Callable[[], tuple[int, int]]:
    """What changes whenever the target's weights are loaded: by `load_weights`, of which vLLM's
    reloading finishes some only after it returned, or by copies into the head."""
    load_weights, loads = target_model.load_weights, 0

    def load_and_count(*args: Any, **kwargs: Any) -> Any:
        nonlocal loads
        loads += 1
        return load_weights(*args, **kwargs)

    target_model.load_weights = load_and_count

    def count() -> tuple[int, int]:
        weight: Any = head.weight
        return loads, 0 if weight.is_inference() else weight._version

    return count


def register_draft_model() -> None:
    """Makes the layer known to vLLM's loaders, in the place of the stand-in of `runtime/roles.py`
    that tells a draft served as a target."""
    ModelRegistry.register_model(ARCHITECTURE, LongSpecDraftModel)
