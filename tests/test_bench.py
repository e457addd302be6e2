"""The benches: tables, plots, mistakes, and one real cycle on a CPU."""

import json
import lzma
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import DRAFT, TARGET, documents
from typer.testing import CliRunner

from vllm_longspec.bench.cycle import Cycle, chosen, cycle_report, proposers
from vllm_longspec.bench.e2e import EndToEnd, e2e_table
from vllm_longspec.bench.probe import KERNEL_KINDS, OTHER_KERNELS, graph_of, kind_of, level_times
from vllm_longspec.bench.report import PLAIN, cycle_table, kernel_table, parts_plot, ratio_plot
from vllm_longspec.bench.startup import (
    EMPTY,
    FILLED,
    Start,
    kv_bytes,
    startup_report,
    startup_table,
)
from vllm_longspec.cli import app
from vllm_longspec.errors import LongSpecError
from vllm_longspec.eval.acceptance import Acceptance

TREE = "LongSpec, 31 nodes"


def cycle(proposer: str, context: int, batch: int, parts: dict[str, float]) -> Cycle:
    total = sum(parts.values())
    return Cycle(proposer, context, batch, 40, total, [total - 0.01, total + 0.01], parts, 32)


def some_cycles() -> list[Cycle]:
    """Plain decoding at all points but one."""
    return [
        cycle(PLAIN, 4096, 1, {"target": 4.0, "head": 1.0}),
        cycle(PLAIN, 4096, 8, {"target": 6.0, "head": 2.0}),
        cycle(TREE, 4096, 1, {"target": 4.5, "head": 1.0, "proposal": 2.0}),
        cycle(TREE, 4096, 8, {"target": 9.0, "head": 3.0, "proposal": 4.0}),
        cycle(TREE, 32768, 1, {"target": 5.0, "head": 1.0, "proposal": 2.5}),
    ]


def read_table(table: str) -> list[dict[str, str]]:
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    header, ruler, *rows = lines
    assert set(ruler) == {"---"}
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_cycle_table() -> None:
    rows = read_table(cycle_table(some_cycles()))
    points = [(row["context"], row["batch"], row["proposer"]) for row in rows]
    assert points == [
        ("4,096", "1", PLAIN), ("4,096", "1", TREE), ("4,096", "8", PLAIN), ("4,096", "8", TREE),
        ("32,768", "1", TREE),
    ]  # fmt: skip
    assert [row["R"] for row in rows] == ["1.00", "1.50", "1.00", "2.00", ""]
    assert [row["proposal"] for row in rows] == ["", "2.000", "", "4.000", "2.500"]
    assert rows[1]["ms a cycle"] == "7.500" and rows[1]["two runs"] == "7.490 7.510"


def test_kernel_table() -> None:
    cycles = some_cycles()
    assert kernel_table(cycles) == ""
    cycles[0].kernels = {"microseconds": {"target": {"rest": 1500.0}}, "levels": []}
    cycles[2].kernels = {
        "microseconds": {"proposal": {"rest": 250.0}, "target": {"tree attention": 140.0}},
        "levels": [300.0, 200.0],
    }
    plain, tree = read_table(kernel_table(cycles))
    assert plain["target: rest"] == "1.500" and plain["proposal: rest"] == ""
    assert tree["target: tree attention"] == "0.140" and tree["proposal: rest"] == "0.250"
    assert (plain["draft level 1"], tree["draft level 1"]) == ("", "0.300")
    assert tree["draft level 2"] == "0.200" and "draft level 3" not in tree
    assert list(tree).index("target: tree attention") < list(tree).index("proposal: rest")


@pytest.mark.parametrize("plot", [ratio_plot, parts_plot])
def test_cycle_plots(plot: Callable[..., None], tmp_path: Path) -> None:
    plot(some_cycles(), tmp_path / "all.png")
    plot(some_cycles()[:1], tmp_path / "plain.png")  # nothing to compare
    for name in ("all.png", "plain.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert (tmp_path / name).stat().st_size > 10_000


def decoded(
    proposer: str, temperature: float, outputs: list[list[int]], drafts: int = 0
) -> Acceptance:
    return Acceptance(
        proposer=proposer, temperature=temperature, tokens=sum(map(len, outputs)),
        verifications=drafts, mean_acceptance_length=2.5, per_depth=[], repeated_8grams=0.25,
        tokens_per_second=100.0, outputs=outputs,
    )  # fmt: skip


def test_e2e_table() -> None:
    plain, other = [[1, 2], [3, 4], [5, 6]], [[1, 2], [3, 9], [5, 6]]
    results = [
        EndToEnd(8192, 1, decoded(TREE, 0.0, other, 7), [[310, 290, 5], [300, 1e9, 300]]),
        EndToEnd(8192, 1, decoded(PLAIN, 0.0, plain), [[110, 120, 130], [120, 120, 120]]),
        EndToEnd(8192, 1, decoded(PLAIN, 0.6, other), [[100], [100]]),
        EndToEnd(8192, 1, decoded(TREE, 0.6, other, 7), [[140], [160]]),
        EndToEnd(8192, 4, decoded(TREE, 0.0, other, 7), [[900], [900]]),  # no plain run beside it
    ]
    rows = read_table(e2e_table(results))
    assert [(row["at once"], row["T"], row["proposer"]) for row in rows] == [
        ("1", "0", TREE), ("1", "0", PLAIN), ("1", "0.6", PLAIN), ("1", "0.6", TREE),
        ("4", "0", TREE),
    ]  # fmt: skip
    assert [row["over plain"] for row in rows] == ["2.50x", "1.00x", "1.00x", "1.50x", ""]
    assert [row["same tokens"] for row in rows] == ["2 of 3", "3 of 3", "3 of 3", "3 of 3", ""]
    assert [row["acceptance length"] for row in rows] == ["2.50", "", "", "2.50", "2.50"]
    assert {row["repeated 8-grams"] for row in rows} == {"25%"}
    assert rows[0]["tokens/s"] == "300.0" and rows[0]["two runs"] == "290.0 300.0"


def test_startup_table() -> None:
    assert kv_bytes("llama3-8b") == 128 * 1024
    starts = [
        Start(PLAIN, EMPTY, 50.0, 800_000), Start(PLAIN, FILLED, 30.0, 800_000),
        Start(TREE, EMPTY, 61.54, 791_808), Start(TREE, FILLED, 29.0, 791_808),
    ]  # fmt: skip
    rows = read_table(startup_table(starts, 128 * 1024))
    assert [row["over plain"] for row in rows] == ["+0.0", "+0.0", "+11.5", "-1.0"]
    assert {row["less than plain's"] for row in rows[2:]} == {"1.00 GiB"}
    assert rows[0]["KV cache"] == "97.66 GiB"
    assert read_table(startup_table(starts[2:], 1))[0]["over plain"] == ""


def test_chosen() -> None:
    configs = {"a": None, "b": {"method": "longspec"}, "c": {"method": "eagle"}}
    assert chosen(configs, []) == configs
    assert list(chosen(configs, ["c", "a"])) == ["c", "a"]
    with pytest.raises(LongSpecError, match=r"^only: 'd' is none of 'a', 'b', 'c'$"):
        chosen(configs, ["b", "d"])


@pytest.mark.parametrize("shape", ["tiny", "qwen3-30b-a3b"])
@pytest.mark.parametrize("draft_vocab_size", [0, 512])
def test_proposers_can_be_read(tmp_path: Path, draft_vocab_size: int, shape: str) -> None:
    from transformers import AutoConfig

    sizes = []
    for name, config in proposers(tmp_path, shape, draft_vocab_size).items():
        assert (name == PLAIN) == (config is None)
        if config is not None:
            stored = AutoConfig.from_pretrained(config["model"])
            assert stored.num_hidden_layers == 1
            assert not any("expert" in field for field in stored.to_dict())
            sizes.append(getattr(stored, "draft_vocab_size", None))
    assert (draft_vocab_size in sizes) == bool(draft_vocab_size)


def test_kinds_of_kernels() -> None:
    names = {
        "_tree_attention_kernel": "tree attention",
        "_ring_attention_kernel": "ring attention",
        "void cutlass::device_kernel<flash::FlashAttnFwdSm90<...>>": "prefix attention",
        "prepare_varlen_num_blocks_kernel": "prefix attention",
        "_walk_kernel": "walk",
        "_compact_kernel": "compaction",
        "nvjet_hsh_128x8_64x12_2x1_v_bz_TNT": OTHER_KERNELS,
    }
    assert {kind for kind, _ in KERNEL_KINDS} | {OTHER_KERNELS} == set(names.values())
    for name, kind in names.items():
        assert kind_of(name) == kind, name


def test_graphs_of_kernels() -> None:
    target = ["nvjet", "_tree_attention"] * 100
    largest = len(target)
    assert graph_of(target, largest) == "target"
    assert graph_of(["nvjet"] * largest, largest) == "target"
    assert graph_of(["nvjet", "_ring_attention_kernel"] * 90, largest) == "proposal"
    assert graph_of(["nvjet"] * 20, largest) == "proposal"  # EAGLE's
    alone = (["nvjet"], ["_ring_write_kernel"])
    assert {graph_of(kernels, largest) for kernels in alone} == {"outside graphs"}


@dataclass
class Kernel:
    """As the profiler gives them, in microseconds."""

    kernel: str
    start: float
    end: float

    def name(self) -> str:
        return self.kernel

    def start_ns(self) -> int:
        return int(self.start * 1000)

    def end_ns(self) -> int:
        return int(self.end * 1000)


def test_times_of_levels() -> None:
    kernels = [
        Kernel("nvjet", 10, 20), Kernel("_expand_kernel", 25, 30),
        Kernel("nvjet", 32, 60), Kernel("_expand_kernel", 60, 61),
        Kernel("_choose_kernel", 70, 90),
    ]  # fmt: skip
    assert level_times(kernels[::-1]) == [20.0, 29.0]
    assert level_times(kernels[:1]) == []


def test_mistakes(tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl.xz"
    with lzma.open(text, "wt") as lines:
        lines.write(json.dumps({"text": documents()[0], "kind": "code"}) + "\n")
    out = ["--output", str(tmp_path / "out")]
    pair = ["--target", str(TARGET), "--draft", str(DRAFT), "--context", "64"]
    for arguments, sentence in (
        (["cycle", *out, "--side-by-side"], "--side-by-side: needs --kv-cache-gib"),
        (["cycle", *out, "--only", "nonsense"], "only: 'nonsense' is none of 'plain', "),
        (["cycle", *out, "--shape", "nonsense"], "shape: 'nonsense' is unknown; use one of "),
        (["startup", *out, "--shape", "nonsense"], "shape: 'nonsense' is unknown; use one of "),
        (["startup", *out, "--only", "nonsense"], "only: 'nonsense' is none of 'plain', "),
        (["e2e", *out, *pair, "--data", str(text), "--only", "nonsense"],
         "only: 'nonsense' is none of 'plain', "),
    ):  # fmt: skip
        done = CliRunner().invoke(app, ["bench", *arguments])
        assert done.exit_code == 2, (arguments, done.exception)
        (said,) = (line for line in done.output.splitlines() if "vllm-longspec" in line)
        assert said.startswith(f"vllm-longspec: {sentence}")


@pytest.mark.full
@pytest.mark.skipif(torch.cuda.is_available(), reason="float32 is for CPUs")
def test_a_cycle(tmp_path: Path) -> None:
    tree = "LongSpec, 31 nodes, head of 512"
    options: dict[str, Any] = {
        "enforce_eager": True, "dtype": "float32", "kv_cache_memory_bytes": 1 << 28,
    }  # fmt: skip
    cycle_report("tiny", [64], [1], 512, tmp_path, [PLAIN, tree], steps=2, **options)
    record = json.loads((tmp_path / "cycle.json").read_text())
    assert record["shape"] == "tiny" and record["environment"]["device"] == "CPU"
    plain, longspec = record["cycles"]
    assert (plain["proposer"], longspec["proposer"]) == (PLAIN, tree)
    assert (plain["tokens_per_step"], longspec["tokens_per_step"]) == (1, 32)
    assert "proposal" not in plain["parts"] and "proposal" in longspec["parts"]
    for measured in (plain, longspec):
        assert (measured["context"], measured["batch"]) == (64, 1)
        assert measured["steps"] >= 2 and len(measured["runs"]) == 2
        assert measured["cycle"] > 0 and all(time >= 0 for time in measured["parts"].values())
        assert sum(measured["parts"].values()) == pytest.approx(measured["cycle"], rel=0.05)
    rows = read_table((tmp_path / "cycle.md").read_text())
    ratio = longspec["cycle"] / plain["cycle"]
    assert [float(row["R"]) for row in rows] == [1.0, pytest.approx(ratio, abs=0.006)]
    for plot in ("cycle.png", "cycle-parts.png"):
        assert (tmp_path / plot).stat().st_size > 10_000


@pytest.mark.full
@pytest.mark.skipif(torch.cuda.is_available(), reason="float32 is for CPUs")
def test_starts(tmp_path: Path) -> None:
    tree = "LongSpec, default"
    options: dict[str, Any] = {
        "enforce_eager": True, "dtype": "float32", "kv_cache_memory_bytes": 1 << 28,
        "max_model_len": 1024,
    }  # fmt: skip
    starts = startup_report("tiny", 512, tmp_path, **options)
    found = [(start.proposer, start.caches) for start in starts]
    assert found == [(name, caches) for name in (PLAIN, tree) for caches in (EMPTY, FILLED)]
    assert all(start.seconds > 1 and start.kv_cache_tokens > 0 for start in starts)
    record = json.loads((tmp_path / "startup.json").read_text())
    assert len(record["starts"]) == 4 and record["environment"]["device"] == "CPU"
