"""A tree that the nano draft really grows, for the picture in docs/concepts.md.

python docs/images/tree_of_nano.py > docs/images/tree.json
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_longspec.config import DEFAULT_NUM_SPECULATIVE_TOKENS, DEFAULT_TREE_SHAPE, LongSpecConfig
from vllm_longspec.draft.reference import draft_layer
from vllm_longspec.tree.accept import accept
from vllm_longspec.tree.expand import expand_level

MODELS = Path(__file__).resolve().parents[2] / "examples/models"
PROMPT = """import json
import argparse
from pathlib import Path


def read_config(path):
    with open(path, "r") as f:
        return json.load(f)


def write_config(path, config):
    with"""


@torch.no_grad()
def grow(committed: list[int]) -> dict[str, list]:
    """Tokens, parents, path log-probabilities and depths of the root and all nodes."""
    target = AutoModelForCausalLM.from_pretrained(MODELS / "nano-target", dtype=torch.float32)
    config = LongSpecConfig.from_pretrained(MODELS / "nano-draft")
    weights = load_file(MODELS / "nano-draft/model.safetensors")
    past = target.model(torch.tensor([committed[:-1]]), use_cache=True).past_key_values.layers[-1]
    key, value = (x[0].transpose(0, 1) for x in (past.keys, past.values))

    tokens, parents, scores, depths = list(committed), [-1], [0.0], [0]
    n = len(committed) - 1  # index of the root
    for width in DEFAULT_TREE_SHAPE:
        index = torch.arange(len(tokens))
        positions = torch.tensor([*range(n), *(n + depth for depth in depths)])
        mask = (index[:, None] >= index) & (index[:, None] - index <= config.window)
        for node in range(len(depths)):
            mask[n + node, n:] = False
            ancestor = node
            while ancestor >= 0:
                mask[n + node, n + ancestor] = True
                ancestor = parents[ancestor]
        hidden = draft_layer(
            weights, config, target.get_input_embeddings()(torch.tensor(tokens)), positions, mask,
            key, value, torch.ones(len(tokens), n, dtype=torch.bool),
        )  # fmt: skip
        level = [node for node, depth in enumerate(depths) if depth == depths[-1]]
        logprobs = target.lm_head(hidden[n:][level]).log_softmax(-1).topk(width)
        grown, path, parent = expand_level(
            torch.tensor([[scores[node] for node in level]]), logprobs.values[None],
            logprobs.indices[None], width,
        )  # fmt: skip
        tokens += grown[0].tolist()
        scores += path[0].tolist()
        parents += [level[i] for i in parent[0].tolist()]
        depths += [depths[-1] + 1] * width
    target_tokens = [target(torch.tensor([committed[:-1] + path_tokens(tokens[n:], parents, i)]))
                     .logits[0, -1].argmax().item() for i in range(len(parents))]  # fmt: skip
    return {"tokens": tokens[n:], "parents": parents, "scores": scores, "depths": depths,
            "target_tokens": target_tokens}  # fmt: skip


def path_tokens(tokens: list[int], parents: list[int], node: int) -> list[int]:
    path = []
    while node >= 0:
        path.append(tokens[node])
        node = parents[node]
    return path[::-1]


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "nano-target")
    tree = grow(tokenizer(PROMPT)["input_ids"])
    best = sorted(range(1, len(tree["tokens"])), key=lambda i: -tree["scores"][i])
    kept = [0, *sorted(best[:DEFAULT_NUM_SPECULATIVE_TOKENS])]
    emitted, path = accept(
        [tree["tokens"][i] for i in kept],
        [-1, *(kept.index(tree["parents"][i]) for i in kept[1:])],
        [tree["target_tokens"][i] for i in kept],
    )
    json.dump(
        {
            "text": [tokenizer.decode([token]) for token in tree["tokens"]],
            "parents": tree["parents"],
            "depths": tree["depths"],
            "kept": kept,
            "accepted": [kept[i] for i in path],
            "bonus": tokenizer.decode(emitted[-1:]),
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main()
