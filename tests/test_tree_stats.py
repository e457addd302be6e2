"""vLLM's own numbers, of trees: what the scheduler counts is what workers verified."""

import copy
import pickle
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Engine, longspec, text_prompt
from processes import own_process
from vllm import SamplingParams
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.prometheus import unregister_vllm_metrics
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.spec_decode.metrics import SpecDecodingLogging, SpecDecodingProm, SpecDecodingStats

from vllm_longspec import plugin
from vllm_longspec.draft.inputs import CHAIN, OFF, TREE
from vllm_longspec.runtime import patches
from vllm_longspec.runtime.controller import NONE
from vllm_longspec.runtime.hooks import num_positions, report_verified, scheduler_class
from vllm_longspec.runtime.menus import Menu, most_accepted, only, with_copies
from vllm_longspec.runtime.proposer import LongSpecProposer
from vllm_longspec.runtime.tree_scheduler import (
    NUM_VERIFIED,
    TreeRequestMetrics,
    TreeScheduler,
    count_only,
)
from vllm_longspec.tree.budget import Plan

SMALL, LARGE = Plan((4, 4, 4), 7), Plan((4, 16, 16, 16, 16), 31)
MENU = with_copies(Menu(1, 4, (SMALL, LARGE), LARGE))


def test_nodes_of_each_request() -> None:
    """Whole trees, one that was cut, a chain; none of a request that is off or has no tree, nor of
    a prompt's rows that are padded to a verification."""
    slots = SimpleNamespace(
        plan=np.array([0, 1, 0, 1, NONE, 1, 1]),
        modes=SimpleNamespace(np=np.array([TREE, TREE, TREE, CHAIN, TREE, OFF, TREE])),
    )
    proposer: Any = SimpleNamespace(nodes=np.array([7, 31, 0]), slots=slots)
    order = [6, 5, 4, 3, 2, 1, 0]
    batch: Any = SimpleNamespace(
        req_ids=[f"r{slot}" for slot in order],
        num_reqs=7,
        idx_mapping_np=np.array(order),
        num_draft_tokens_per_req=np.array([31, 31, 31, 31, 5, 31, 31], dtype=np.int32),
        is_prefilling_np=np.array([True] + [False] * 7),
    )
    verified = LongSpecProposer.nodes_by_request(proposer, batch)
    assert verified == {"r0": 7, "r1": 31, "r2": 5, "r3": 31}
    batch.num_draft_tokens_per_req = None
    assert LongSpecProposer.nodes_by_request(proposer, batch) == {}


@pytest.mark.parametrize("on_its_way", [False, True])
def test_what_was_verified_reaches_the_scheduler(on_its_way: bool) -> None:
    """In a process of its own, too; with asynchronous scheduling the worker hands over an output
    that is not complete yet."""
    made = ModelRunnerOutput(["a"], {"a": 0})
    runner = SimpleNamespace(speculator=SimpleNamespace(num_verified={"a": 7}))
    report_verified(SimpleNamespace(model_runner_output=made) if on_its_way else made, runner)
    assert getattr(pickle.loads(pickle.dumps(made)), NUM_VERIFIED) == {"a": 7}
    report_verified(None, runner)  # of a step that failed


def test_what_no_tree_had_counts_as_invalid() -> None:
    scheduled = SchedulerOutput.make_empty()
    drafts = {"whole": 31, "small": 31, "plain": 31, "grammar": 31}
    scheduled.scheduled_spec_decode_tokens = {name: [-1] * n for name, n in drafts.items()}
    scheduled.num_invalid_spec_tokens = {"grammar": 28}
    before = copy.deepcopy(scheduled)
    counted = count_only(scheduled, {"whole": 31, "small": 7, "grammar": 31, "gone": 31})
    invalid = {"whole": 0, "small": 24, "plain": 31, "grammar": 28}
    assert counted.num_invalid_spec_tokens == invalid
    assert counted.scheduled_spec_decode_tokens == before.scheduled_spec_decode_tokens
    assert scheduled == before


def scheduler(log_stats: bool = True) -> TreeScheduler:
    made = TreeScheduler.__new__(TreeScheduler)
    made.log_stats, made.most_accepted = log_stats, 16
    return made


def counted(steps: list[tuple[int, int]]) -> SpecDecodingStats | None:
    """Of (verified nodes, accepted ones) of each request of a step that made room for 31."""
    stats = None
    for i, (nodes, accepted) in enumerate(steps):
        invalid = {f"r{i}": 31 - nodes}
        stats = scheduler().make_spec_decoding_stats(stats, 31, accepted, invalid, f"r{i}")
    return stats


def test_stats_of_a_step() -> None:
    stats = counted([(0, 0), (31, 3), (0, 0), (7, 0), (31, 16), (0, 0)])
    assert stats is not None
    assert (stats.num_drafts, stats.num_draft_tokens, stats.num_accepted_tokens) == (3, 69, 19)
    assert stats.num_accepted_tokens_per_pos == [2] * 3 + [1] * 13
    assert stats.num_draft_tokens_per_pos == [3] * 7 + [2] * 9
    assert counted([(0, 0), (0, 0)]) is None
    assert scheduler(log_stats=False).make_spec_decoding_stats(None, 31, 3, None, "a") is None
    metrics = TreeRequestMetrics.new(16)
    for nodes, accepted in ((31, 3), (0, 0), (7, 0)):
        metrics.observe(nodes, accepted, detailed=True)
    assert metrics.to_dict() == {
        "mean_acceptance_length": 2.5,
        "draft_acceptance_rate": 3 / 38,
        "acceptance_histogram": [1, 0, 0, 1, *[0] * 13],
        "num_spec_steps": 2,
        "num_accepted_draft_tokens": 3,
        "num_draft_tokens": 38,
        "num_spec_tokens": 16,
        "per_step_accepted": [3, 0],
        "per_step_drafted": [31, 7],
    }


@pytest.mark.parametrize(
    "menu, depth",
    [(MENU, 16), (only(1, 4, SMALL), 7), (only(1, 4, Plan((), 11)), 11),
     (only(1, 4, Plan((1,) * 20, 20)), 20), (only(1, 4, None), 0)],
)  # fmt: skip
def test_positions_are_depths(menu: Menu, depth: int) -> None:
    assert most_accepted([menu]) == depth


def test_the_log_and_prometheus_have_a_number_for_each_depth() -> None:
    plugin.register()
    stats = counted([(31, 3), (7, 1)])
    assert stats is not None
    lines: list[str] = []
    log = SpecDecodingLogging()
    log.observe(stats)
    log.log(lambda text, *numbers: lines.append(text % numbers))
    (line,) = lines
    assert "Mean acceptance length: 3.00," in line
    assert "Per-position acceptance rate: 1.000, 0.500, 0.500, 0.000," in line
    assert line.count("0.000") == 13 and "Avg Draft acceptance rate: 10.5%" in line
    for method, positions in (("longspec", 16), ("ngram", 31)):
        unregister_vllm_metrics()
        config: Any = SimpleNamespace(method=method, num_speculative_tokens=31, menus=(MENU,))
        prom = SpecDecodingProm(config, ["engine"], {0: ["0"]})
        assert len(prom.counter_spec_decode_num_accepted_tokens_per_pos[0]) == positions
        if method == "longspec":
            assert num_positions(config) == positions
            prom.observe(stats)
    unregister_vllm_metrics()


@pytest.mark.parametrize("base", [Scheduler, AsyncScheduler])
def test_the_scheduler_of_an_engine(base: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """LongSpec's with LongSpec only; of whatever class vLLM would take."""
    from vllm.config.scheduler import SchedulerConfig

    plugin.register()

    def init(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        self.given = args, kwargs

    monkeypatch.setattr(Scheduler, "__init__", init)
    monkeypatch.setattr(AsyncScheduler, "__init__", init)
    config: Any = SimpleNamespace(scheduler_cls=None, async_scheduling=base is AsyncScheduler)
    create: Any = SchedulerConfig.get_scheduler_cls(config)
    for method in (None, "ngram", "longspec"):
        chosen = SimpleNamespace(method=method, menus=(MENU,)) if method else None
        made = create(vllm_config=SimpleNamespace(speculative_config=chosen), log_stats=True)
        assert made.given == ((), {"log_stats": True})
        if method == "longspec":
            assert isinstance(made, TreeScheduler) and isinstance(made, base)
            assert made.most_accepted == 16
        else:
            assert type(made) is base
    assert scheduler_class(dict) is dict  # of another kind, of somebody else's
    # It is a class, for who asks; a class that takes names only; what is no class is left alone.
    assert issubclass(create, base) and create.__name__ == base.__name__
    derived = type("Derived", (create,), {})
    assert type(derived(vllm_config=SimpleNamespace(speculative_config=chosen))) is derived

    class ByName(Scheduler):
        def __init__(self, *, vllm_config: Any) -> None:
            self.config = vllm_config

    config.get_scheduler_cls = None
    for given in (ByName, lambda **given: given):
        monkeypatch.setattr(SchedulerConfig, "get_scheduler_cls", lambda self, given=given: given)
        patches.patch_scheduler()
        plain = SimpleNamespace(speculative_config=None)
        made = SchedulerConfig.get_scheduler_cls(config)(vllm_config=plain)
        assert type(made) is ByName if given is ByName else made == {"vllm_config": plain}


CHEAP = with_copies(Menu(1, 4, (Plan((2, 2), 3), Plan((4, 4, 4), 12)), Plan((2, 2), 3)))


def counters_of_an_engine(asynchronous: bool) -> dict[str, Any]:
    """Another plan at every step, at random: none, too. In a process of its own."""
    from gpu_like import allow_async_scheduling, choose_at_random

    if asynchronous:
        allow_async_scheduling()
    choose_at_random([CHEAP], Counter())
    engine = Engine(
        longspec(), block_size=16, async_scheduling=asynchronous,
        per_request_spec_decode_metrics="detailed",
    )  # fmt: skip
    scheduler_of = type(engine.llm.llm_engine.engine_core.engine_core.scheduler)
    off = {"extra_args": {"longspec": "off"}}
    kinds: list[dict[str, Any]] = [{}, {"presence_penalty": 0.5}, off, {}]
    # All of the last one's prompt but a token is cached the second time: a padded verification.
    prompts = [{"prompt_token_ids": text_prompt(i, 40 + 20 * i)} for i in range(3)]
    prompts.append({"prompt_token_ids": text_prompt(3, 33)})
    params = [
        SamplingParams(temperature=0, max_tokens=16 + 4 * i, ignore_eos=True, **kind)
        for i, kind in enumerate(kinds)
    ]
    requests = []
    for _ in range(2):
        outputs = engine.llm.generate(prompts, params, use_tqdm=False)
        requests += [output.outputs[0].spec_decode_metrics.to_dict() for output in outputs]
    # What was accepted is known two steps later.
    flush = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, **off)
    engine.llm.generate(prompts[:1], flush, use_tqdm=False)
    totals: dict[str, Any] = {}
    for metric in engine.llm.get_metrics():
        if metric.name == "vllm:spec_decode_num_accepted_tokens_per_pos":
            totals["depths"] = list(metric.values)
        elif "spec_decode" in metric.name or "longspec" in metric.name:
            name = metric.name.removeprefix("vllm:")
            totals[name] = totals.get(name, 0) + metric.value
            if name == "longspec_steps" and metric.labels["plan"] == "none":
                totals["plain steps"] = metric.value
    return totals | {"requests": requests, "scheduler": scheduler_of.__name__}


@pytest.mark.skipif(torch.cuda.is_available(), reason="gpu_like emulates a GPU on a CPU")
@pytest.mark.parametrize("asynchronous", [False, pytest.param(True, marks=pytest.mark.full)])
def test_vllms_counters_are_longspecs(asynchronous: bool) -> None:
    with own_process() as pool:
        found = pool.submit(counters_of_an_engine, asynchronous).result()
    assert found["scheduler"] == ("TreeAsyncScheduler" if asynchronous else "TreeScheduler")
    drafts = found["spec_decode_num_drafts"]
    tokens = found["spec_decode_num_draft_tokens"]
    accepted = found["spec_decode_num_accepted_tokens"]
    assert found["plain steps"] > 5 and drafts > 20 and accepted > 10, found
    ours = [
        found[f"longspec_{name}"] for name in ("verifications", "nodes_verified", "nodes_accepted")
    ]
    if asynchronous:  # workers verify a step more of a request that ended
        assert np.all(np.array([drafts, tokens, accepted]) <= ours)
        assert ours[0] - drafts <= len(found["requests"])
    else:
        assert [drafts, tokens, accepted] == ours
    depths = found["depths"]
    assert len(depths) == 12 and sum(depths) == accepted and depths[0] <= drafts
    assert depths == sorted(depths, reverse=True)
    requests = found["requests"]
    assert sum(one["num_spec_steps"] for one in requests) == drafts
    assert sum(one["num_draft_tokens"] for one in requests) == tokens
    assert sum(one["num_accepted_draft_tokens"] for one in requests) == accepted
    for i, one in enumerate(requests):
        assert len(one["acceptance_histogram"]) == 13
        drafted = set(one.get("per_step_drafted", ()))
        assert drafted <= {3, 12} and bool(drafted) == (i % 4 != 2)
