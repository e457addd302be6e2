"""What speculation does, counted in the worker and read by the process that serves /metrics.

The file between the two has the format of prometheus_client's multiprocess mode. Where vLLM is in
that mode (several API servers), the file lies in its folder and is read like those of vLLM's own
processes. Else the front end makes a folder and has its registry read it.

Not a stat-logger plugin of vLLM's: one that is installed turns vLLM's statistics on, also where
`--disable-log-stats` says not to and nothing speculates, and Python's `LLM` loads none.
"""

import os
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client import REGISTRY
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector
from vllm.logger import init_logger

logger = init_logger("vllm.longspec")

MULTIPROCESS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # prometheus_client's and vLLM's switch
# Of the tokens before a tree, in tokens; a length belongs to the first context below whose edge it
# is.
CONTEXT_EDGES = np.array([1 << 10, 4 << 10, 16 << 10, 64 << 10])
CONTEXTS = ("<1k", "1k-4k", "4k-16k", "16k-64k", ">=64k")
BY_PLAN = {
    "vllm:longspec_steps": "Steps that LongSpec took, by plan.",
    "vllm:longspec_nodes_verified": "Nodes of trees that the target verified, by plan.",
    "vllm:longspec_nodes_accepted": "Nodes of trees that the target accepted, by plan.",
}
COPIED = {"vllm:longspec_copied_tokens": "Accepted tokens that were copied from the text itself."}
BY_CONTEXT = {
    "vllm:longspec_accepted_tokens": "Drafted tokens that the target accepted, by context length.",
    "vllm:longspec_verifications": "Trees that the target verified, by context length.",
}
FILES = "counter_longspec_"  # a file's type for prometheus_client, then ours
# Beside each key in a file: its length, padding to 8 bytes, value and time.
BESIDE_KEY = 4 + 8 + 16

_folder: str | None = None  # of this process as a front end; empty: there is none


def shared_folder() -> str:
    """In the front end: the folder in which workers are to share their counters, made and entered
    in vLLM's registry once a process; empty where none can be made."""
    global _folder
    if (given := os.environ.get(MULTIPROCESS_FOLDER)) is not None:
        return given  # what serves /metrics reads it already
    if _folder is None:
        try:
            _folder = tempfile.mkdtemp(prefix="vllm-longspec-")  # its owner's alone
        except OSError as error:
            _folder = ""
            warn(error)
        else:
            # Of this process alone, not of those forked from it, and after these.
            Finalize(None, shutil.rmtree, (_folder, True), exitpriority=-1)
            MultiProcessCollector(REGISTRY, path=_folder)
    return _folder


class Counters:
    """An engine's counters, of one thread. Only the engine's first worker shares them.

    `plans`: what each plan is called in metrics. `values`: float64, by plan, then copied tokens,
    then by context, in the order of the metrics above.
    """

    def __init__(self, vllm_config: Any, plans: Sequence[str]) -> None:
        self.num_plans = len(plans)
        engine = {
            "model_name": str(vllm_config.model_config.served_model_name),
            # Not the rank: of a model without experts every engine is its group's first.
            "engine": str(vllm_config.parallel_config.data_parallel_index),
        }
        self.keys = [
            *(
                key(name, text, engine | {"plan": plan})
                for name, text in BY_PLAN.items()
                for plan in plans
            ),
            *(key(name, text, engine) for name, text in COPIED.items()),
            *(
                key(name, text, engine | {"context": context})
                for name, text in BY_CONTEXT.items()
                for context in CONTEXTS
            ),
        ]
        self.values = np.zeros(len(self.keys))
        n, c = self.num_plans, len(CONTEXTS)
        self.by_plan = self.values[: 3 * n].reshape(3, n)
        self.by_context = self.values[3 * n + 1 :].reshape(2, c)
        self.file: MmapedDict | None = None
        folder = vllm_config.speculative_config.counters_folder
        if folder and vllm_config.parallel_config.rank == 0:
            try:
                self.file, path = open_file(folder, self.keys)
            except OSError as error:
                warn(error)
            else:
                Finalize(self, discard, (path,), exitpriority=0)

    def add(
        self,
        plan: int,
        nodes: int = 0,
        accepted: np.ndarray | None = None,  # [requests with a tree] accepted nodes of each
        copied: np.ndarray | None = None,  # those of `accepted` that were copied
        context_lens: np.ndarray | None = None,  # tokens before the tree
    ) -> None:
        """One step under a plan. `nodes`: verified in it, of all requests together. A step that
        verified no tree has no arrays."""
        touched = [plan]
        n = self.num_plans
        self.by_plan[0, plan] += 1
        if accepted is not None and len(accepted) > 0:
            assert copied is not None and context_lens is not None
            self.by_plan[1, plan] += nodes
            self.by_plan[2, plan] += accepted.sum()
            self.values[3 * n] += copied.sum()
            contexts = np.searchsorted(CONTEXT_EDGES, context_lens, side="right")
            self.by_context[0] += np.bincount(contexts, accepted, len(CONTEXTS))
            trees = np.bincount(contexts, minlength=len(CONTEXTS))
            self.by_context[1] += trees
            touched += [n + plan, 2 * n + plan, 3 * n]
            for c in np.flatnonzero(trees).tolist():
                touched += [3 * n + 1 + c, 3 * n + 1 + len(CONTEXTS) + c]
        if self.file is not None:
            for i in touched:
                self.file.write_value(self.keys[i], float(self.values[i]), 0.0)


def key(name: str, text: str, labels: dict[str, str]) -> str:
    """What prometheus_client writes before the value of a Counter."""
    return mmap_key(name, f"{name}_total", list(labels), list(labels.values()), text)


def open_file(folder: str, keys: Sequence[str]) -> tuple[MmapedDict, Path]:
    """A new file with a zero for each key, and its path. Raises OSError."""
    handle, new = tempfile.mkstemp(".new", FILES, folder)
    try:
        try:
            # All of it now: a page that a full disk cannot take would kill who writes it.
            os.posix_fallocate(handle, 0, 8 + sum(len(k.encode()) + BESIDE_KEY for k in keys))
        finally:
            os.close(handle)
        file = MmapedDict(new)
        for k in keys:
            file.read_value(k)  # enters it
        path = Path(new).rename(new.removesuffix("new") + "db")  # from here on it is read
    except BaseException:
        discard(Path(new))
        raise
    return file, path


def discard(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


def warn(error: OSError) -> None:
    logger.warning_once(
        "LongSpec: counters cannot be shared, /metrics has none of vllm:longspec_* (%s)",
        error.strerror or str(error),
    )
