"""What surrounds the target's forward pass: tree positions and masks before it, compaction after.

vLLM asks a target model that has `get_model_state_cls` for this class; the proposer gives it one.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.attention.backend import AttentionMetadataBuilder
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.model_states.interface import ModelSpecificAttnMetadata
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.states import RequestState
from vllm.v1.worker.utils import AttentionGroup

from vllm_longspec.draft.inputs import CHAIN, OFF, TREE
from vllm_longspec.runtime.request_switch import has_grammar, is_off
from vllm_longspec.runtime.slots import Slots
from vllm_longspec.verify.compaction import compact, stack_layers
from vllm_longspec.verify.histories import follow_paths
from vllm_longspec.verify.hybrid import (
    HybridBuilder,
    HybridMetadata,
    attention_programs,
    tree_requests_in_a_graph,
)
from vllm_longspec.verify.placement import place_trees
from vllm_longspec.verify.sampler import TreeSampler, walk
from vllm_longspec.verify.tree_state import BatchTrees, TreeState

NUM_BUILTIN_LOGITS_PROCESSORS = 3  # bias, penalties, bad words; `Sampler.__init__`


@dataclass
class Runtime:
    """What the proposer and the model state share, set on the target as `longspec`."""

    state: TreeState
    batch: BatchTrees
    req_states: RequestState
    target_layers: list[str]  # attention layers, first to last
    slots: Slots
    chain_only: bool = False  # a custom logits processor may assume chains


@dataclass
class NumTreeRequests(ModelSpecificAttnMetadata):
    """Hands the number of leading requests under verification to the metadata builders."""

    num_tree_reqs: int

    def get_extra_attn_kwargs(
        self, attn_metadata_builder: AttentionMetadataBuilder, num_reqs: int
    ) -> dict[str, Any]:
        if isinstance(attn_metadata_builder, HybridBuilder):
            return {"num_tree_reqs": self.num_tree_reqs}
        return {}


class LongSpecModelState(DefaultModelState):
    def __init__(
        self,
        vllm_config: VllmConfig,
        model: Any,
        encoder_cache: EncoderCache | None,
        device: torch.device,
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        self.runtime: Runtime = model.longspec
        self.positions = self.runtime.batch.positions
        self.ancestors = self.runtime.batch.ancestors
        self.caches: torch.Tensor | None = None
        self.target_groups = slice(0, 1)  # of the groups of layers that have blocks of their own
        self.batch: InputBatch | None = None
        self.cu_num_logits: np.ndarray | None = None  # [num_reqs + 1], for adapters
        self.slots: torch.Tensor | None = None

    def custom_sampler(self, sampler: Sampler) -> tuple[Sampler, TreeSampler]:
        self.runtime.chain_only = len(sampler.logits_processors) > NUM_BUILTIN_LOGITS_PROCESSORS
        follow_paths(sampler, self.runtime.req_states, self.runtime.state)
        spec_config = self.vllm_config.speculative_config
        return sampler, TreeSampler(sampler, spec_config, self.device, self.runtime.state)

    def initialize_kv_cache(
        self, kv_cache_config: KVCacheConfig, block_tables: BlockTables
    ) -> None:
        layers = self.vllm_config.compilation_config.static_forward_context
        groups = [group.layer_names for group in kv_cache_config.kv_cache_groups]
        ours = [i for i, names in enumerate(groups) if names[0] in self.runtime.target_layers]
        self.target_groups = slice(ours[0], ours[-1] + 1)
        # The ring's group comes last: its layer was made after the target's.
        assert ours == list(range(len(groups))[self.target_groups])
        self.caches = stack_layers([[layers[n].kv_cache for n in groups[i]] for i in ours])

    def programs(
        self,
        input_ids: torch.Tensor,  # [max_num_tokens] int32
        slot_mappings: torch.Tensor,  # [num_groups, num_tokens] int64
        sizes: Iterable[tuple[int, int]],  # requests and nodes of each of the batches
    ) -> Iterator[Callable[[], Any]]:
        """Calls that launch each program around and in the target's forward at least once, those of
        sliding layers apart; for no node at all."""
        state, states = self.runtime.state, self.runtime.req_states
        one = torch.zeros(1, dtype=torch.int64, device=self.device)
        starts = torch.zeros(2, dtype=torch.int32, device=self.device)
        yield partial(
            place_trees, state, one, starts, starts, states.num_computed_tokens.gpu,
            states.prefill_len.gpu, input_ids, self.positions, self.ancestors,
        )  # fmt: skip
        yield partial(walk, one, one.int(), starts, one, state, state.parents.shape[1])
        if self.caches is not None:
            slots = slot_mappings[self.target_groups]
            yield partial(compact, self.caches, slots, starts, one, state.path, state.path_len)
        layers = self.vllm_config.compilation_config.static_forward_context
        impls = [layers[name].impl for name in self.runtime.target_layers]
        impl = next((impl for impl in impls if impl.window is None), None)
        if impl is not None:
            yield from attention_programs(impl, sizes, self.ancestors, self.dtype)

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        super().add_request(req_index, new_req_data)
        params = new_req_data.sampling_params
        grammar = has_grammar(params)  # vLLM masks what it allows along chains
        off = params is not None and is_off(params)
        mode = OFF if off else CHAIN if grammar or self.runtime.chain_only else TREE
        self.runtime.slots.take(req_index, mode, grammar)

    def apply_staged_writes(self) -> None:
        super().apply_staged_writes()
        self.runtime.slots.copy_to_uva()

    def preprocess_state(
        self,
        input_batch: InputBatch,
        block_tables: tuple[torch.Tensor, ...],
        kv_cache_config: KVCacheConfig,
        num_computed_tokens: torch.Tensor,
    ) -> None:
        """Real batches only: put the trees' positions and masks in batch order."""
        self.cu_num_logits = input_batch.cu_num_logits_np
        num_tokens = input_batch.num_tokens_after_padding
        self.positions[:num_tokens].copy_(input_batch.positions)
        if input_batch.num_draft_tokens > 0:
            place_trees(
                self.runtime.state,
                input_batch.idx_mapping,
                input_batch.query_start_loc,
                input_batch.cu_num_logits,
                num_computed_tokens,
                self.runtime.req_states.prefill_len.gpu,
                input_batch.input_ids,
                self.positions,
                self.ancestors,
            )

    def take_num_rows(self) -> np.ndarray | None:  # [num_reqs]
        """Of logits, of the real batch whose forward comes next; None for any other."""
        ends, self.cu_num_logits = self.cu_num_logits, None
        return None if ends is None else np.diff(ends)

    def prepare_inputs(
        self, input_batch: InputBatch, req_states: RequestState
    ) -> dict[str, torch.Tensor | None]:
        return {"positions": self.positions[: input_batch.num_tokens_after_padding]}

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        inputs = super().prepare_dummy_inputs(num_reqs, num_tokens)
        return inputs | {"positions": self.positions[:num_tokens]}

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[torch.Tensor, ...],
        slot_mappings: torch.Tensor,
        attn_groups: list[list[AttentionGroup]],
        kv_cache_config: KVCacheConfig,
        for_capture: bool = False,
        ubatch_idx: int = 0,
    ) -> dict[str, Any]:
        self.batch = input_batch
        self.slots = slot_mappings[self.target_groups]
        drafts = input_batch.num_draft_tokens_per_req
        num_tree_reqs = 0 if drafts is None else int(np.count_nonzero(drafts))
        if cudagraph_mode == CUDAGraphMode.FULL:  # as captured
            num_tree_reqs = tree_requests_in_a_graph(
                input_batch.num_reqs_after_padding, input_batch.num_tokens_after_padding
            )
        metadata = super().prepare_attn(
            input_batch,
            cudagraph_mode,
            block_tables,
            slot_mappings,
            attn_groups,
            kv_cache_config,
            for_capture,
            ubatch_idx,
            model_specific_attn_metadata=NumTreeRequests(num_tree_reqs),
        )
        for layer_metadata in metadata.values():
            if isinstance(layer_metadata, HybridMetadata) and layer_metadata.tree is not None:
                tree = layer_metadata.tree
                num_reqs, num_nodes = tree.prefix_lens.shape[0], tree.max_query_len
                tree.ancestors = self.ancestors[:num_reqs, :num_nodes]
                tree.positions = self.positions
        return metadata

    def postprocess_state(
        self,
        idx_mapping: torch.Tensor,
        num_sampled: torch.Tensor,
        num_computed_tokens: torch.Tensor | None = None,
    ) -> None:
        """After sampling, before the next proposal: move what was accepted."""
        batch, self.batch = self.batch, None
        if batch is None or batch.num_draft_tokens == 0:
            return
        assert self.caches is not None and self.slots is not None
        compact(
            self.caches,
            self.slots,
            batch.query_start_loc,
            idx_mapping,
            self.runtime.state.path,
            self.runtime.state.path_len,
        )
