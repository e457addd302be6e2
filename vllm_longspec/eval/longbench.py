"""Prompts of LongBench (arXiv 2308.14508) for the tasks LongSpec's paper measures."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from vllm_longspec.chat import chat_prompt
from vllm_longspec.errors import LongSpecError, listed
from vllm_longspec.eval.paper import reported_length
from vllm_longspec.records import read_objects, string_field

SHORTEST = 1200  # tokens a prompt has to exceed
RESERVED = 2000  # tokens it stays below the context length by

# `config/dataset2prompt.json` of LongBench, blanks at the ends of lines included.
TEMPLATES = {
    "gov_report": (
        "You are given a report by a government agency. Write a one-page summary of the report."
        "\n\nReport:\n{context}\n\nNow, write a one-page summary of the report.\n\nSummary:"
    ),
    "qmsum": (
        "You are given a meeting transcript and a query containing a question or instruction. "
        "Answer the query in one or more sentences.\n\nTranscript:\n{context}\n\nNow, answer the "
        "query based on the above meeting transcript in one or more sentences.\n\n"
        "Query: {input}\nAnswer:"
    ),
    "multi_news": (
        "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n"
        "{context}\n\nNow, write a one-page summary of all the news.\n\nSummary:"
    ),
    "lcc": "Please complete the code given below. \n{context}Next line of code:\n",
    "repobench-p": "Please complete the code given below. \n{context}{input}Next line of code:\n",
}
# The authors' script asks LongBench's questions in this frame, in which the third stage of their
# training was written, whatever the target; the last words of summaries and answers come behind it.
_PAPER_FRAME = (
    "<s>system\nYou are a helpful assistant</s>\n<s>user\n{}</s>\n<s>assistant\n{}".format
)
_CODE = "Please complete the code given below. \n{context}Now, complete the code given."
PAPER_TEMPLATES = {
    "gov_report": _PAPER_FRAME(TEMPLATES["gov_report"].removesuffix("\n\nSummary:"), "Summary:"),
    "qmsum": _PAPER_FRAME(TEMPLATES["qmsum"].removesuffix("\nAnswer:"), "Answer:"),
    "multi_news": _PAPER_FRAME(TEMPLATES["multi_news"].removesuffix("\n\nSummary:"), "Summary:"),
    "lcc": _PAPER_FRAME(_CODE, ""),
    "repobench-p": _PAPER_FRAME(_CODE, ""),
}
# LongBench gives chat models these as they are.
WITHOUT_CHAT = ("lcc", "repobench-p")


def task_files(folder: Path, tasks: Sequence[str]) -> dict[str, Path]:
    """The file of each task, in `folder` or in its `data`, where LongBench's archive unpacks it.

    Raises LongSpecError for an unknown task, and for missing files with how to fetch them.
    """
    unknown = [task for task in tasks if task not in TEMPLATES]
    if unknown or not tasks:
        named = repr(unknown[0]) if unknown else "nothing"
        raise LongSpecError(f"task: {named} is none of {', '.join(TEMPLATES)}")
    files = {}
    for task in tasks:
        places = (folder / f"{task}.jsonl", folder / "data" / f"{task}.jsonl")
        files[task] = next((place for place in places if place.is_file()), places[0])
    missing = [path.name for path in files.values() if not path.is_file()]
    if missing:
        raise LongSpecError(
            f"data: {folder} has no {listed(missing)}; fetch LongBench's data.zip with `hf "
            f"download THUDM/LongBench data.zip --repo-type dataset --local-dir {folder}` and "
            f"unpack it there with `unzip {folder}/data.zip -d {folder}`"
        )
    return files


def longbench_prompts(
    files: Mapping[str, Path],
    tokenizer: PreTrainedTokenizerBase,
    context_length: int,
    chat: bool,
    num_samples: int | None = None,
    shortest: int = SHORTEST,
    longest: int | None = None,
    templates: Mapping[str, str] = TEMPLATES,
) -> dict[str, list[list[int]]]:
    """The first `num_samples` prompts of each task that have more than `shortest` and less than
    `longest` tokens (None: `context_length` less RESERVED); None: all.

    `chat` puts the tasks that are not code into the tokenizer's chat template. Raises
    LongSpecError for a bad line and for a task none of whose prompts has that length.
    """
    below = context_length - RESERVED if longest is None else longest
    prompts: dict[str, list[list[int]]] = {}
    for task, path in files.items():
        fitting: list[list[int]] = []
        for where, record in read_objects(path):
            text = templates[task].format(
                context=string_field(record, "context", where),
                input=string_field(record, "input", where),
            )
            wrapped = chat and task not in WITHOUT_CHAT
            ids = chat_prompt(tokenizer, text) if wrapped else tokenizer(text)["input_ids"]
            if shortest < len(ids) < below and len(fitting) != num_samples:
                fitting.append(list(ids))
        if not fitting:
            raise LongSpecError(
                f"data: no prompt of {path} has more than {shortest} and less than {below} tokens; "
                "give a longer --max-model-len or other bounds"
            )
        prompts[task] = fitting
    return prompts


def paper_prompts(
    files: Mapping[str, Path],
    tokenizer: PreTrainedTokenizerBase,
    context_length: int,
    target: str,
    num_samples: int | None = None,
    shortest: int = SHORTEST,
    longest: int | None = None,
) -> dict[str, list[list[int]]]:
    """The same in the paper's frame and by its filter, which takes up to RESERVED tokens less than
    its own length of the target; `context_length` where the paper has no such target."""
    if longest is None:
        longest = (reported_length(target) or context_length) - RESERVED + 1
    return longbench_prompts(
        files, tokenizer, context_length, False, num_samples, shortest, longest, PAPER_TEMPLATES
    )
