"""How long an engine takes to start, and what it leaves for the KV cache: plain vLLM and LongSpec.

Weights are dummies of a named shape. Each engine starts alone, first with the caches of
torch.compile and Triton empty, then with what the first start left in them.
"""

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from vllm_longspec.bench.cycle import Engine, chosen, proposers
from vllm_longspec.bench.report import PLAIN
from vllm_longspec.bench.shapes import check_device, target_config, write_config
from vllm_longspec.config import shape_field
from vllm_longspec.output import claim_folder
from vllm_longspec.report import environment, markdown
from vllm_longspec.writing import write_json, write_text

DEFAULT = "LongSpec, default"
EMPTY, FILLED = "empty", "filled"
CACHES = ("VLLM_CACHE_ROOT", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")


@dataclass
class Start:
    proposer: str
    caches: str  # EMPTY or FILLED
    seconds: float  # of `LLM(...)`, imports left out
    kv_cache_tokens: int


def startup_report(
    shape: str,
    draft_vocab_size: int,
    output: Path,
    only: Sequence[str] = (),
    **engine: Any,
) -> list[Start]:
    """Writes startup.json and startup.md to `output` and prints the table."""
    claim_folder(output, ("startup.json", "startup.md"))
    starts: list[Start] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_config(shape, folder / "target")
        configs = proposers(folder, shape, draft_vocab_size)
        by_batch_size = next(config for name, config in configs.items() if "by batch" in name)
        # As it is served: with all plans that a step chooses from.
        configs[DEFAULT] = by_batch_size | {"enable_adaptive_verification": True}
        wanted = chosen(configs, only or [PLAIN, DEFAULT])
        check_device(shape)
        output.mkdir(parents=True, exist_ok=True)
        for name, config in wanted.items():
            options = engine | {
                "model": str(folder / "target"),
                "load_format": "dummy",
                "skip_tokenizer_init": True,
                "speculative_config": config,
            }
            for caches in (EMPTY, FILLED):
                process = Engine(name, start_engine, options, folder / f"caches of {name}")
                process.start()
                seconds, tokens = process.receive()
                process.process.join()
                starts.append(Start(name, caches, seconds, tokens))
                record = {
                    "environment": environment(),
                    "shape": shape,
                    "starts": [asdict(start) for start in starts],
                }
                table = startup_table(starts, kv_bytes(shape))
                write_json(output / "startup.json", record)
                write_text(output / "startup.md", table)
    print(table)
    return starts


def start_engine(pipe: Connection, options: dict[str, Any], caches: Path) -> None:
    """In a process of its own."""
    os.environ.update({name: str(caches / name) for name in CACHES})
    from vllm import LLM

    try:
        started = time.perf_counter()
        llm = LLM(**options)
        seconds = time.perf_counter() - started
        config = llm.llm_engine.vllm_config.cache_config
        llm.llm_engine.engine_core.shutdown()
        pipe.send((seconds, config.num_gpu_blocks * config.block_size))
    except Exception as error:
        pipe.send(RuntimeError(str(error)))
        raise


def kv_bytes(shape: str) -> int:
    """Of one token in all layers of the target, in bf16."""
    target = target_config(shape)
    heads, size = (shape_field(target, f) for f in ("num_key_value_heads", "head_dim"))
    return 2 * 2 * target.num_hidden_layers * heads * size


def startup_table(starts: Sequence[Start], token_bytes: int) -> str:
    """Markdown. What LongSpec costs in memory is what its KV cache is smaller by."""
    plain = {start.caches: start for start in starts if start.proposer == PLAIN}
    header = ["proposer", "caches", "seconds", "over plain", "KV cache", "less than plain's"]
    rows = [header, ["---"] * len(header)]
    for start in starts:
        reference = plain.get(start.caches)
        gib = start.kv_cache_tokens * token_bytes / 2**30
        cells = [start.proposer, start.caches, f"{start.seconds:.1f}", "", f"{gib:.2f} GiB", ""]
        if reference is not None:
            less = (reference.kv_cache_tokens - start.kv_cache_tokens) * token_bytes / 2**30
            cells[3], cells[5] = f"{start.seconds - reference.seconds:+.1f}", f"{less:.2f} GiB"
        rows.append(cells)
    return markdown(rows)
