"""Mean acceptance length of many drafts, without serving any of them.

LongSpec is lossless: what a target goes on with does not depend on the draft. So the plain target
writes each continuation once, and every draft is replayed against it: its tree is grown where a
served one would be and walked along the tokens that the target is known to choose.
"""

import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedConfig, PreTrainedModel

from vllm_longspec.config import (
    SHARED_SHAPE,
    context_length,
    cross_attention_layer,
    read_tokenizer,
    resolve_tree,
    shape_field,
)
from vllm_longspec.draft.checkpoint import check_checkpoint, read_draft_config
from vllm_longspec.errors import LongSpecError
from vllm_longspec.eval.acceptance import KINDS, held_out_prompts, prompt_ends, repeated_share
from vllm_longspec.output import PLOT_METADATA, claim_file
from vllm_longspec.report import check_plotting, plotted
from vllm_longspec.train.model import DraftLayer, RotaryEmbedding, load_draft, rotate
from vllm_longspec.train.target import load_target, target_config
from vllm_longspec.train.tokens import first_token
from vllm_longspec.tree.expand import expand_level
from vllm_longspec.tree.prune import Tree, prune
from vllm_longspec.tree.shape import level_starts, mask_words, node_depths
from vllm_longspec.writing import write_json

PROMPT_TOKENS_AT_ONCE = 1 << 18


@dataclass
class Continuations:
    """What the plain target wrote after prompts of one length, and what a draft reads of it."""

    tokens: torch.Tensor  # [num_prompts, prompt_length + num_new] int64
    prompt_length: int
    # Of the target's layer that drafts read, keys rotated; every token's but the last one's.
    key: torch.Tensor  # [num_prompts, num_kv_heads, prompt_length + num_new - 1, head_dim]
    value: torch.Tensor


@dataclass
class OwnCache:
    """A draft's keys and values of committed tokens, from position `start` on."""

    start: int
    key: torch.Tensor  # [num_prompts, num_kv_heads, length, head_dim], rotated
    value: torch.Tensor


@dataclass(frozen=True)
class Replay:
    """One draft at one context length, temperature and number of verified nodes."""

    draft: str
    context: int  # tokens of each prompt
    temperature: float
    tree_shape: list[int]
    nodes: int
    prompts: int
    tokens: int  # of all continuations
    verifications: int
    mean_acceptance_length: float  # tokens per verification, the bonus token included
    standard_error: float  # of that mean, from the spread over the prompts
    per_depth: list[float]  # share of verifications that accepted at least 1, 2, ... nodes
    repeated_8grams: float  # share of the continuations' 8-grams that stood there before


@torch.inference_mode()
def sample_continuations(
    target: PreTrainedModel,
    prompts: torch.Tensor,  # [num_prompts, prompt_length] int64
    num_new: int,
    temperature: float,  # 0: the most probable token
    generator: torch.Generator,
) -> Continuations:
    cache: Any = None
    tokens, new = [prompts], prompts
    for _ in range(num_new):
        out = target(input_ids=new, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, logits = out.past_key_values, out.logits[:, -1].float()
        if temperature == 0:
            new = logits.argmax(-1, keepdim=True)
        else:
            probabilities = (logits / temperature).softmax(-1)
            new = probabilities.multinomial(1, generator=generator)
        tokens.append(new)
    read = cache.layers[cross_attention_layer(target.config)]
    return Continuations(torch.cat(tokens, 1), prompts.shape[1], read.keys, read.values)


@torch.inference_mode()
def own_cache(layer: DraftLayer, embed: nn.Module, text: Continuations) -> OwnCache:
    """All that any query of the continuation has in its window."""
    start = max(0, text.prompt_length - layer.config.window)
    tokens = text.tokens[:, start:]
    positions = torch.arange(start, text.tokens.shape[1], device=tokens.device)
    x = embed(tokens)
    h, attn = layer.input_layernorm(x), layer.self_attn
    cos, sin = layer.rotary(x, positions.expand_as(tokens))
    key = attn.heads(attn.k_proj(h))
    key = rotate(key, cos, sin)
    return OwnCache(start, key, attn.heads(attn.v_proj(h)))


def attend(
    query: torch.Tensor,  # [batch, num_heads, width, head_dim]
    key: torch.Tensor,  # [batch, num_kv_heads, length, head_dim]
    value: torch.Tensor,
    mask: torch.Tensor,  # [batch, width or 1, length] bool
) -> torch.Tensor:  # [batch, width, num_heads * head_dim]
    """The query heads that share a key head become rows of it: torch has no fused kernel for both
    a mask and grouped heads."""
    num_kv_heads, width = key.shape[1], query.shape[2]
    rows = query.unflatten(1, (num_kv_heads, -1)).flatten(2, 3)
    if mask.shape[1] == width:
        mask = mask.repeat(1, rows.shape[2] // width, 1)
    out = scaled_dot_product_attention(rows, key, value, attn_mask=mask.unsqueeze(1))
    return out.unflatten(2, (-1, width)).flatten(1, 2).transpose(1, 2).flatten(2)


@torch.inference_mode()
def grow_trees(
    layer: DraftLayer,
    target: PreTrainedModel,
    text: Continuations,
    own: OwnCache,
    roots: torch.Tensor,  # [num_prompts] positions of the newest committed tokens
    tree_shape: Sequence[int],
    m: int,
) -> Tree:
    """The `m` most probable nodes of the tree that each root's prompt gets as served: the target's
    keys and values exist for the positions before the root."""
    embed, head = target.get_input_embeddings(), target.get_output_embeddings()
    attn, cross = layer.self_attn, layer.cross_attn
    num_trees, device = len(roots), roots.device
    starts = [0, *level_starts(tree_shape)]
    num_expanded = starts[-2]
    own_positions = torch.arange(own.start, own.start + own.key.shape[2], device=device)
    target_positions = torch.arange(text.key.shape[2], device=device)
    in_target = (target_positions < roots[:, None])[:, None]
    tree_key, tree_value = (
        own.key.new_zeros(num_trees, own.key.shape[1], num_expanded, own.key.shape[3])
        for _ in range(2)
    )

    level_tokens = text.tokens.gather(1, roots[:, None])
    level_scores = torch.zeros(num_trees, 1, device=device)
    seen = torch.zeros(num_trees, 1, num_expanded, dtype=torch.bool, device=device)
    row = torch.arange(num_expanded, device=device)
    tokens, scores, parents = [], [], []
    for depth, next_width in enumerate(tree_shape):
        first, end = starts[depth], starts[depth + 1]
        seen[:, row[: end - first], row[first:end]] = True
        positions = roots + depth
        in_window = (own_positions < roots[:, None]) & (
            own_positions >= positions[:, None] - layer.config.window
        )
        x = embed(level_tokens)
        cos, sin = layer.rotary(x, positions[:, None].expand_as(level_tokens))

        h = layer.input_layernorm(x)
        query, key = (
            rotate(attn.heads(projection(h)), cos, sin) for projection in (attn.q_proj, attn.k_proj)
        )
        tree_key[:, :, first:end] = key
        tree_value[:, :, first:end] = attn.heads(attn.v_proj(h))
        mask = torch.cat([in_window[:, None].expand(-1, end - first, -1), seen], dim=2)
        out = attend(
            query, torch.cat([own.key, tree_key], 2), torch.cat([own.value, tree_value], 2), mask
        )
        x = x + attn.o_proj(out)

        h = layer.post_self_attention_layernorm(x)
        query = cross.heads(cross.q_proj(h))
        query = rotate(query, cos, sin)
        x = x + cross.o_proj(attend(query, text.key, text.value, in_target))
        x = x + layer.mlp(layer.post_cross_attention_layernorm(x))

        logits, ids = head(x).float(), layer.draft_token_ids
        if ids is not None:
            logits = logits[..., ids]
        logprobs, best = logits.log_softmax(-1).topk(min(next_width, logits.shape[-1]))
        if ids is not None:
            best = ids[best]
        level_tokens, level_scores, chosen = expand_level(level_scores, logprobs, best, next_width)
        seen = seen.gather(1, chosen.unsqueeze(-1).expand(-1, -1, num_expanded))
        tokens.append(level_tokens)
        scores.append(level_scores)
        parents.append(chosen + first)

    num_nodes = sum(tree_shape)
    return prune(
        torch.cat(tokens, 1),
        torch.cat(scores, 1),
        torch.cat(parents, 1),
        node_depths(tree_shape).to(device),
        len(tree_shape),
        m,
        mask_words(num_nodes),
    )


def accepted_nodes(
    tree: Tree,
    wanted: torch.Tensor,  # [num_trees, depth] the target's tokens at depths 1, 2, ...
) -> torch.Tensor:  # [num_trees] int64
    """How far the tree goes along the target's tokens; `tree/accept.py` for all trees at once."""
    node = torch.zeros(len(wanted), dtype=torch.int64, device=wanted.device)
    accepted, walking = torch.zeros_like(node), torch.ones_like(node, dtype=torch.bool)
    for token in wanted.unbind(1):
        child = (tree.parents[:, 1:] == node[:, None]) & (tree.tokens == token[:, None])
        walking = walking & child.any(1)
        node = torch.where(walking, child.int().argmax(1) + 1, node)
        accepted += walking
    return accepted


@torch.inference_mode()
def replay(
    layer: DraftLayer,
    target: PreTrainedModel,
    text: Continuations,
    tree_shape: Sequence[int],
    m: int,
    max_tokens: int,
) -> list[list[int]]:  # for each prompt, the accepted nodes of each verification
    """Verifications until `max_tokens` tokens are committed, as vLLM does: the first token comes
    with the prompt, and the last tree counts in full. `text` has to go on a tree's depth longer."""
    depth = len(tree_shape)
    assert text.tokens.shape[1] >= text.prompt_length + max_tokens + depth
    own = own_cache(layer, target.get_input_embeddings(), text)
    last_root = text.prompt_length + max_tokens - 2
    roots = torch.full((len(text.tokens),), text.prompt_length, device=text.tokens.device)
    ahead = torch.arange(1, depth + 1, device=roots.device)
    counts = []
    while bool((running := roots <= last_root).any()):
        tree = grow_trees(layer, target, text, own, roots, tree_shape, m)
        wanted = text.tokens.gather(1, roots[:, None].clamp(max=last_root) + ahead)
        accepted = accepted_nodes(tree, wanted)
        counts.append(torch.where(running, accepted, -1))
        roots = torch.where(running, roots + accepted + 1, roots)
    per_prompt = torch.stack(counts, 1).tolist() if counts else [[] for _ in roots]
    return [[count for count in row if count >= 0] for row in per_prompt]


def check_replayed_draft(folder: Path, target: PreTrainedConfig) -> None:
    """Raises LongSpecError for a draft that cannot be replayed with this target."""
    config = read_draft_config(folder)
    check_checkpoint(folder, config)
    for field in SHARED_SHAPE:
        ours, theirs = (shape_field(model, field) for model in (config, target))
        if ours != theirs:
            raise LongSpecError(
                f"draft: {folder} has {field} {ours}, the target {theirs}; "
                "use a draft trained for this target"
            )


def load_replayed_draft(folder: Path, target: PreTrainedModel) -> DraftLayer:
    """A draft in its target's dtype, on its device. Raises LongSpecError if it cannot be replayed
    with this target."""
    check_replayed_draft(folder, target.config)
    layer = load_draft(folder).to(target.device, target.dtype)
    # The cast also rounds its frequencies, which are wrong by whole turns at large positions then.
    layer.rotary = RotaryEmbedding(layer.config).to(target.device)
    return layer.eval().requires_grad_(False)


def measure_drafts(
    target_name: str,  # folder or Hugging Face repository
    drafts: Mapping[str, Path],
    data: Path | str,
    contexts: Sequence[int],
    temperatures: Sequence[float],
    nodes: Sequence[int],
    tree_shape: Sequence[int],
    num_prompts: int,
    max_tokens: int,
    kinds: Collection[str] = KINDS,
    seed: int = 0,
) -> Iterator[Replay]:
    """Every draft on the same continuations of held-out text.

    A prompt of a shorter context is the end of the one of the longest, so that all contexts are
    continued at the same places of the text.
    """
    config = target_config(target_name)
    for m in nodes:
        resolve_tree(list(tree_shape), m)
    num_new = max_tokens + len(tree_shape)
    check_lengths(config, contexts, num_new)
    for folder in drafts.values():
        check_replayed_draft(folder, config)
    tokenizer = read_tokenizer(target_name)
    longest = max(contexts)
    # Twice: of the 128 tokens by default, so that the places are those of the published numbers.
    whole = held_out_prompts(
        data, tokenizer, num_prompts, longest, longest, kinds, max_tokens=2 * max_tokens
    )
    first = first_token(tokenizer)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    target = load_target(target_name, device)
    layers = {name: load_replayed_draft(folder, target) for name, folder in drafts.items()}
    for context in contexts:
        prompts = torch.tensor(prompt_ends(whole, context, first))
        for temperature in temperatures:
            generator = torch.Generator(device).manual_seed(seed)
            batches = prompts.split(max(1, PROMPT_TOKENS_AT_ONCE // context))
            text = together(
                sample_continuations(target, batch.to(device), num_new, temperature, generator)
                for batch in batches
            )
            outputs = text.tokens[:, context : context + max_tokens].tolist()
            for name, layer in layers.items():
                for m in nodes:
                    counts = replay(layer, target, text, tree_shape, m, max_tokens)
                    yield summarise(name, context, temperature, tree_shape, m, counts, outputs)


def together(parts: Iterable[Continuations]) -> Continuations:
    """Of prompts of one length."""
    every = list(parts)
    tokens, key, value = (
        torch.cat(of_each)
        for of_each in zip(*((part.tokens, part.key, part.value) for part in every), strict=True)
    )
    return Continuations(tokens, every[0].prompt_length, key, value)


def check_lengths(config: PreTrainedConfig, contexts: Sequence[int], num_new: int) -> None:
    limit = context_length(config)
    for context in contexts:
        if not 1 <= context <= limit - num_new:
            raise LongSpecError(
                f"context: {context} and {num_new} new tokens do not fit the target's "
                f"{limit} positions; choose 1 to {limit - num_new}"
            )


def summarise(
    draft: str,
    context: int,
    temperature: float,
    tree_shape: Sequence[int],
    nodes: int,
    accepted: Sequence[Sequence[int]],  # for each prompt, of each verification
    outputs: Sequence[Sequence[int]],
) -> Replay:
    flat = [count for counts in accepted for count in counts]
    verifications = len(flat)
    mean = 1 + sum(flat) / max(1, verifications)
    # Of a ratio of sums: what each prompt has more than its verifications times the mean.
    excess = [sum(counts) - (mean - 1) * len(counts) for counts in accepted]
    degrees = len(accepted) / max(1, len(accepted) - 1)
    deviation = math.sqrt(degrees * sum(e * e for e in excess))
    return Replay(
        draft=draft,
        context=context,
        temperature=temperature,
        tree_shape=list(tree_shape),
        nodes=nodes,
        prompts=len(accepted),
        tokens=sum(map(len, outputs)),
        verifications=verifications,
        mean_acceptance_length=mean,
        standard_error=deviation / max(1, verifications),
        per_depth=[
            sum(count >= depth for count in flat) / max(1, verifications)
            for depth in range(1, len(tree_shape) + 1)
        ],
        repeated_8grams=repeated_share(outputs),
    )


def markdown_table(results: Sequence[Replay]) -> str:
    """A row for each draft, number of nodes and temperature; a column for each context length."""
    contexts = sorted({result.context for result in results})
    rows: dict[tuple[str, int, float], dict[int, Replay]] = {}
    for result in results:
        key = (result.draft, result.nodes, result.temperature)
        rows.setdefault(key, {})[result.context] = result
    lines = [
        "| draft | nodes | T | " + " | ".join(f"{context:,} tokens" for context in contexts) + " |",
        "|---|---|---|" + "---|" * len(contexts),
    ]
    for (draft, nodes, temperature), cells in rows.items():
        values = [
            f"{cells[context].mean_acceptance_length:.2f} ± {cells[context].standard_error:.2f}"
            if context in cells
            else ""
            for context in contexts
        ]
        lines.append(f"| {draft} | {nodes} | {temperature:g} | " + " | ".join(values) + " |")
    return "\n".join(lines) + "\n"


def plot_acceptance(results: Sequence[Replay], path: Path, title: str) -> None:
    """Mean acceptance length against context length: a line for each draft, a panel for each
    temperature and number of nodes."""
    panels = sorted({(result.temperature, result.nodes) for result in results})
    size = (5.5 * len(panels), 4)
    with plotted(path, len(panels), figsize=size, sharey=True) as (figure, all_axes):
        for axes, (temperature, nodes) in zip(all_axes, panels, strict=True):
            shown = [r for r in results if (r.temperature, r.nodes) == (temperature, nodes)]
            for draft in dict.fromkeys(r.draft for r in shown):
                line = sorted((r for r in shown if r.draft == draft), key=lambda r: r.context)
                axes.errorbar(
                    [r.context for r in line], [r.mean_acceptance_length for r in line],
                    yerr=[r.standard_error for r in line], label=draft, marker="o", markersize=3,
                    linewidth=1.2, capsize=2,
                )  # fmt: skip
            contexts = sorted({r.context for r in shown})
            axes.set_xscale("log", base=2)
            axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
            axes.minorticks_off()
            axes.set(xlabel="tokens of context", title=f"T={temperature:g}, {nodes} nodes")
            axes.grid(alpha=0.3)
        all_axes[0].set_ylabel("mean acceptance length")
        all_axes[-1].legend(fontsize=8)
        figure.suptitle(title)


def write_results(results: Sequence[Replay], path: Path) -> None:
    write_json(path, [asdict(result) for result in results])


def read_results(path: Path) -> list[Replay]:
    return [Replay(**result) for result in json.loads(path.read_text())]


def replay_report(
    target: str,
    drafts: Sequence[Path],
    data: Path | str,
    contexts: Sequence[int],
    temperatures: Sequence[float],
    nodes: Sequence[int],
    tree_shape: str,
    num_prompts: int,
    max_tokens: int,
    output: Path | None,
    plot: Path | None,
    kinds: Collection[str] = KINDS,
) -> None:
    """Measure, print the table, and write what was asked for; the JSON grows result by result."""
    if output is not None:
        claim_file(output, Replay.__dataclass_fields__, inputs=(target, *drafts))
    if plot is not None:
        if plot.suffix.lower() not in PLOT_METADATA or plot == output:
            raise LongSpecError(f"plot: {plot} is no picture's name; give one in .png or .svg")
        claim_file(plot, inputs=(target, *drafts), option="plot")
        check_plotting("plot")
    names = [folder.name for folder in drafts]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in drafts]
    results = []
    with Progress(transient=True) as progress:
        total = len(contexts) * len(temperatures) * len(nodes) * len(drafts)
        task = progress.add_task("Replaying", total=total)
        for result in measure_drafts(
            target, dict(zip(names, drafts, strict=True)), data, contexts, temperatures, nodes,
            resolve_tree(tree_shape).tree_shape, num_prompts, max_tokens, kinds,
        ):  # fmt: skip
            results.append(result)
            progress.advance(task)
            if output is not None:
                write_results(results, output)
    print(markdown_table(results), end="")
    if plot is not None:
        plot_acceptance(results, plot, f"{num_prompts} prompts, {max_tokens} new tokens each")
