"""The proposer: after each step it brings the ring up to date and grows every request's next tree.

Everything stays on the device. On a GPU the proposal for a batch is one CUDA graph.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.logger import init_logger
from vllm.model_executor.model_loader import get_model
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.worker.gpu.buffer_utils import UvaBackedTensor
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator
from vllm.v1.worker.gpu.states import RequestState

from vllm_longspec.attention.kernels import ring_attention
from vllm_longspec.attention.prefix import torch_prefix_attention
from vllm_longspec.config import LongSpecError
from vllm_longspec.draft.model import LongSpecDraftModel, TargetParts
from vllm_longspec.draft.ring import Ring, write_ring
from vllm_longspec.runtime.model_state import LongSpecModelState, Runtime
from vllm_longspec.runtime.options import register_draft_model
from vllm_longspec.runtime.tree_state import TreeState
from vllm_longspec.tree.expand import expand_level
from vllm_longspec.tree.prune import Tree, best_path, prune
from vllm_longspec.tree.shape import level_starts, mask_words, node_bits, node_depths

logger = init_logger("vllm.longspec")

MAX_LOGIT_ROWS = 512  # rows of draft logits held at once
MAX_FILL_TOKENS = 8192  # prompt tokens whose ring entries are computed at once


@dataclass
class ProposalInputs:
    """What a proposal reads, in batch order; persistent, so that CUDA graphs can."""

    slots: torch.Tensor  # [max_num_reqs] int64 request slots; -1: padding
    root_tokens: torch.Tensor  # [max_num_reqs] int64 the newest committed token
    context_lens: torch.Tensor  # [max_num_reqs] int32 tokens with target K/V; the root's position
    new_tokens: torch.Tensor  # [max_num_reqs, depth + 1] int64 committed by the last step
    new_positions: torch.Tensor  # [max_num_reqs, depth + 1] int64; -1: fewer were committed
    chain: torch.Tensor  # [max_num_reqs] bool: draft a chain

    @classmethod
    def allocate(cls, max_num_reqs: int, depth: int, device: torch.device) -> "ProposalInputs":
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(max_num_reqs, *shape, dtype=dtype, device=device)

        return cls(
            slots=zeros() - 1,
            root_tokens=zeros(),
            context_lens=zeros(dtype=torch.int32),
            new_tokens=zeros(depth + 1),
            new_positions=zeros(depth + 1) - 1,
            chain=zeros(dtype=torch.bool),
        )


class LongSpecSpeculator(DraftModelSpeculator):
    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, req_states: RequestState
    ) -> None:
        super().__init__(vllm_config, device)
        self.req_states = req_states
        self.tree_shape = self.speculative_config.tree_shape
        self.tree_depth = len(self.tree_shape)
        self.starts = level_starts(self.tree_shape)
        self.depths = node_depths(self.tree_shape).to(device)
        self.inputs = ProposalInputs.allocate(self.max_num_reqs, self.tree_depth, device)
        self.state = TreeState.allocate(
            self.max_num_reqs, self.num_speculative_steps, self.tree_depth, device
        )
        self.chain = UvaBackedTensor(self.max_num_reqs, dtype=torch.int32)
        self.level_query_starts = [
            torch.arange(self.max_num_reqs + 1, dtype=torch.int32, device=device) * width
            for width in (1, *self.tree_shape)
        ]
        self.graphs: CudaGraphManager | None = None
        self.ring_group = self.target_group = 0
        self.target_cache = lambda: torch.tensor([])
        # Runs before the target's layers pick their backend.
        if current_platform.is_cuda():
            register_backend(
                AttentionBackendEnum.CUSTOM,
                "vllm_longspec.attention.cuda_backend.LongSpecFlashBackend",
            )
            vllm_config.attention_config.backend = AttentionBackendEnum.CUSTOM
        else:
            register_backend(
                AttentionBackendEnum.CPU_ATTN,
                "vllm_longspec.attention.cpu_backend.LongSpecCpuBackend",
            )

    # Loading

    def load_draft_model(self, target_model: Any, target_attn_layer_names: set[str]) -> nn.Module:
        layers = sorted(target_attn_layer_names, key=extract_layer_index)
        last_layer = layers[-1]
        register_draft_model()
        model: LongSpecDraftModel = get_model(
            vllm_config=self.vllm_config, model_config=self.draft_model_config
        )
        model.target = target_parts(target_model, last_layer)
        model.ring = Ring(
            self.vllm_config,
            f"longspec.layers.{extract_layer_index(last_layer) + 1}.self_attn",
            model.window,
            len(layers),
            model.num_kv_heads,
            model.head_size,
            self.dtype,
        )
        static_layers = self.vllm_config.compilation_config.static_forward_context
        self.target_cache = lambda: static_layers[last_layer].kv_cache
        self.last_layer = last_layer
        target_model.longspec = Runtime(self.state, self.req_states, layers, self.chain)
        target_model.get_model_state_cls = lambda: LongSpecModelState
        return model

    def set_attn(self, model_state: LongSpecModelState, *args: Any) -> None:
        super().set_attn(model_state, *args)
        # vLLM allocates the KV cache next, and has profiled memory with a small one before.
        model_state.caches = None
        groups = self.kv_cache_config.kv_cache_groups
        (ring_name,) = self.draft_attn_layer_names
        self.ring_group = next(i for i, g in enumerate(groups) if ring_name in g.layer_names)
        self.target_group = next(
            i for i, g in enumerate(groups) if self.last_layer in g.layer_names
        )
        ring = self.model.ring.get_kv_cache_spec(self.vllm_config)
        self.blocks_per_ring = ring.blocks_per_ring
        logger.info_once(
            "LongSpec: tree %s, %d nodes verified; draft cache of %d block(s), %.2f MiB a request",
            " ".join(map(str, self.tree_shape)),
            self.num_speculative_steps,
            ring.blocks_per_ring,
            ring.blocks_per_ring * ring.page_size_bytes / 2**20,
        )

    # CUDA graphs

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        full = cudagraph_mode.decode_mode() == CUDAGraphMode.FULL
        mode = CUDAGraphMode.FULL_DECODE_ONLY if full else CUDAGraphMode.NONE
        self.graphs = CudaGraphManager(self.vllm_config, self.device, mode, decode_query_len=1)

    def capture(self) -> None:
        assert self.graphs is not None
        self.inputs.slots.fill_(-1)
        self.inputs.new_positions.fill_(-1)
        self.inputs.context_lens.zero_()

        def create_forward_fn(
            desc: BatchExecutionDescriptor, warmup: bool
        ) -> Callable[[CUDAGraphMode], None]:
            assert desc.num_reqs is not None
            num_reqs = desc.num_reqs
            return lambda mode: self.grow_trees(num_reqs)

        self.graphs.capture(create_forward_fn, "Capturing LongSpec proposals")

    # Proposing

    @torch.inference_mode()
    def propose(
        self,
        input_batch: InputBatch,
        attn_metadata: dict[str, Any],
        slot_mappings: dict[str, torch.Tensor],
        last_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor] | None,
        num_sampled: torch.Tensor,  # [num_reqs]
        num_rejected: torch.Tensor,
        last_sampled: torch.Tensor,  # [max_num_reqs, 1]
        next_prefill_tokens: torch.Tensor,
        temperature: torch.Tensor,
        seeds: torch.Tensor,
        dp_sync_state: Any = None,
        dummy_run: bool = False,
        skip_attn_for_dummy_run: bool = False,
        mm_inputs: Any = None,
        is_profile: bool = False,
        num_speculative_tokens: int | None = None,
    ) -> torch.Tensor:  # [num_reqs, m] int64; -1: unused node
        num_reqs = input_batch.num_reqs
        if is_profile:
            self.profile_logits(num_reqs)
        if dummy_run:
            return self.draft_tokens[:num_reqs]
        self.fill_rings(input_batch)
        assert self.graphs is not None
        desc = self.graphs.dispatch(num_reqs, num_reqs, 1, num_active_loras=0)
        padded = desc.num_reqs or num_reqs
        self.read_inputs(input_batch, num_sampled, last_sampled, padded)
        if desc.cg_mode == CUDAGraphMode.FULL:
            self.graphs.run_fullgraph(desc)
        else:
            self.grow_trees(num_reqs)
        return self.draft_tokens[:num_reqs]

    def read_inputs(
        self,
        input_batch: InputBatch,
        num_sampled: torch.Tensor,  # [num_reqs] int32
        last_sampled: torch.Tensor,  # [max_num_reqs, 1] int64
        padded: int,
    ) -> None:
        inputs, num_reqs, slots = self.inputs, input_batch.num_reqs, input_batch.idx_mapping
        inputs.slots[:num_reqs] = slots
        inputs.slots[num_reqs:padded] = -1
        inputs.root_tokens[:num_reqs] = last_sampled[slots, 0]
        context_lens = self.req_states.num_computed_tokens.gpu[slots]
        inputs.context_lens[:num_reqs] = context_lens
        inputs.context_lens[num_reqs:padded] = 0
        inputs.chain[:num_reqs] = self.chain.gpu[slots] != 0

        back = torch.arange(self.tree_depth + 1, device=self.device)
        positions = context_lens[:, None].long() - 1 - back
        positions = torch.where(back < num_sampled[:, None], positions, -1)
        all_tokens = self.req_states.all_token_ids.gpu
        inputs.new_positions[:num_reqs] = positions
        inputs.new_positions[num_reqs:padded] = -1
        inputs.new_tokens[:num_reqs] = all_tokens[slots[:, None], positions.clamp(min=0)]

    def fill_rings(self, input_batch: InputBatch) -> None:
        """Where a request's last prompt token was computed in this step, compute the ring entries
        of the window before it from token ids: after a prompt, a prefix-cache hit, a resume."""
        drafts = input_batch.num_draft_tokens_per_req
        computed = input_batch.num_computed_tokens_np + input_batch.num_scheduled_tokens
        if drafts is not None:
            computed = computed - drafts
        prefill_lens = input_batch.prefill_len_np
        complete = input_batch.is_prefilling_np[: input_batch.num_reqs] & (computed >= prefill_lens)
        if not complete.any():
            return
        window = self.model.window
        rows, positions = [], []
        for row in np.flatnonzero(complete):
            end = int(prefill_lens[row])
            tail = np.arange(max(0, end - window), end)
            rows.append(np.full_like(tail, row))
            positions.append(tail)
        all_rows, all_positions = np.concatenate(rows), np.concatenate(positions)
        for start in range(0, len(all_rows), MAX_FILL_TOKENS):
            part = slice(start, start + MAX_FILL_TOKENS)
            self.write_rings(
                async_tensor_h2d(all_rows[part], device=self.device, dtype=torch.int64),
                async_tensor_h2d(all_positions[part], device=self.device, dtype=torch.int64),
                input_batch.idx_mapping,
            )

    def write_rings(
        self,
        rows: torch.Tensor,  # [num_tokens] int64 batch rows
        positions: torch.Tensor,  # [num_tokens] int64
        slots: torch.Tensor,  # [num_reqs] int64 request slots
    ) -> None:
        tokens = self.req_states.all_token_ids.gpu[slots[rows], positions]
        key, value = self.model.keys_and_values(tokens, positions)
        write_ring(key, value, rows, positions, self.model.ring.kv_cache, self.ring_table())

    def ring_table(self) -> torch.Tensor:  # [max_num_reqs, blocks_per_ring] int32
        return self.block_tables.input_block_tables[self.ring_group][:, : self.blocks_per_ring]

    def grow_trees(self, num_reqs: int) -> None:
        """From `self.inputs` to the trees in `self.state` and the tokens in `self.draft_tokens`.
        Recorded in CUDA graphs: fixed shapes, no synchronisation."""
        inputs, model = self.inputs, self.model
        rows = torch.arange(num_reqs, device=self.device)
        self.write_new_tokens(rows)
        context_lens = inputs.context_lens[:num_reqs]

        num_words = mask_words(self.starts[-1] - 1)
        key, value = (
            torch.empty(
                num_reqs, self.starts[-2], model.num_kv_heads, model.head_size,
                dtype=self.dtype, device=self.device,
            )
            for _ in range(2)
        )  # fmt: skip
        ancestors = torch.zeros(
            num_reqs, self.starts[-2], num_words, dtype=torch.int64, device=self.device
        )
        ancestors[:, 0] = node_bits(torch.zeros_like(rows), num_words)
        level_tokens = inputs.root_tokens[:num_reqs, None]
        level_scores = torch.zeros(num_reqs, 1, device=self.device)
        tokens, scores, parents = [], [], []
        for depth, next_width in enumerate(self.tree_shape):
            first = self.starts[depth - 1] if depth else 0
            width = level_tokens.shape[1]
            hidden = self.forward_level(
                level_tokens, context_lens, key, value, ancestors, first, depth
            )
            top_logprobs, top_tokens = self.top_tokens(hidden, next_width)
            level_tokens, level_scores, parent = expand_level(
                level_scores,
                top_logprobs.view(num_reqs, width, -1),
                top_tokens.view(num_reqs, width, -1),
                next_width,
            )
            parent = parent + first
            tokens.append(level_tokens)
            scores.append(level_scores)
            parents.append(parent)
            if depth + 1 < self.tree_depth:
                nodes = slice(self.starts[depth], self.starts[depth + 1])
                number = torch.arange(nodes.start, nodes.stop, device=self.device)
                seen = ancestors.gather(1, parent[..., None].expand(-1, -1, num_words))
                ancestors[:, nodes] = seen | node_bits(number, num_words)

        tree = self.choose_nodes(torch.cat(tokens, 1), torch.cat(scores, 1), torch.cat(parents, 1))
        self.draft_tokens[:num_reqs] = tree.tokens
        self.state.write(inputs.slots[:num_reqs], tree)

    def write_new_tokens(self, rows: torch.Tensor) -> None:  # [num_reqs]
        """The tokens the last step committed now have target K/V; they enter the ring."""
        num_reqs = rows.shape[0]
        tokens = self.inputs.new_tokens[:num_reqs].flatten()
        positions = self.inputs.new_positions[:num_reqs].flatten()
        key, value = self.model.keys_and_values(tokens, positions.clamp(min=0))
        rows = rows.repeat_interleave(self.tree_depth + 1)
        write_ring(key, value, rows, positions, self.model.ring.kv_cache, self.ring_table())

    def forward_level(
        self,
        tokens: torch.Tensor,  # [num_reqs, width] int64
        context_lens: torch.Tensor,  # [num_reqs] int32
        tree_key: torch.Tensor,  # [num_reqs, max_nodes, num_kv_heads, head_size], written
        tree_value: torch.Tensor,
        ancestors: torch.Tensor,  # [num_reqs, max_nodes, num_words]
        first: int,
        depth: int,
    ) -> torch.Tensor:  # [num_reqs * width, hidden_size]
        model = self.model
        num_reqs, width = tokens.shape
        positions = (context_lens.long() + depth).clamp(max=model.max_position)
        positions = positions.repeat_interleave(width, output_size=num_reqs * width)
        nodes = slice(first, first + width)

        def attend_to_tree(
            query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
        ) -> torch.Tensor:
            tree_key[:, nodes] = key.view(num_reqs, width, *key.shape[1:])
            tree_value[:, nodes] = value.view(num_reqs, width, *value.shape[1:])
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
            return self.attend_to_target(query, context_lens, depth)

        return model(tokens.flatten(), positions, attend_to_tree, attend_to_target)

    def attend_to_target(
        self,
        query: torch.Tensor,  # [num_reqs * width, num_heads, head_size]
        context_lens: torch.Tensor,  # [num_reqs] int32
        depth: int,
    ) -> torch.Tensor:
        """Cross-attention: the target's last-layer cache, all of it, through its block table."""
        num_reqs = context_lens.shape[0]
        out = torch.empty_like(query)
        cache = self.target_cache()
        table = self.block_tables.input_block_tables[self.target_group][:num_reqs]
        starts = self.level_query_starts[depth][: num_reqs + 1]
        if current_platform.is_cuda():
            from vllm_longspec.attention.cuda_backend import flash_prefix_attention

            flash_prefix_attention(
                query, cache, table, context_lens, starts, query.shape[0] // num_reqs,
                self.max_model_len, self.model.scale, out,
            )  # fmt: skip
        else:
            torch_prefix_attention(query, cache, table, context_lens, starts, self.model.scale, out)
        return out

    def top_tokens(
        self,
        hidden: torch.Tensor,  # [num_rows, hidden_size]
        next_width: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # [num_rows, k] each
        k = min(next_width, self.vocab_size)
        parts = [self.model.top_tokens(rows, k) for rows in hidden.split(MAX_LOGIT_ROWS)]
        logprobs, tokens = zip(*parts, strict=True)
        return torch.cat(logprobs), torch.cat(tokens)

    def choose_nodes(
        self,
        tokens: torch.Tensor,  # [num_reqs, num_nodes] int64
        scores: torch.Tensor,  # [num_reqs, num_nodes]
        parents: torch.Tensor,  # [num_reqs, num_nodes] int64
    ) -> Tree:
        m, words = self.num_speculative_steps, mask_words(self.num_speculative_steps)
        tree = prune(tokens, scores, parents, self.depths, self.tree_depth, m, words)
        chain = best_path(tokens, parents, self.starts[-2], self.tree_depth, m, words)
        use_chain = self.inputs.chain[: tokens.shape[0]]

        def choose(name: str) -> torch.Tensor:
            ours, theirs = getattr(chain, name), getattr(tree, name)
            return torch.where(use_chain.view(-1, *[1] * (ours.dim() - 1)), ours, theirs)

        return Tree(*map(choose, ("tokens", "parents", "depths", "ancestors")))

    def profile_logits(self, num_reqs: int) -> None:
        """The proposal's largest buffers, so that memory profiling sees them."""
        rows = min(MAX_LOGIT_ROWS, num_reqs * max(self.tree_shape))
        hidden = torch.zeros(rows, self.hidden_size, dtype=self.dtype, device=self.device)
        self.model.top_tokens(hidden, min(max(self.tree_shape), self.vocab_size))


def target_parts(target_model: Any, last_layer: str) -> TargetParts:
    """What the draft borrows from its target: embeddings, head and the last layer's RoPE."""
    attention = target_model.get_submodule(last_layer).layer_name.rpartition(".")[0]
    rotary = getattr(target_model.get_submodule(attention), "rotary_emb", None)
    if rotary is None:
        raise LongSpecError(
            f"model: {type(target_model).__name__} has no rotary embedding in its last layer; "
            "LongSpec needs a target with RoPE"
        )
    return TargetParts(target_model.embed_input_ids, target_model.compute_logits, rotary)
