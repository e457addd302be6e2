"""Counters: what the worker adds is what the front end shows; nothing of it can fail a step."""

import errno
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families

from vllm_longspec.runtime import counters as module
from vllm_longspec.runtime import usual_plan
from vllm_longspec.runtime.counters import CONTEXTS, Counters, shared_folder
from vllm_longspec.runtime.usual_plan import UsualPlan

PLANS = ["none", "4 4 4, 7 nodes", "8 16 16 16 16, 31 nodes"]


def config(folder: Path | str, rank: int = 0, engine: int = 0) -> Any:
    return SimpleNamespace(
        model_config=SimpleNamespace(served_model_name='a "model"'),
        parallel_config=SimpleNamespace(rank=rank, data_parallel_index=engine),
        speculative_config=SimpleNamespace(counters_folder=str(folder)),
    )


def shown(folder: Path) -> dict[tuple[str, ...], float]:
    """As /metrics would show them: name and the label that is not model or engine."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(folder))
    samples = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        assert family.type == "counter" and family.documentation
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("model_name") == 'a "model"'
            engine = labels.pop("engine")
            name = sample.name.removeprefix("vllm:longspec_")
            samples[name, engine, *labels.values()] = sample.value
    return samples


def test_what_is_added_is_shown(tmp_path: Path) -> None:
    counters = Counters(config(tmp_path), PLANS)
    assert set(shown(tmp_path).values()) == {0.0}  # from the start, so that rates have a beginning
    for _ in range(3):
        counters.add(0)
    counters.add(
        2, nodes=80, accepted=np.array([3, 0, 5]), copied=np.array([1, 0, 5]),
        context_lens=np.array([1023, 1024, 1 << 17]),
    )  # fmt: skip
    counters.add(2, 31, np.array([2]), np.array([0]), np.array([65535]))
    values = shown(tmp_path)
    assert {key: value for key, value in values.items() if value} == {
        ("steps_total", "0", "none"): 3,
        ("steps_total", "0", PLANS[2]): 2,
        ("nodes_verified_total", "0", PLANS[2]): 111,
        ("nodes_accepted_total", "0", PLANS[2]): 10,
        ("copied_tokens_total", "0"): 6,
        ("accepted_tokens_total", "0", "<1k"): 3,
        ("accepted_tokens_total", "0", "16k-64k"): 2,
        ("accepted_tokens_total", "0", ">=64k"): 5,
        ("verifications_total", "0", "<1k"): 1,
        ("verifications_total", "0", "1k-4k"): 1,
        ("verifications_total", "0", "16k-64k"): 1,
        ("verifications_total", "0", ">=64k"): 1,
    }
    assert len(values) == 3 * len(PLANS) + 1 + 2 * len(CONTEXTS)


def test_engines_have_their_own_and_one_engine_counts_once(tmp_path: Path) -> None:
    workers = [Counters(config(tmp_path, rank, dp), PLANS) for dp in (0, 1) for rank in (0, 1)]
    for worker in workers:
        worker.add(1)
    steps = {key[1:]: v for key, v in shown(tmp_path).items() if key[0] == "steps_total" and v}
    assert steps == {("0", PLANS[1]): 1, ("1", PLANS[1]): 1}


def test_a_file_is_private_and_goes_with_its_engine(tmp_path: Path) -> None:
    counters = Counters(config(tmp_path), PLANS)
    (file,) = tmp_path.iterdir()
    assert file.suffix == ".db" and stat.S_IMODE(file.stat().st_mode) == 0o600
    assert file.stat().st_blocks * 512 >= file.stat().st_size  # a full disk was met before
    del counters
    assert not list(tmp_path.iterdir())


def test_many_plans_and_long_names_fit(tmp_path: Path) -> None:
    plans = [f"{'é' * 200} {i}" for i in range(300)]
    counters = Counters(config(tmp_path), plans)
    (file,) = tmp_path.iterdir()
    size = file.stat().st_size
    counters.add(299)
    assert shown(tmp_path)["steps_total", "0", plans[299]] == 1
    assert file.stat().st_size == size


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(
        module.logger, "warning_once", lambda text, *args: said.append(text % args), raising=False
    )
    return said


@pytest.mark.parametrize("why", ["missing", "full"])
def test_without_a_file_counting_goes_on(
    why: str, tmp_path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if why == "full":

        def full(*_: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "posix_fallocate", full)
    counters = Counters(config(tmp_path if why == "full" else tmp_path / "no"), PLANS)
    counters.add(1, 7, np.array([2]), np.array([1]), np.array([5]))
    assert counters.by_plan[:, 1].tolist() == [1, 7, 2] and counters.values.sum() == 1 + 7 + 2 + 4
    assert not list(tmp_path.iterdir())
    (said,) = warnings
    assert "/metrics has none of vllm:longspec_*" in said
    assert ("No space left" if why == "full" else "No such file") in said


def test_a_front_end_that_can_make_no_folder_says_so_and_workers_do_not(
    monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    def read_only(**_: Any) -> str:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.delenv(module.MULTIPROCESS_FOLDER, raising=False)
    monkeypatch.setattr(module, "_folder", None)
    monkeypatch.setattr(module.tempfile, "mkdtemp", read_only)
    assert shared_folder() == shared_folder() == ""
    Counters(config(""), PLANS).add(1)
    (said,) = warnings
    assert "Read-only" in said


def test_an_addition_costs_microseconds(tmp_path: Path) -> None:
    counters = Counters(config(tmp_path), PLANS)
    step = 2, 64 * 31, np.full(64, 3), np.full(64, 1), np.arange(64) * 1500
    times = []
    for _ in range(300):
        start = time.perf_counter()
        counters.add(*step)
        times.append(time.perf_counter() - start)
    assert sorted(times)[len(times) // 2] < 300e-6  # about 30 on a core of its own


FRONT_END = """
import os
from prometheus_client import REGISTRY, generate_latest
from vllm_longspec.runtime.counters import Counters, shared_folder
from test_counters import config, PLANS
folder = shared_folder()
assert shared_folder() == folder and (os.stat(folder).st_mode & 0o777) == 0o700
workers = []
for _ in range(2):
    child = os.fork()
    if child == 0:
        counters = Counters(config(folder), PLANS)
        counters.add(1)
        os._exit(0)  # killed: its file stays
    os.waitpid(child, 0)
from vllm.v1.metrics.prometheus import get_prometheus_registry, unregister_vllm_metrics
unregister_vllm_metrics()  # as each engine of a process does
assert get_prometheus_registry() is REGISTRY
(line,) = [x for x in generate_latest(REGISTRY).decode().splitlines()
           if x.startswith("vllm:longspec_steps_total") and PLANS[1] in x]
assert line.endswith(" 2.0"), line
import multiprocessing
one = multiprocessing.get_context("fork").Process(target=print)  # leaves the folder alone
one.start(); one.join()
assert os.listdir(folder)
print(folder)
"""


def front_end(code: str, **variables: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != module.MULTIPROCESS_FOLDER}
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300,
        env=environment | {"PYTHONPATH": path} | variables,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_the_front_end_shows_them_in_vllms_registry_and_leaves_nothing() -> None:
    assert not Path(front_end(FRONT_END)).exists()


SEVERAL_SERVERS = """
from vllm_longspec.runtime.counters import Counters, shared_folder
from test_counters import config, PLANS
import os
assert shared_folder() == os.environ["PROMETHEUS_MULTIPROC_DIR"]
counters = Counters(config(shared_folder()), PLANS)
counters.add(1)
from prometheus_client import Counter, REGISTRY, generate_latest
Counter("vllm:other", "of vLLM's own").inc()
from vllm.v1.metrics.prometheus import get_prometheus_registry
text = generate_latest(get_prometheus_registry()).decode()
assert "vllm:other_total 1.0" in text
assert [x for x in text.splitlines() if "longspec_steps_total{" in x and x.endswith(" 1.0")], text
assert "longspec" not in generate_latest(REGISTRY).decode()  # would be counted twice
print()
"""


def test_with_several_api_servers_each_shows_them(tmp_path: Path) -> None:
    """vLLM then has prometheus_client's multiprocess mode, and each server its own config."""
    front_end(SEVERAL_SERVERS + "print(1)", PROMETHEUS_MULTIPROC_DIR=str(tmp_path))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    now = SimpleNamespace(seconds=0.0, lines=[])
    monkeypatch.setattr(usual_plan.time, "monotonic", lambda: now.seconds)
    monkeypatch.setattr(
        usual_plan.logger, "info", lambda text, *args: now.lines.append(text % args)
    )
    yield now


def test_a_plan_that_becomes_the_usual_one_is_named_once(clock: SimpleNamespace) -> None:
    usual = UsualPlan(PLANS)
    for step in range(2000):
        usual.observe(2 if step % 4 else 0)
    assert clock.lines == [
        "LongSpec: usual plan now: 8 16 16 16 16, 31 nodes (75% of the last 256 steps)"
    ]
    clock.seconds = 100
    for step in range(2000):
        usual.observe(step % 3)  # none has half
    assert len(clock.lines) == 1
    for _ in range(300):
        usual.observe(0)
    assert clock.lines[1:] == ["LongSpec: usual plan now: none (50% of the last 256 steps)"]


def test_at_most_a_line_a_minute(clock: SimpleNamespace) -> None:
    usual = UsualPlan(PLANS)
    for plan in (0, 1, 2):
        for _ in range(300):
            usual.observe(plan)
    assert len(clock.lines) == 1  # 1 and 2 within the minute
    clock.seconds = 61
    for _ in range(10):
        usual.observe(2)
    assert clock.lines[1:] == [
        "LongSpec: usual plan now: 8 16 16 16 16, 31 nodes (100% of the last 256 steps)"
    ]
