"""LongSpec's draft: one layer whose cache has constant size.

Its self-attention reads a ring of the last committed tokens and the tree's own nodes, its
cross-attention the cache of the target's last layer with full attention. The committed tokens enter
the ring with the root's own GEMMs; a level of the tree is one forward of the layer, and the most
probable children of all its nodes are the next level.
"""

from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig
from vllm.config import LoadConfig, VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.vocab_parallel_embedding import (
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader import get_model
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.states import RequestState

from vllm_longspec.config import cross_attention_layer
from vllm_longspec.draft.adapters import without_adapters
from vllm_longspec.draft.beam import Nodes, TreePlan, expand
from vllm_longspec.draft.choose import choose_nodes
from vllm_longspec.draft.graft import graft
from vllm_longspec.draft.inputs import ProposalInputs, place_level
from vllm_longspec.draft.lookup import Lookup
from vllm_longspec.draft.model import (
    LongSpecDraftModel,
    RingTokens,
    TargetParts,
    register_draft_model,
)
from vllm_longspec.draft.ring import Ring
from vllm_longspec.draft.ring_attention import ring_attention, rows_and_splits
from vllm_longspec.errors import LongSpecError
from vllm_longspec.verify.prefix import torch_prefix_attention
from vllm_longspec.verify.tree_state import TreeState

logger = init_logger("vllm.longspec")

MAX_LOGIT_ROWS = 512  # rows of draft logits held at once
MAX_FILL_TOKENS = 8192  # prompt tokens whose ring entries are computed at once


class LongSpecDraft:
    """A `Draft` (`draft/protocol.py`)."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        device: torch.device,
        req_states: RequestState,
        inputs: ProposalInputs,  # read
        lookup: Lookup,  # read
        state: TreeState,  # written, as are the draft tokens
        draft_tokens: torch.Tensor,  # [max_num_reqs, m] int64; -1: unused node
    ) -> None:
        self.vllm_config = vllm_config
        self.device = device
        self.dtype = vllm_config.model_config.dtype
        self.max_model_len = vllm_config.model_config.max_model_len
        self.req_states = req_states
        self.inputs = inputs
        self.lookup = lookup
        self.state = state
        self.draft_tokens = draft_tokens
        # Batch row of each of `inputs.new_tokens`.
        max_num_reqs, num_new = inputs.new_tokens.shape
        rows = torch.arange(max_num_reqs, device=device)
        self.new_token_rows = rows[:, None].repeat(1, num_new)  # [max_num_reqs, num_new] int64
        self.model: LongSpecDraftModel
        self.block_tables: BlockTables
        self.blocks_per_ring = 0
        self.ring_group = self.target_group = 0
        self.target_cache = lambda: torch.tensor([])

    def load(self, target_model: Any, target_layers: list[str]) -> nn.Module:
        static_layers = self.vllm_config.compilation_config.static_forward_context
        self.read_layer = layer_to_read(self.vllm_config.model_config.hf_text_config, target_layers)
        full_layers = [name for name in target_layers if static_layers[name].sliding_window is None]
        register_draft_model()
        model = get_model(
            vllm_config=self.vllm_config,
            model_config=self.vllm_config.speculative_config.draft_model_config,
            load_config=draft_load_config(self.vllm_config.load_config),
        )
        model.share_target(
            target_model, target_parts(without_adapters(target_model), self.read_layer)
        )
        self.ring_layer = f"longspec.layers.{extract_layer_index(target_layers[-1]) + 1}.self_attn"
        model.ring = Ring(
            self.vllm_config,
            self.ring_layer,
            model.window,
            len(full_layers),
            model.num_kv_heads,
            model.head_size,
            self.dtype,
        )
        check_target_layer(static_layers[self.read_layer], model)
        self.target_cache = lambda: static_layers[self.read_layer].kv_cache
        self.model = model
        return model

    def bind(self, kv_cache_config: KVCacheConfig, block_tables: BlockTables) -> None:
        groups = kv_cache_config.kv_cache_groups
        self.block_tables = block_tables
        self.ring_group, self.target_group = (
            next(i for i, group in enumerate(groups) if name in group.layer_names)
            for name in (self.ring_layer, self.read_layer)
        )
        ring = self.model.ring.get_kv_cache_spec(self.vllm_config)
        self.blocks_per_ring = ring.blocks_per_ring
        logger.info_once(
            "LongSpec: draft cache of %d block(s), %.2f MiB a request",
            ring.blocks_per_ring,
            ring.blocks_per_ring * ring.page_size_bytes / 2**20,
        )

    def catch_up(self, rows: np.ndarray) -> None:
        """The ring's entries of the window before each root, which depend on token ids only."""
        window = self.model.window
        back = torch.arange(1, window + 1, device=self.device)
        rows_at_once = max(1, MAX_FILL_TOKENS // window)
        for start in range(0, len(rows), rows_at_once):
            part = async_tensor_h2d(rows[start : start + rows_at_once], device=self.device)
            positions = self.inputs.context_lens[part, None] - back
            slots = self.inputs.slots[part, None]
            tokens = self.req_states.all_token_ids.gpu[slots, positions.clamp(min=0)]
            self.model.write_ring(
                RingTokens(
                    tokens.flatten().long(),
                    part.repeat_interleave(window),
                    positions.clamp(min=-1).flatten().long(),
                    self.ring_table(),
                )
            )

    def ring_table(self) -> torch.Tensor:  # [max_num_reqs, blocks_per_ring] int32
        return self.block_tables.input_block_tables[self.ring_group][:, : self.blocks_per_ring]

    def grow(self, num_reqs: int, plan: TreePlan) -> None:
        inputs, model = self.inputs, self.model
        context_lens = inputs.context_lens[:num_reqs]
        nodes = Nodes.allocate(num_reqs, plan)
        key, value = (
            torch.empty(
                num_reqs, plan.num_expanded, model.num_kv_heads, model.head_size,
                dtype=self.dtype, device=self.device,
            )
            for _ in range(2)
        )  # fmt: skip
        level_tokens = inputs.root_tokens[:num_reqs, None]
        for depth, (first, next_width) in enumerate(
            zip((0, *plan.starts), plan.shape, strict=False)
        ):
            hidden = self.forward_level(
                level_tokens,
                context_lens,
                key,
                value,
                nodes.ancestors,
                first,
                depth,
                self.new_tokens(num_reqs) if depth == 0 else None,
            )
            top_logprobs, top_tokens = self.top_tokens(hidden, next_width)
            level_tokens = expand(nodes, top_logprobs, top_tokens, first, next_width)
        if plan.copies > 0:
            graft(nodes, plan, self.lookup.tokens[:num_reqs], self.lookup.scores[:num_reqs])
        choose_nodes(
            nodes,
            plan,
            inputs.modes[:num_reqs],
            inputs.slots[:num_reqs],
            self.state,
            self.draft_tokens,
        )

    def specialisation(self, num_reqs: int, plan: TreePlan) -> Hashable:
        model = self.model
        heads = (model.num_heads, model.num_kv_heads)
        capacity = self.blocks_per_ring * model.ring.kv_cache.shape[2]
        return tuple(
            rows_and_splits(num_reqs, width, heads, model.head_size, capacity)
            for width in (1, *plan.shape)[: plan.depth]
        )

    def new_tokens(self, num_reqs: int) -> RingTokens:
        """The tokens the last step committed now have target K/V; they enter the ring."""
        # The newest come first; of more than a window two would have one slot of the ring.
        new = slice(0, min(self.inputs.new_tokens.shape[1], self.model.window))
        tokens = self.inputs.new_tokens[:num_reqs, new].flatten()
        positions = self.inputs.new_positions[:num_reqs, new].flatten()
        rows = self.new_token_rows[:num_reqs, new].flatten()
        return RingTokens(tokens, rows, positions, self.ring_table())

    def forward_level(
        self,
        tokens: torch.Tensor,  # [num_reqs, width] int64
        context_lens: torch.Tensor,  # [num_reqs] int32
        tree_key: torch.Tensor,  # [num_reqs, max_nodes, num_kv_heads, head_size], written
        tree_value: torch.Tensor,
        ancestors: torch.Tensor,  # [num_reqs, max_nodes, num_words]
        first: int,
        depth: int,
        new: RingTokens | None = None,
    ) -> torch.Tensor:  # [num_reqs * width, hidden_size]
        model = self.model
        num_reqs, width = tokens.shape
        positions, query_starts = place_level(context_lens, width, depth, model.max_position)
        nodes = slice(first, first + width)

        def attend_to_tree(
            query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
        ) -> torch.Tensor:
            out = ring_attention(
                query.view(num_reqs, width, *query.shape[1:]),
                model.ring.kv_cache,
                self.ring_table(),
                tree_key,
                tree_value,
                ancestors,
                context_lens,
                first,
                depth,
                model.window,
                model.scale,
            )
            return out.flatten(0, 1)

        def attend_to_target(query: torch.Tensor) -> torch.Tensor:
            return self.attend_to_target(query, context_lens, query_starts)

        return model(
            tokens.flatten(),
            positions,
            attend_to_tree,
            attend_to_target,
            (tree_key[:, nodes], tree_value[:, nodes]),
            new,
        )

    def attend_to_target(
        self,
        query: torch.Tensor,  # [num_reqs * width, num_heads, head_size]
        context_lens: torch.Tensor,  # [num_reqs] int32
        query_starts: torch.Tensor,  # [num_reqs + 1] int32
    ) -> torch.Tensor:
        """Cross-attention: the cache of the target's layer, all of it, through its block table."""
        num_reqs = context_lens.shape[0]
        out = torch.empty_like(query)
        cache = self.target_cache()
        table = self.block_tables.input_block_tables[self.target_group][:num_reqs]
        if current_platform.is_cuda():
            from vllm_longspec.verify.cuda_backend import flash_prefix_attention

            flash_prefix_attention(
                query, cache, table, context_lens, query_starts, query.shape[0] // num_reqs,
                self.max_model_len, self.model.scale, out,
            )  # fmt: skip
        else:
            torch_prefix_attention(
                query, cache, table, context_lens, query_starts, self.model.scale, out
            )
        return out

    def top_tokens(
        self,
        hidden: torch.Tensor,  # [num_rows, hidden_size]
        next_width: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # [num_rows, k] each
        k = min(next_width, self.model.draft_vocab_size)
        if len(hidden) <= MAX_LOGIT_ROWS:
            return self.model.top_tokens(hidden, k)
        parts = [self.model.top_tokens(rows, k) for rows in hidden.split(MAX_LOGIT_ROWS)]
        logprobs, tokens = zip(*parts, strict=True)
        return torch.cat(logprobs), torch.cat(tokens)

    def profile(self, num_rows: int, num_children: int) -> None:
        model = self.model
        key, value = torch.zeros(
            2,
            num_rows,
            1,
            model.num_kv_heads,
            model.head_size,
            dtype=self.dtype,
            device=self.device,
        )
        zeros = torch.zeros(num_rows, dtype=torch.int64, device=self.device)
        hidden = model(zeros, zeros, lambda query, *_: query, lambda query: query, (key, value))
        self.top_tokens(hidden, num_children)

    def refresh(self) -> None:
        self.model.refresh_head()


def draft_load_config(target: LoadConfig) -> LoadConfig:
    """A draft is a folder of safetensors or torch files whatever its target is."""
    if target.load_format == "dummy":
        return target
    # torchao's strategy reads what torchao wrote, a draft's files are none of it.
    strategy = target.safetensors_load_strategy
    return replace(
        target,
        load_format="auto",
        model_loader_extra_config={},
        safetensors_load_strategy=None if strategy == "torchao" else strategy,
    )


def layer_to_read(config: PreTrainedConfig, target_layers: list[str]) -> str:
    """Of the target's attention layers, first to last, the one that the draft was trained to
    read."""
    return target_layers[cross_attention_layer(config)]


def check_target_layer(layer: Any, draft: Any) -> None:
    """Raises LongSpecError unless the layer whose cache the draft reads holds the whole context and
    has the draft's heads: of some targets the config names them otherwise, or each layer has its
    own."""
    if getattr(layer, "head_size_v", layer.head_size) != layer.head_size:
        raise LongSpecError(
            f"model: the target's values have heads of {layer.head_size_v} numbers, its keys of "
            f"{layer.head_size}; LongSpec does not support such targets"
        )
    if layer.sliding_window is not None:
        raise LongSpecError(
            f"model: vLLM loads a layer with a window of {layer.sliding_window} tokens where the "
            "target's config has full attention, which the draft needs; LongSpec does not support "
            "such targets"
        )
    ours, theirs = ((each.num_kv_heads, each.head_size) for each in (draft, layer))
    if ours != theirs:
        raise LongSpecError(
            f"model: the target's last layer has {theirs[0]} key-value heads of {theirs[1]} "
            f"numbers, by its config {ours[0]} of {ours[1]}; LongSpec does not support such targets"
        )


def target_parts(target_model: Any, read_layer: str) -> TargetParts:
    """What the draft borrows of its target: embeddings, head, the RoPE of the layer it reads."""
    attention = target_model.get_submodule(read_layer).layer_name.rpartition(".")[0]
    rotary = getattr(target_model.get_submodule(attention), "rotary_emb", None)
    if rotary is None:
        raise LongSpecError(
            f"model: {type(target_model).__name__} has no rotary embedding in its last layer; "
            "LongSpec needs a target with RoPE"
        )
    return TargetParts(
        target_model.embed_input_ids,
        embedding_table(target_model),
        target_model.compute_logits,
        rotary,
    )


def embedding_table(target_model: Any) -> torch.Tensor | None:
    """[vocab_size, hidden_size], where to embed is to look up a row of it and nothing more."""
    layer: Any = getattr(getattr(target_model, "model", None), "embed_tokens", None)
    if type(layer) is not VocabParallelEmbedding or layer.tp_size > 1:
        return None
    if not isinstance(layer.quant_method, UnquantizedEmbeddingMethod):
        return None
    ids = torch.arange(2, device=layer.weight.device)
    looked_up = torch.equal(target_model.embed_input_ids(ids), layer.weight[ids])
    return layer.weight if looked_up else None
