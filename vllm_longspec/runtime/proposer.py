"""The proposer, as vLLM calls it: which tree for which batch, and its CUDA graph; a draft grows it.

The trees stay on the device. On a GPU the proposal for a batch is one CUDA graph.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator
from vllm.v1.worker.gpu.states import RequestState

from vllm_longspec.draft.adapters import without_adapters
from vllm_longspec.draft.beam import TreePlan
from vllm_longspec.draft.inputs import OFF, ProposalInputs, read_inputs
from vllm_longspec.draft.longspec import LongSpecDraft
from vllm_longspec.draft.lookup import Lookup
from vllm_longspec.draft.lookup_draft import LookupDraft
from vllm_longspec.draft.protocol import Draft
from vllm_longspec.errors import LongSpecError
from vllm_longspec.runtime.compile_ahead import compile_ahead
from vllm_longspec.runtime.controller import NONE, Controller
from vllm_longspec.runtime.counters import Counters
from vllm_longspec.runtime.graphs import choose_graphs, coarse, target_graphs
from vllm_longspec.runtime.measure import engine_costs
from vllm_longspec.runtime.menus import (
    Menu,
    batches_of_plans,
    menu_of_each_batch,
    name_of,
    plans_of,
)
from vllm_longspec.runtime.model_state import LongSpecModelState, Runtime
from vllm_longspec.runtime.observations import Batch, Observations
from vllm_longspec.runtime.options import LOOKUP, check_token_budget
from vllm_longspec.runtime.pace import Pace
from vllm_longspec.runtime.profiling import hold_other_graphs, sample_graphs
from vllm_longspec.runtime.slots import Slots
from vllm_longspec.runtime.usual_plan import UsualPlan
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
        menus = self.speculative_config.menus
        of_each = menu_of_each_batch(menus, self.max_num_reqs)
        self.plans = plans_of(of_each[1:])  # of batches that occur
        self.trees = [
            TreePlan.build(plan.tree_shape, plan.m, device, COPY_DEPTH) for plan in self.plans
        ]
        number = {plan: i for i, plan in enumerate(self.plans)}
        batches = batches_of_plans(menus, self.max_num_reqs)
        self.batches = [batches[plan] for plan in self.plans]
        self.nodes = np.array([*(plan.m for plan in self.plans), 0])  # by plan; the last one: NONE
        # By batch size: the plans to choose from, cheapest first, and the one for want of costs.
        self.menus = [[number[plan] for plan in menu.plans] for menu in of_each]
        self.defaults = [NONE if menu.default is None else number[menu.default] for menu in of_each]
        warn_of_a_full_step(of_each, scheduled)
        self.slots = Slots(self.max_num_reqs)
        self.observations = Observations(self.max_num_reqs, device)
        names = ["none", *map(name_of, self.plans)]
        self.counters = Counters(vllm_config, names)  # by 1 + plan
        self.usual_plan = UsualPlan(names)
        self.num_verified: dict[str, int] = {}  # in the last step: nodes by request
        self.controller: Controller | None = None  # once costs are known
        self.no_tokens = self.draft_tokens.new_full(self.draft_tokens.shape, -1)
        depth = max((tree.max_depth for tree in self.trees), default=0)
        self.inputs = ProposalInputs.allocate(self.max_num_reqs, depth, device)
        self.state = TreeState.allocate(
            self.max_num_reqs, self.num_speculative_steps, depth, device
        )
        self.batch_trees = BatchTrees.allocate(self.max_num_reqs, self.max_num_tokens, self.state)
        self.draft_tokens.fill_(-1)  # of requests without a tree yet
        self.lookup = Lookup(self.max_num_reqs, self.max_model_len, device)
        self.graphs: list[CudaGraphManager] = []  # of each plan
        self.compiled = False  # the kernels of all plans
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
            self.state, self.batch_trees, self.req_states, layers, self.slots
        )
        target_model.get_model_state_cls = lambda: LongSpecModelState
        self.compute_target_logits = without_adapters(target_model).compute_logits
        return model

    def set_attn(self, model_state: LongSpecModelState, *args: Any) -> None:
        super().set_attn(model_state, *args)
        # vLLM allocates the KV cache next, and has profiled memory with a small one before.
        model_state.caches = None
        self.graphs.clear()
        self.draft.bind(self.kv_cache_config, self.block_tables)
        for plan, batches in zip(self.plans, self.batches, strict=True):
            logger.info_once(
                "LongSpec: %s requests: %s verified",
                f"{batches[0]}-{batches[-1]}", name_of(plan),
            )  # fmt: skip

    # CUDA graphs

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        full = cudagraph_mode.decode_mode() == CUDAGraphMode.FULL
        mode = CUDAGraphMode.FULL_DECODE_ONLY if full else CUDAGraphMode.NONE
        for batches in self.batches:
            graphs = CudaGraphManager(self.vllm_config, self.device, mode, decode_query_len=1)
            choose_graphs(graphs, {1: coarse(batches)})
            self.graphs.append(graphs)

    def capture(self) -> None:
        self.rest()
        if not self.compiled:
            self.compiled = True
            # A proposal of several ranks holds collectives: one that failed on one rank would leave
            # the others waiting.
            if self.vllm_config.parallel_config.tensor_parallel_size == 1:
                compile_ahead(self.device, self.programs())
                self.rest()
        sample_graphs(self.graphs)
        for tree, graphs in zip(self.trees, self.graphs, strict=True):

            def create_forward_fn(
                desc: BatchExecutionDescriptor, warmup: bool, tree: TreePlan = tree
            ) -> Callable[[CUDAGraphMode], None]:
                assert desc.num_reqs is not None
                num_reqs = desc.num_reqs
                return lambda mode: self.draft.grow(num_reqs, tree)

            graphs.capture(create_forward_fn, f"Capturing LongSpec proposals of {tree.m} nodes")
        hold_other_graphs(self.graphs)
        if self.speculative_config.adaptive and self.controller is None:
            costs = engine_costs(self)
            if costs is not None:
                alone = self.vllm_config.parallel_config.world_size == 1
                pace = Pace() if alone else None
                self.controller = Controller(self.plans, costs, self.max_num_reqs, pace)
                # A batch without a graph costs more than was measured.
                largest = [costs.target[1 + plan.m].batches[-1] for plan in self.plans]
                self.menus = [
                    [plan for plan in menu if batch <= largest[plan]]
                    for batch, menu in enumerate(self.menus)
                ]

    def programs(self) -> Iterator[Callable[[], Any]]:
        """Calls that launch each program of a cycle at least once."""
        for tree, graphs in zip(self.trees, self.graphs, strict=True):
            descs = graphs._capture_descs.get(CUDAGraphMode.FULL, ())
            sizes = sorted((desc.num_reqs or 1 for desc in descs), reverse=True)
            smallest = {self.draft.specialisation(size, tree): size for size in sizes}
            for size in smallest.values():
                yield partial(self.draft.grow, size, tree)
        one = torch.zeros(1, dtype=torch.int64, device=self.device)
        yield partial(self.gather, one, one.int(), 1)
        target = target_graphs()
        descs = [] if target is None else target._capture_descs.get(CUDAGraphMode.FULL, [])
        verified = [(desc.num_reqs or 1, desc.uniform_token_count or 1) for desc in descs]
        yield from self.model_state.programs(
            self.target_input_buffers.input_ids,
            self.block_tables.get_dummy_slot_mappings(1),
            [(reqs, nodes) for reqs, nodes in verified if nodes > 1],
        )

    def rest(self) -> None:
        """Inputs that belong to no request, as captures and measurements leave them."""
        self.inputs.slots.fill_(-1)
        self.inputs.new_positions.fill_(-1)
        self.inputs.context_lens.zero_()

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
            return self.no_tokens[:num_reqs]
        self.draft.refresh()
        self.learn()
        verified = self.verified(input_batch)
        self.num_verified = self.nodes_by_request(input_batch)
        slots = input_batch.idx_mapping_np
        most = num_speculative_tokens
        plan = self.choose(input_batch, self.num_speculative_steps if most is None else most)
        self.slots.plan[slots] = plan
        num_copied = self.state.num_copied
        if plan == NONE:
            self.slots.behind[slots] = True
            if verified is None:
                self.observations.skip()
            else:
                batch = self.batch_of(input_batch, verified)
                num_copied = num_copied[input_batch.idx_mapping]
                self.observations.send(batch, num_sampled, num_copied, None)
            return self.no_tokens[:num_reqs]
        desc: Any = self.graphs[plan].dispatch(num_reqs, num_reqs, 1, num_active_loras=0)
        in_graph = desc.cg_mode == CUDAGraphMode.FULL
        padded = desc.num_reqs if in_graph else num_reqs
        self.gather(input_batch.idx_mapping, num_sampled, padded)
        self.observations.send(
            self.batch_of(input_batch, verified),
            num_sampled,
            num_copied[input_batch.idx_mapping],
            self.lookup.expected[:num_reqs],
        )
        if self.plans[plan].tree_shape:
            behind = self.slots.behind[slots] & has_sampled(input_batch)
            if behind.any():
                self.draft.catch_up(np.flatnonzero(behind))
                self.slots.behind[slots[behind]] = False
        else:
            self.slots.behind[slots] = True
        if in_graph:
            self.graphs[plan].run_fullgraph(desc)
        else:
            self.draft.grow(num_reqs, self.trees[plan])
        return self.draft_tokens[:num_reqs]

    def gather(
        self,
        idx_mapping: torch.Tensor,  # [num_reqs] int64 request slots
        num_sampled: torch.Tensor,  # [num_reqs] int32
        num_rows: int,  # at least num_reqs; the rest is padding
    ) -> None:
        """What a proposal reads, and what it may copy of the texts, in batch order."""
        states = self.req_states
        tokens = states.all_token_ids.gpu
        read_inputs(
            self.inputs, idx_mapping, num_sampled, states.last_sampled_tokens,
            states.num_computed_tokens.gpu, tokens, self.slots.modes.gpu, num_rows,
        )  # fmt: skip
        self.lookup.find(self.inputs, tokens, self.slots.generations.gpu, num_rows)

    def verified(self, input_batch: InputBatch) -> np.ndarray | None:
        """Of each request of this step the plan of its tree, [num_reqs], NONE where none was
        verified whole; None where that is so of all."""
        slots, num_reqs = input_batch.idx_mapping_np, input_batch.num_reqs
        drafts = input_batch.num_draft_tokens_per_req
        if drafts is None:
            self.count(NONE, None)
            return None
        waiting = self.slots.plan[slots]
        whole = (drafts >= self.nodes[waiting]) & (self.slots.modes.np[slots] != OFF)
        whole &= ~input_batch.is_prefilling_np[:num_reqs]
        plans: np.ndarray = np.where(whole, waiting, NONE)
        return plans if (plans != NONE).any() else None

    def nodes_by_request(self, input_batch: InputBatch) -> dict[str, int]:
        """Of each request that had a tree in this step how many nodes of it were verified; a tree
        that the scheduler cut short counts here, too."""
        slots, num_reqs = input_batch.idx_mapping_np, input_batch.num_reqs
        drafts = input_batch.num_draft_tokens_per_req
        if drafts is None:
            return {}
        nodes = np.minimum(drafts, self.nodes[self.slots.plan[slots]])
        nodes[(self.slots.modes.np[slots] == OFF) | input_batch.is_prefilling_np[:num_reqs]] = 0
        return {input_batch.req_ids[i]: int(nodes[i]) for i in np.flatnonzero(nodes)}

    def batch_of(self, input_batch: InputBatch, verified: np.ndarray | None) -> Batch:
        slots, num_reqs = input_batch.idx_mapping_np, input_batch.num_reqs
        nothing = np.zeros(num_reqs, dtype=np.int64)
        return Batch(
            slots,
            self.slots.generations.np[slots],
            np.full(num_reqs, NONE) if verified is None else verified,
            input_batch.num_computed_tokens_np[:num_reqs],
            nothing,
            nothing,
            None,
        )

    def learn(self) -> None:
        """Counts, and tells the controller, what an earlier step accepted."""
        batch = self.observations.receive()
        if batch is None:
            return
        same = self.slots.generations.np[batch.slots] == batch.generations
        for plan in np.unique(batch.plans[batch.plans != NONE]):
            seen = batch.of(batch.plans == plan)
            self.count(int(plan), seen)
            if self.controller is not None:
                known = batch.of((batch.plans == plan) & same)
                self.controller.observe(int(plan), known.slots, known.accepted, known.copied)
        if self.controller is not None and batch.copies_expected is not None:
            self.controller.expect_copies(batch.slots[same], batch.copies_expected[same])

    def count(self, plan: int, seen: Batch | None) -> None:
        """For those who look: a step of this plan."""
        if self.vllm_config.parallel_config.rank == 0:
            self.usual_plan.observe(1 + plan)
        if seen is None:
            self.counters.add(1 + plan)
        else:
            nodes = len(seen.slots) * self.plans[plan].m
            self.counters.add(1 + plan, nodes, seen.accepted, seen.copied, seen.context_lens)

    def choose(self, input_batch: InputBatch, most: int) -> int:
        """The number of a plan of at most `most` nodes, or NONE."""
        # vLLM's warm-up has the largest tree in the largest batch; serving never has.
        num_reqs, slots = input_batch.num_reqs, input_batch.idx_mapping_np
        menu = [plan for plan in self.menus[num_reqs] if self.plans[plan].m <= most]
        default = self.defaults[num_reqs]
        taken, self.slots.taken = self.slots.taken, []
        if self.controller is not None:
            self.controller.forget(taken)
        off = self.slots.modes.np[slots] == OFF
        if off.all():
            return NONE
        if self.controller is None or self.slots.has_grammar[slots].any():
            return default if default in menu or default == NONE else (menu or [NONE])[-1]
        num_context = int(input_batch.num_computed_tokens_np[:num_reqs].sum())
        plan = self.controller.choose(menu, slots[~off], num_context, int(off.sum()))
        if menu:
            prompts = bool(input_batch.is_prefilling_np[:num_reqs].any())
            self.controller.took(plan, num_reqs, num_context, prompts)
        return plan

    def nodes_to_verify(self, slots: np.ndarray) -> int | None:
        """Of the trees that these requests wait to have verified, the most nodes; None where as
        many have to be verified as the scheduler made room for."""
        if self.slots.has_grammar[slots].any():
            return None
        return int(self.nodes[self.slots.plan[slots]].max(initial=0))

    def profile_memory(self) -> None:
        """What a step needs beside what vLLM profiles, so that it leaves room: logits of every node
        verified, and an eager proposal of the widest level."""
        served = [
            (batches[-1], tree) for tree, batches in zip(self.trees, self.batches, strict=True)
        ]
        nodes = max((batch * (1 + tree.m) for batch, tree in served), default=0)
        rows = min(max(nodes, self.max_num_reqs), self.max_num_tokens)
        hidden = torch.zeros(rows, self.hidden_size, dtype=self.dtype, device=self.device)
        profile_verification(self.compute_target_logits(hidden))
        grown = [(batch, tree.shape) for batch, tree in served if tree.shape]
        if not grown:
            return
        rows = max(batch * max((1, *shape[:-1])) for batch, shape in grown)
        self.draft.profile(rows, max(max(shape) for _, shape in grown))


def has_sampled(input_batch: InputBatch) -> np.ndarray:  # [num_reqs] bool
    """Whose prompt is complete: before, or by this step."""
    num_reqs, drafts = input_batch.num_reqs, input_batch.num_draft_tokens_per_req
    computed = input_batch.num_computed_tokens_np + input_batch.num_scheduled_tokens
    if drafts is not None:
        computed = computed - drafts
    prefilling = input_batch.is_prefilling_np[:num_reqs]
    return ~prefilling | (computed >= input_batch.prefill_len_np)


def warn_of_a_full_step(menus: Sequence[Menu], max_num_tokens: int) -> None:
    """`menus`: by batch size."""
    crowded = {b: menu.m for b, menu in enumerate(menus) if b * (1 + menu.m) > max_num_tokens}
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
