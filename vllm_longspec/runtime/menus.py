"""The plans that are prepared for each batch size, from which every step takes one or none."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vllm_longspec.tree.budget import MENU_BATCH, Plan
from vllm_longspec.tree.lookup import COPY_DEPTH

ENOUGH_COPIES = 11  # nodes; of a copy that goes on, the last ones of more are rarely accepted


@dataclass(frozen=True)
class Menu:
    """For the batch sizes first_batch ... last_batch."""

    first_batch: int
    last_batch: int
    plans: tuple[Plan, ...]  # cheapest first; none: plain decoding
    default: Plan | None  # of `plans`: the one taken where costs are not known; None: none of them

    @property
    def m(self) -> int:
        """Nodes that the scheduler makes room for."""
        return max((plan.m for plan in self.plans), default=0)


def only(first_batch: int, last_batch: int, plan: Plan | None) -> Menu:
    """No choice but, perhaps, plain decoding."""
    return Menu(first_batch, last_batch, () if plan is None else (plan,), plan)


def with_copies(menu: Menu) -> Menu:
    """A plan more: what the text itself proposes, without a forward of the draft; of as many rows
    as another plan, whose CUDA graphs it shares."""
    if not menu.plans or menu.last_batch > MENU_BATCH:
        return menu
    nodes = sorted(plan.m for plan in menu.plans)
    m = next((m for m in nodes if m >= ENOUGH_COPIES), nodes[-1])
    first, *others = menu.plans
    return replace(menu, plans=(first, Plan((), m), *others))


def within(menu: Menu, largest: Plan) -> Menu:
    """Without plans of more nodes than `largest`, which becomes the default where that is gone."""
    plans = tuple(plan for plan in menu.plans if plan.m <= largest.m)
    if menu.default is None or menu.default in plans:
        return replace(menu, plans=plans)
    return replace(menu, plans=tuple(dict.fromkeys((*plans, largest))), default=largest)


def name_of(plan: Plan) -> str:
    shape = " ".join(map(str, plan.tree_shape)) or "a copy of the text"
    return f"{shape}, {plan.m} nodes"


def schedule_of(menus: Sequence[Menu]) -> list[tuple[int, int, int]]:
    """As vLLM's `num_speculative_tokens_per_batch_size`."""
    return [(menu.first_batch, menu.last_batch, menu.m) for menu in menus]


def menu_of_each_batch(menus: Sequence[Menu], max_num_reqs: int) -> list[Menu]:
    """By batch size, [1 + max_num_reqs]; a gap and what is beyond the last have the menu before
    them, as in vLLM's `build_dynamic_sd_schedule_lookup`."""
    of_each = [menus[0]]
    for batch in range(1, max_num_reqs + 1):
        begun = [menu for menu in menus if menu.first_batch <= batch]
        of_each.append(begun[-1])
    return of_each


def plans_of(menus: Sequence[Menu]) -> list[Plan]:
    """Each plan once."""
    return list(dict.fromkeys(plan for menu in menus for plan in menu.plans))


def most_accepted(menus: Sequence[Menu]) -> int:
    """The greatest depth of a node that is verified. Each tree has a copy of the text in it."""
    plans = plans_of(menus)
    return max((min(plan.m, max(len(plan.tree_shape), COPY_DEPTH)) for plan in plans), default=0)


def batches_of_plans(menus: Sequence[Menu], max_num_reqs: int) -> dict[Plan, list[int]]:
    """The batch sizes at which each plan may be taken."""
    batches: dict[Plan, list[int]] = {}
    for batch, menu in enumerate(menu_of_each_batch(menus, max_num_reqs)[1:], start=1):
        for plan in menu.plans:
            batches.setdefault(plan, []).append(batch)
    return batches
