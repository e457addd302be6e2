"""What LongSpec's paper reports (arXiv 2502.17421; tables for T=0).

One A100 80 GB, one request at a time, all 68 nodes of the tree 4 16 16 16 16 verified. `tau` is the
mean acceptance length, the bonus token included. Speed-ups are over the authors' own loop on
Hugging Face transformers with FlashAttention, not over vLLM. Its prompts have a frame of their own
(`eval/longbench.py`, `eval/aime.py`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Reported:
    tau: float
    speed_up: float


TASKS = ("gov_report", "qmsum", "multi_news", "lcc", "repobench-p")
LONGBENCH = {
    "lmsys/vicuna-7b-v1.5-16k": (
        Reported(3.57, 2.23), Reported(3.14, 2.04), Reported(3.51, 1.80), Reported(3.73, 1.99),
        Reported(3.86, 2.38),
    ),
    "lmsys/vicuna-13b-v1.5-16k": (
        Reported(3.31, 2.49), Reported(2.76, 2.08), Reported(3.44, 2.23), Reported(3.57, 2.39),
        Reported(3.59, 2.65),
    ),
    "lmsys/longchat-7b-v1.5-32k": (
        Reported(3.59, 2.41), Reported(3.06, 2.31), Reported(3.41, 1.95), Reported(4.21, 2.26),
        Reported(4.03, 2.70),
    ),
    "lmsys/longchat-13b-16k": (
        Reported(3.58, 2.67), Reported(3.15, 2.37), Reported(3.50, 2.28), Reported(4.01, 2.63),
        Reported(4.46, 3.26),
    ),
    "gradientai/Llama-3-8B-Instruct-262k": (
        Reported(3.25, 1.59), Reported(2.99, 1.48), Reported(3.36, 1.60), Reported(3.28, 1.57),
        Reported(3.39, 1.69),
    ),
}  # fmt: skip
# Up to which the authors' script takes LongBench's prompts, less 2,000.
LENGTHS = {
    "lmsys/vicuna-7b-v1.5-16k": 16_384,
    "lmsys/vicuna-13b-v1.5-16k": 16_384,
    "lmsys/longchat-7b-v1.5-32k": 32_768,
    "lmsys/longchat-13b-16k": 16_384,
    "gradientai/Llama-3-8B-Instruct-262k": 262_000,
}
PAPER = "paper"
# How prompts may be framed, for a sentence.
FRAMES = {
    PAPER: "the paper's own frame",
    "longbench": "LongBench's templates",
    "longbench-chat": "LongBench's templates, but for code in the target's chat format",
    "chat": "the target's chat format",
}
AIME24 = {"Qwen/QwQ-32B-Preview": Reported(3.82, 2.25)}


def reported(task: str) -> dict[str, Reported]:
    """By target; empty for a task the paper has no numbers for."""
    if task == "aime24":
        return AIME24
    if task not in TASKS:
        return {}
    return {target: row[TASKS.index(task)] for target, row in LONGBENCH.items()}


def reported_for(target: str, task: str) -> Reported | None:
    """The paper's own numbers for a target, a repository or a folder of the same name."""
    return of_target(target, reported(task))


def reported_length(target: str) -> int | None:
    return of_target(target, LENGTHS)


def of_target(target: str, table: Mapping[str, T]) -> T | None:
    name = PurePosixPath(target).name.lower()
    for known, value in table.items():
        if PurePosixPath(known).name.lower() == name:
            return value
    return None
