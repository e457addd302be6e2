"""The proposer, as vLLM calls it: which tree for which batch, and its CUDA graph; a draft grows it.

Everything stays on the device. On a GPU the proposal for a batch is one CUDA graph.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.worker.gpu.buffer_utils import UvaBackedTensor
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator
from vllm.v1.worker.gpu.states import RequestState

from vllm_longspec.config import LongSpecError
from vllm_longspec.draft.beam import TreePlan
from vllm_longspec.draft.inputs import ProposalInputs, read_inputs
from vllm_longspec.draft.longspec import LongSpecDraft
from vllm_longspec.draft.lookup import Lookup
from vllm_longspec.draft.lookup_draft import LookupDraft
from vllm_longspec.draft.protocol import Draft
from vllm_longspec.runtime.graphs import batches_of_budgets, coarse, keep_graphs
from vllm_longspec.runtime.model_state import LongSpecModelState, Runtime
from vllm_longspec.runtime.options import LOOKUP, check_token_budget
from vllm_longspec.tree.lookup import COPY_DEPTH
from vllm_longspec.verify.sampler import profile_verification
from vllm_longspec.verify.tree_state import BatchTrees, TreeState

logger = init_logger("vllm.longspec")


class LongSpecProposer(DraftModelSpeculator):
    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, req_states: RequestState
    ) -> None:
        super().__init__(vllm_config, device)
        self.req_states = req_states
        scheduled = self.scheduler_config.max_num_scheduled_tokens or self.max_num_tokens
        check_token_budget(self.num_speculative_steps, scheduled, "max_num_batched_tokens")
        self.batches = batches_of_budgets(
            self.speculative_config, self.max_num_reqs, self.num_speculative_steps
        )
        self.plans = {
            m: TreePlan.build(self.speculative_config.tree_shapes[m], m, device, COPY_DEPTH)
            for m in self.batches
            if m > 0
        }
        warn_of_a_full_step(self.batches, scheduled)
        self.most_nodes = {batch: m for m, sizes in self.batches.items() for batch in sizes}
        depth = max((plan.max_depth for plan in self.plans.values()), default=0)
        self.inputs = ProposalInputs.allocate(self.max_num_reqs, depth, device)
        self.state = TreeState.allocate(
            self.max_num_reqs, self.num_speculative_steps, depth, device
        )
        self.batch_trees = BatchTrees.allocate(self.max_num_reqs, self.max_num_tokens, self.state)
        self.draft_tokens.fill_(-1)  # of requests without a tree yet
        self.modes = UvaBackedTensor(self.max_num_reqs, dtype=torch.int32)
        self.generations = UvaBackedTensor(self.max_num_reqs, dtype=torch.int32)
        self.lookup = Lookup(self.max_num_reqs, self.max_model_len, device)
        self.graphs: dict[int, CudaGraphManager] = {}  # of each plan
        shared = (self.inputs, self.lookup, self.state, self.draft_tokens)
        self.draft: Draft
        if self.speculative_config.draft == LOOKUP:
            self.draft = LookupDraft(*shared)
        else:
            self.draft = LongSpecDraft(vllm_config, device, req_states, *shared)
        # Runs before the target's layers pick their backend.
        if current_platform.is_cuda():
            register_backend(
                AttentionBackendEnum.CUSTOM,
                "vllm_longspec.verify.cuda_backend.LongSpecFlashBackend",
            )
            vllm_config.attention_config.backend = AttentionBackendEnum.CUSTOM
        else:
            register_backend(
                AttentionBackendEnum.CPU_ATTN,
                "vllm_longspec.verify.cpu_backend.LongSpecCpuBackend",
            )

    # Loading

    def load_draft_model(self, target_model: Any, target_attn_layer_names: set[str]) -> nn.Module:
        layers = sorted(target_attn_layer_names, key=extract_layer_index)
        static_layers = self.vllm_config.compilation_config.static_forward_context
        check_backends(static_layers[name] for name in layers)
        model = self.draft.load(target_model, layers)
        target_model.longspec = Runtime(
            self.state, self.batch_trees, self.req_states, layers, self.modes, self.generations
        )
        target_model.get_model_state_cls = lambda: LongSpecModelState
        self.compute_target_logits = target_model.compute_logits
        return model

    def set_attn(self, model_state: LongSpecModelState, *args: Any) -> None:
        super().set_attn(model_state, *args)
        # vLLM allocates the KV cache next, and has profiled memory with a small one before.
        model_state.caches = None
        self.graphs.clear()
        self.draft.bind(self.kv_cache_config, self.block_tables)
        for m, batches in self.batches.items():
            shape = "none, plain decoding"
            if m:
                shape = " ".join(map(str, self.plans[m].shape)) or "a copy of the text"
            logger.info_once(
                "LongSpec: %s requests: tree %s, %d nodes verified",
                f"{batches[0]}-{batches[-1]}", shape, m,
            )  # fmt: skip

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
                return lambda mode: self.draft.grow(num_reqs, plan)

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
        self.draft.refresh()
        self.draft.read_prompts(input_batch)
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
            self.modes.gpu,
            padded,
        )
        self.lookup.find(
            self.inputs, self.req_states.all_token_ids.gpu, self.generations.gpu, padded
        )
        if m == 0:
            self.draft.read_committed(num_reqs)
            self.draft_tokens[:num_reqs] = -1
        elif in_graph:
            self.graphs[m].run_fullgraph(desc)
        else:
            self.draft.grow(num_reqs, self.plans[m])
        return self.draft_tokens[:num_reqs]

    def profile_memory(self) -> None:
        """What a step needs beside what vLLM profiles, so that it leaves room: logits of every node
        verified, and an eager proposal of the widest level."""
        nodes = max(b * (1 + m) for m, sizes in self.batches.items() for b in sizes)
        rows = min(nodes, self.max_num_tokens)
        hidden = torch.zeros(rows, self.hidden_size, dtype=self.dtype, device=self.device)
        profile_verification(self.compute_target_logits(hidden))
        drafted = {m: plan.shape for m, plan in self.plans.items() if plan.shape}
        if not drafted:
            return
        rows = max(max(self.batches[m]) * max((1, *shape[:-1])) for m, shape in drafted.items())
        self.draft.profile(rows, max(max(shape) for shape in drafted.values()))


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


def check_backends(layers: Iterable[Any]) -> None:
    """Raises LongSpecError unless the target's layers took LongSpec's attention."""
    for layer in layers:
        backend = layer.get_attn_backend()
        if "vllm_longspec" not in backend.__module__:
            raise LongSpecError(
                f"model: a layer of the target chose {backend.get_name()}; LongSpec supports "
                "targets whose layers leave the choice of attention to vLLM"
            )
