"""The proposer: after each step it brings the ring up to date and grows every request's next tree.

Everything stays on the device. On a GPU the proposal for a batch is one CUDA graph.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.config import LoadConfig, VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.logger import init_logger
from vllm.model_executor.layers.vocab_parallel_embedding import (
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader import get_model
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.worker.gpu.buffer_utils import UvaBackedTensor
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import get_max_chunk_logits
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator
from vllm.v1.worker.gpu.states import RequestState

from vllm_longspec.attention.kernels import ring_attention
from vllm_longspec.attention.prefix import torch_prefix_attention
from vllm_longspec.config import LongSpecError
from vllm_longspec.draft.beam import Nodes, TreePlan, expand
from vllm_longspec.draft.choose import choose_nodes
from vllm_longspec.draft.inputs import ProposalInputs, place_level, read_inputs
from vllm_longspec.draft.model import LongSpecDraftModel, RingTokens, TargetParts
from vllm_longspec.draft.ring import Ring
from vllm_longspec.runtime.graphs import batches_of_budgets, coarse, keep_graphs
from vllm_longspec.runtime.model_state import LongSpecModelState, Runtime
from vllm_longspec.runtime.options import check_token_budget, register_draft_model
from vllm_longspec.runtime.tree_state import BatchTrees, TreeState

logger = init_logger("vllm.longspec")

MAX_LOGIT_ROWS = 512  # rows of draft logits held at once
MAX_FILL_TOKENS = 8192  # prompt tokens whose ring entries are computed at once


class LongSpecSpeculator(DraftModelSpeculator):
    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, req_states: RequestState
    ) -> None:
        super().__init__(vllm_config, device)
        self.req_states = req_states
        scheduled = self.scheduler_config.max_num_scheduled_tokens or self.max_num_tokens
        check_token_budget(self.num_speculative_steps, scheduled)
        self.batches = batches_of_budgets(
            self.speculative_config, self.max_num_reqs, self.num_speculative_steps
        )
        self.plans = {
            m: TreePlan.build(self.speculative_config.tree_shapes[m], m, device)
            for m in self.batches
            if m > 0
        }
        warn_of_a_full_step(self.batches, scheduled)
        self.most_nodes = {batch: m for m, sizes in self.batches.items() for batch in sizes}
        depth = max((plan.depth for plan in self.plans.values()), default=0)
        self.inputs = ProposalInputs.allocate(self.max_num_reqs, depth, device)
        self.state = TreeState.allocate(
            self.max_num_reqs, self.num_speculative_steps, depth, device
        )
        self.batch_trees = BatchTrees.allocate(self.max_num_reqs, self.max_num_tokens, self.state)
        self.draft_tokens.fill_(-1)  # of requests without a tree yet
        # Batch row of each of `inputs.new_tokens`.
        self.new_token_rows = torch.arange(self.max_num_reqs, device=device).repeat_interleave(
            depth + 1
        )
        self.chain = UvaBackedTensor(self.max_num_reqs, dtype=torch.int32)
        self.graphs: dict[int, CudaGraphManager] = {}  # of each plan
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
        static_layers = self.vllm_config.compilation_config.static_forward_context
        check_backends(static_layers[name] for name in layers)
        model: LongSpecDraftModel = get_model(
            vllm_config=self.vllm_config,
            model_config=self.draft_model_config,
            load_config=draft_load_config(self.vllm_config.load_config),
        )
        model.share_target(target_model, target_parts(target_model, last_layer))
        model.ring = Ring(
            self.vllm_config,
            f"longspec.layers.{extract_layer_index(last_layer) + 1}.self_attn",
            model.window,
            len(layers),
            model.num_kv_heads,
            model.head_size,
            self.dtype,
        )
        self.target_cache = lambda: static_layers[last_layer].kv_cache
        self.last_layer = last_layer
        target_model.longspec = Runtime(
            self.state, self.batch_trees, self.req_states, layers, self.chain
        )
        target_model.get_model_state_cls = lambda: LongSpecModelState
        self.compute_target_logits = target_model.compute_logits
        return model

    def set_attn(self, model_state: LongSpecModelState, *args: Any) -> None:
        super().set_attn(model_state, *args)
        # vLLM allocates the KV cache next, and has profiled memory with a small one before.
        model_state.caches = None
        self.graphs.clear()
        groups = self.kv_cache_config.kv_cache_groups
        (ring_name,) = self.draft_attn_layer_names
        self.ring_group = next(i for i, g in enumerate(groups) if ring_name in g.layer_names)
        self.target_group = next(
            i for i, g in enumerate(groups) if self.last_layer in g.layer_names
        )
        ring = self.model.ring.get_kv_cache_spec(self.vllm_config)
        self.blocks_per_ring = ring.blocks_per_ring
        for m, batches in self.batches.items():
            shape = " ".join(map(str, self.plans[m].shape)) if m else "none, plain decoding"
            logger.info_once(
                "LongSpec: %s requests: tree %s, %d nodes verified",
                f"{batches[0]}-{batches[-1]}", shape, m,
            )  # fmt: skip
        logger.info_once(
            "LongSpec: draft cache of %d block(s), %.2f MiB a request",
            ring.blocks_per_ring,
            ring.blocks_per_ring * ring.page_size_bytes / 2**20,
        )

    # CUDA graphs

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        full = cudagraph_mode.decode_mode() == CUDAGraphMode.FULL
        mode = CUDAGraphMode.FULL_DECODE_ONLY if full else CUDAGraphMode.NONE
        for m in self.plans:
            graphs = CudaGraphManager(self.vllm_config, self.device, mode, decode_query_len=1)
            keep_graphs(graphs, {1: coarse(self.batches[m])})
            self.graphs[m] = graphs

    def capture(self) -> None:
        self.inputs.slots.fill_(-1)
        self.inputs.new_positions.fill_(-1)
        self.inputs.context_lens.zero_()
        for m, graphs in self.graphs.items():
            plan = self.plans[m]

            def create_forward_fn(
                desc: BatchExecutionDescriptor, warmup: bool, plan: TreePlan = plan
            ) -> Callable[[CUDAGraphMode], None]:
                assert desc.num_reqs is not None
                num_reqs = desc.num_reqs
                return lambda mode: self.grow_trees(num_reqs, plan)

            graphs.capture(create_forward_fn, f"Capturing LongSpec proposals of {m} nodes")

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
            self.profile_memory()
        if dummy_run:
            return self.draft_tokens[:num_reqs]
        self.model.refresh_head()
        self.fill_rings(input_batch)
        m = self.num_speculative_steps if num_speculative_tokens is None else num_speculative_tokens
        # vLLM's warm-up has the largest tree in the largest batch; serving never has.
        m = min(m, self.most_nodes[num_reqs])
        desc: Any = None
        if m in self.graphs:
            desc = self.graphs[m].dispatch(num_reqs, num_reqs, 1, num_active_loras=0)
        in_graph = desc is not None and desc.cg_mode == CUDAGraphMode.FULL
        padded = desc.num_reqs if in_graph else num_reqs
        read_inputs(
            self.inputs,
            input_batch.idx_mapping,
            num_sampled,
            last_sampled,
            self.req_states.num_computed_tokens.gpu,
            self.req_states.all_token_ids.gpu,
            self.chain.gpu,
            padded,
        )
        if m == 0:
            self.model.write_ring(self.new_tokens(num_reqs))
            self.draft_tokens[:num_reqs] = -1
        elif in_graph:
            self.graphs[m].run_fullgraph(desc)
        else:
            self.grow_trees(num_reqs, self.plans[m])
        return self.draft_tokens[:num_reqs]

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
        self.model.write_ring(RingTokens(tokens, rows, positions, self.ring_table()))

    def ring_table(self) -> torch.Tensor:  # [max_num_reqs, blocks_per_ring] int32
        return self.block_tables.input_block_tables[self.ring_group][:, : self.blocks_per_ring]

    def grow_trees(self, num_reqs: int, plan: TreePlan) -> None:
        """From `self.inputs` to the trees in `self.state` and the tokens in `self.draft_tokens`.
        Recorded in CUDA graphs: fixed shapes, no synchronisation."""
        inputs, model = self.inputs, self.model
        context_lens = inputs.context_lens[:num_reqs]
        nodes = Nodes.allocate(num_reqs, plan)
        key, value = (
            torch.empty(
                num_reqs, plan.starts[-2], model.num_kv_heads, model.head_size,
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
        choose_nodes(
            nodes,
            plan,
            inputs.chain[:num_reqs],
            inputs.slots[:num_reqs],
            self.state,
            self.draft_tokens,
        )

    def new_tokens(self, num_reqs: int) -> RingTokens:
        """The tokens the last step committed now have target K/V; they enter the ring."""
        tokens = self.inputs.new_tokens[:num_reqs].flatten()
        positions = self.inputs.new_positions[:num_reqs].flatten()
        rows = self.new_token_rows[: len(tokens)]
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
        """Cross-attention: the target's last-layer cache, all of it, through its block table."""
        num_reqs = context_lens.shape[0]
        out = torch.empty_like(query)
        cache = self.target_cache()
        table = self.block_tables.input_block_tables[self.target_group][:num_reqs]
        if current_platform.is_cuda():
            from vllm_longspec.attention.cuda_backend import flash_prefix_attention

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

    def profile_memory(self) -> None:
        """What a step needs beside what vLLM profiles, so that it leaves room: logits of every node
        verified, and an eager proposal of the widest level."""
        nodes = max(b * (1 + m) for m, sizes in self.batches.items() for b in sizes)
        rows = min(nodes, self.max_num_tokens)
        hidden = torch.zeros(rows, self.hidden_size, dtype=self.dtype, device=self.device)
        profile_verification(self.compute_target_logits(hidden))
        rows = max(
            (max(self.batches[m]) * max(1, *plan.shape[:-1]) for m, plan in self.plans.items()),
            default=0,
        )
        if rows == 0:
            return
        model = self.model
        key, value = torch.zeros(
            2, rows, 1, model.num_kv_heads, model.head_size, dtype=self.dtype, device=self.device
        )
        zeros = torch.zeros(rows, dtype=torch.int64, device=self.device)
        hidden = model(zeros, zeros, lambda query, *_: query, lambda query: query, (key, value))
        self.top_tokens(hidden, max(max(plan.shape) for plan in self.plans.values()))


def profile_verification(
    logits: torch.Tensor,  # [num_rows, vocab_size]
) -> None:
    """Beside the logits of all nodes: of vLLM's largest chunk of them a copy in float32, which is
    sampled from, and one in the order of the walk, of which log-probabilities are taken."""
    processed = logits[: get_max_chunk_logits(logits.shape[1])].float()
    in_order = processed.clone()
    in_order.topk(min(20, logits.shape[1]))


def warn_of_a_full_step(batches: dict[int, list[int]], max_num_tokens: int) -> None:
    """`batches`: the batch sizes at which each number of nodes is verified."""
    crowded = {b: m for m, sizes in batches.items() for b in sizes if b * (1 + m) > max_num_tokens}
    if crowded:
        batch = min(crowded)
        logger.warning_once(
            "LongSpec: %d requests at once verify 1 + %d tokens each, more than the %d of a step "
            "(max_num_batched_tokens): some wait for others. Raise it, lower max_num_seqs, or "
            "verify fewer nodes at this batch size (num_speculative_tokens_per_batch_size).",
            batch, crowded[batch], max_num_tokens,
        )  # fmt: skip


def draft_load_config(target: LoadConfig) -> LoadConfig:
    """A draft is a folder of safetensors or torch files whatever its target is."""
    if target.load_format == "dummy":
        return target
    return replace(target, load_format="auto", model_loader_extra_config={})


def check_backends(layers: Iterable[Any]) -> None:
    """Raises LongSpecError unless the target's layers took LongSpec's attention."""
    for layer in layers:
        backend = layer.get_attn_backend()
        if "vllm_longspec" not in backend.__module__:
            raise LongSpecError(
                f"model: a layer of the target chose {backend.get_name()}; LongSpec supports "
                "targets whose layers leave the choice of attention to vLLM"
            )


def target_parts(target_model: Any, last_layer: str) -> TargetParts:
    """What the draft borrows from its target: embeddings, head and the last layer's RoPE."""
    attention = target_model.get_submodule(last_layer).layer_name.rpartition(".")[0]
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
