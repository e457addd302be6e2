"""One prompt, a plain vLLM server and one with LongSpec: what was generated, in how many target
forwards. Tokens that one verification committed have one colour.

    python examples/demo.py [--tokens 192] [--temperature 0] [--target DIR --draft DIR]
"""

import argparse
import inspect
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from openai import OpenAI
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoTokenizer

from vllm_longspec.eval.server import Server, running_servers

MODELS = Path(__file__).resolve().parent / "models"
COLOURS = ("bold green", "bold yellow", "bold cyan", "bold magenta", "bold blue")
FORWARDS = "vllm:iteration_tokens_total_count"
VERIFICATIONS = "vllm:spec_decode_num_drafts_total"
ACCEPTED = "vllm:spec_decode_num_accepted_tokens_total"


@dataclass
class Completion:
    tokens: list[int]
    chunks: list[list[int]]  # as streamed: the tokens that one forward committed
    forwards: int
    verifications: int
    accepted: int
    seconds: float


def complete(
    server: Server, prompt: list[int], arguments: argparse.Namespace, console: Console | None
) -> Completion:
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=None)
    model = client.models.list().data[0].id
    before, start = server.metrics(), time.perf_counter()
    stream = client.completions.create(
        model=model, prompt=prompt, max_tokens=arguments.tokens,
        temperature=arguments.temperature, seed=0, stream=True,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )  # fmt: skip
    chunks: list[list[int]] = []
    for event in stream:
        for choice in event.choices:
            ids = getattr(choice, "token_ids", None)
            if not ids:
                continue
            if console is not None:
                colour = COLOURS[len(chunks) % len(COLOURS)]
                console.print(Text(choice.text, style=colour), end="", soft_wrap=True)
            chunks.append(ids)
    seconds = time.perf_counter() - start
    after = settled_metrics(server)
    spent = {name: int(after.get(name, 0) - before.get(name, 0)) for name in after}
    return Completion(
        [token for chunk in chunks for token in chunk], chunks, spent[FORWARDS],
        spent.get(VERIFICATIONS, 0), spent.get(ACCEPTED, 0), seconds,
    )  # fmt: skip


def settled_metrics(server: Server) -> dict[str, float]:
    """The counters once they no longer move: vLLM adds the last step's after the answer is out."""
    metrics = server.metrics()
    while True:
        time.sleep(0.3)
        again = server.metrics()
        if again.get(FORWARDS) == metrics.get(FORWARDS):
            return again
        metrics = again


def near_tie(server: Server, prompt: list[int], plain: Completion, at: int) -> str:
    """Why two greedy outputs differ in bf16: plain decoding's two best tokens there."""
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
    answer = client.completions.create(
        model=client.models.list().data[0].id, prompt=prompt + plain.tokens[:at],
        max_tokens=1, temperature=0, logprobs=2,
    )  # fmt: skip
    logprobs: Any = answer.choices[0].logprobs
    best, second = sorted(logprobs.top_logprobs[0].values(), reverse=True)[:2]
    return f"up to token {at}, where bf16 has a near-tie: logprobs {best:.4f} and {second:.4f}"


def server_arguments(on_gpu: bool) -> list[str]:
    common = ["--max-model-len", "8192", "--max-num-seqs", "4", "--no-enable-prefix-caching"]
    # A cache of fixed size: two servers that start at once would measure each other's memory.
    if on_gpu:
        return [*common, "--kv-cache-memory-bytes", str(2**30), "--gpu-memory-utilization", "0.05"]
    return [*common, "--kv-cache-memory-bytes", str(2**28), "--dtype", "float32",
            "--enforce-eager"]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--target", default=str(MODELS / "nano-target"))
    parser.add_argument("--draft", default=str(MODELS / "nano-draft"))
    parser.add_argument("--tokens", type=int, default=192, help="new tokens (default 192)")
    parser.add_argument("--prompt-tokens", type=int, default=3000, help="default 3000")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--prompt", type=Path, help="text file; default: Python's argparse.py")
    arguments = parser.parse_args()

    on_gpu = torch.cuda.is_available()
    console = Console(soft_wrap=True, highlight=False)
    text = arguments.prompt.read_text() if arguments.prompt else inspect.getsource(argparse)
    tokenizer = AutoTokenizer.from_pretrained(arguments.target)
    prompt = tokenizer(text)["input_ids"][: arguments.prompt_tokens]

    console.print(
        f"Starting two vLLM servers on {'the GPU' if on_gpu else 'the CPU'}: "
        f"plain, and with --speculative-model {Path(arguments.draft).name} ..."
    )
    options = server_arguments(on_gpu)
    with running_servers(
        (arguments.target, options),
        (arguments.target, [*options, "--speculative-model", arguments.draft]),
    ) as (plain_server, longspec_server):
        if on_gpu:
            for server in (plain_server, longspec_server):
                complete(server, prompt[:-1], arguments, None)
        console.print(f"Prompt: {len(prompt)} tokens, ending in")
        console.print(Text(tokenizer.decode(prompt[-60:]), style="dim"), end="")
        speculated = complete(longspec_server, prompt, arguments, console)
        console.print("\n")
        plain = complete(plain_server, prompt, arguments, None)
        differs = next(
            (i for i, (a, b) in enumerate(zip(plain.tokens, speculated.tokens, strict=True))
             if a != b), None,
        )  # fmt: skip
        identical = "yes"
        if differs is not None:
            identical = "no"
            if on_gpu and arguments.temperature == 0:
                identical = near_tie(plain_server, prompt, plain, differs)

    table = Table()
    table.add_column("")
    table.add_column("plain vLLM", justify="right")
    table.add_column("LongSpec", justify="right")
    table.add_row("tokens", str(len(plain.tokens)), str(len(speculated.tokens)))
    table.add_row("target forwards", str(plain.forwards), str(speculated.forwards))
    length = 1 + speculated.accepted / max(1, speculated.verifications)
    table.add_row("mean acceptance length", "1", f"{length:.2f}")
    if on_gpu:
        table.add_row("seconds", f"{plain.seconds:.2f}", f"{speculated.seconds:.2f}")
    table.add_row("identical", "", identical)
    console.print(table)
    if not on_gpu:
        console.print(
            "Forwards are what counts here: on a CPU, Triton kernels are interpreted in Python and "
            "a target this small\ncosts nothing, so seconds would say nothing. On a GPU, one "
            "forward over 32 tokens takes about as long as over one."
        )
    if differs is not None and not on_gpu:
        sys.exit(1)


if __name__ == "__main__":
    main()
