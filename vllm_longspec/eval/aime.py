"""Prompts of AIME 2024, as LongSpec's paper measures them."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from vllm_longspec.chat import chat_prompt
from vllm_longspec.errors import LongSpecError
from vllm_longspec.records import read_objects, string_field, whole_number_field

TASK = "aime24"
PAPER_SYSTEM = "You are a helpful assistant"  # in the authors' script, in place of the target's
AIME24_IDS = range(60, 90)  # the validation set holds 2022 to 2024, 30 problems a year
FILE_NAMES = (
    "aime.jsonl",
    "aime.parquet",
    "train-00000-of-00001.parquet",
    "data/train-00000-of-00001.parquet",
)


def problem_file(data: Path) -> Path:
    """`data` itself or the first of FILE_NAMES in it; a LongSpecError says how to fetch it."""
    if data.is_file():
        return data
    for name in FILE_NAMES:
        if (data / name).is_file():
            return data / name
    raise LongSpecError(
        f"data: {data} has no {' or '.join(FILE_NAMES[:2])}; fetch it with `hf download "
        f"AI-MO/aimo-validation-aime --repo-type dataset --local-dir {data}`"
    )


def aime_prompts(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    num_samples: int | None = None,
    system: str | None = None,
) -> dict[str, list[list[int]]]:
    """The first `num_samples` (None: all) problems of 2024 in the tokenizer's chat format.

    `system`: the prompt before them; None: the chat format's own. Raises LongSpecError for a bad
    line and where there is no problem of 2024.
    """
    problems = [
        string_field(record, "problem", where)
        for where, record in read_objects(path)
        if whole_number_field(record, "id", where) in AIME24_IDS
    ]
    if not problems:
        raise LongSpecError(
            f"data: {path} has no problem with an id from {AIME24_IDS[0]} to {AIME24_IDS[-1]}, the "
            "problems of 2024; fetch AI-MO/aimo-validation-aime"
        )
    return {TASK: [chat_prompt(tokenizer, problem, system) for problem in problems[:num_samples]]}
