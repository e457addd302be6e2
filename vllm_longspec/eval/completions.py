"""Decoding over a running vLLM server's OpenAI completions API."""

import time
from typing import Any

from vllm_longspec.endpoint import client, server_errors
from vllm_longspec.errors import LongSpecError
from vllm_longspec.eval.acceptance import Acceptance, summary
from vllm_longspec.eval.server import DRAFTS, idle_counters, read_metrics

# What a server would otherwise take from the target's generation_config.json.
WITHOUT_DEFAULTS = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


def check_server(url: str, speculating: bool) -> int:
    """Its context length. Raises LongSpecError if it speculates and should not, or the reverse."""
    with server_errors(url):
        model: Any = client(url).models.list().data[0]
        counts_drafts = f"{DRAFTS}_total" in read_metrics(url)
    if counts_drafts and not speculating:
        raise LongSpecError(f"plain_url: {url} speculates; give a server started without a draft")
    if speculating and not counts_drafts:
        raise LongSpecError(
            f"url: {url} does not speculate; start it with --speculative-model and a draft"
        )
    return model.max_model_len


def decode_on_server(
    url: str, proposer: str, prompts: list[list[int]], temperature: float, max_tokens: int
) -> Acceptance:
    """One prompt after the other, seeded by their number, streamed: a request's decoding runs from
    the arrival of its first event to that of its last."""
    outputs, decoded, seconds = [], 0, 0.0
    with server_errors(url):
        server = client(url)
        model = server.models.list().data[0].id
        before = idle_counters(url)
        for i, prompt in enumerate(prompts):
            events = server.completions.create(
                model=model,
                prompt=prompt,
                max_tokens=max_tokens,
                temperature=temperature,
                seed=i,
                top_p=1.0,
                stream=True,
                extra_body=WITHOUT_DEFAULTS | {"return_token_ids": True},
            )
            arrivals: list[tuple[float, list[int]]] = []
            for event in events:
                ids = [token for choice in event.choices for token in token_ids(choice)]
                if ids:
                    arrivals.append((time.perf_counter(), ids))
            outputs.append([token for _, ids in arrivals for token in ids])
            if arrivals:
                decoded += sum(len(ids) for _, ids in arrivals[1:])
                seconds += arrivals[-1][0] - arrivals[0][0]
        after = idle_counters(url)
    return summary(proposer, temperature, outputs, before, after, decoded, seconds)


def token_ids(choice: Any) -> list[int]:
    """vLLM's extension of a completion's choice."""
    return choice.token_ids or []
