"""Sampling without seeds draws from the target's distribution, whatever the draft proposes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Engine
from processes import EngineProcess
from scipy.stats import chisquare
from transformers import LlamaConfig, LlamaForCausalLM

from vllm_longspec.config import draft_config_for
from vllm_longspec.train.model import DraftLayer, init_weights, save_draft

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="exact probabilities are those of float32 on a CPU"
)

VOCABULARY = 16
LENGTH = 3
PROMPT = [1, 7, 3, 12, 5]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random target over 16 tokens and a draft that knows something of it, not everything."""
    folder = tmp_path_factory.mktemp("tiny")
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, head_dim=32, max_position_embeddings=512,
        bos_token_id=0, eos_token_id=0, tie_word_embeddings=False, initializer_range=0.25,
    )  # fmt: skip
    torch.manual_seed(0)
    target = LlamaForCausalLM(config)
    target.save_pretrained(folder / "target")
    draft_config = draft_config_for(config)
    draft_config.window = 16
    layer = DraftLayer(draft_config)
    init_weights(layer, torch.Generator().manual_seed(0))
    save_draft(layer, folder / "draft")
    return folder / "target", folder / "draft"


@torch.inference_mode()
def exact_probabilities(target: Path, temperature: float) -> np.ndarray:  # [16, 16, 16]
    model = LlamaForCausalLM.from_pretrained(target, dtype=torch.float64)
    tail = torch.cartesian_prod(*[torch.arange(VOCABULARY)] * (LENGTH - 1))
    ids = torch.cat([torch.tensor(PROMPT).expand(len(tail), -1), tail], dim=1)
    probs = (model(input_ids=ids).logits[:, len(PROMPT) - 1 :] / temperature).softmax(-1)
    joint = probs[:, -1]
    for i in range(LENGTH - 1):
        joint = joint * probs[torch.arange(len(tail)), i, tail[:, i]][:, None]
    return joint.view([VOCABULARY] * LENGTH).numpy()


def continuations(engine: Engine, count: int) -> list[tuple[int, ...]]:
    from vllm import SamplingParams

    # The first token comes from the prompt's forward, the others from a tree it is the root of.
    params = SamplingParams(
        n=250, temperature=1.0, max_tokens=LENGTH, ignore_eos=True, detokenize=False
    )
    found: list[tuple[int, ...]] = []
    for _ in range(count // 250):
        (answer,) = engine.llm.generate([{"prompt_token_ids": PROMPT}], params, use_tqdm=False)
        found += [tuple(output.token_ids[:LENGTH]) for output in answer.outputs]
    return found


# In `make test` seeded sampling shows, token for token, that a tree draws as plain decoding does.
@pytest.mark.full
@pytest.mark.parametrize(("count", "tree_shape"), [(500, [6, 6]), (20_000, [12])])
def test_continuations_follow_the_exact_distribution(
    pair: tuple[Path, Path], count: int, tree_shape: list[int]
) -> None:
    target, draft = pair
    engine = EngineProcess(
        {"method": "longspec", "model": str(draft), "tree_shape": tree_shape},
        model=str(target), skip_tokenizer_init=True, max_model_len=64, max_num_seqs=250,
        kv_cache_memory_bytes=1 << 26,
    )  # fmt: skip
    found = engine.call(continuations, count)
    counters = engine.counters()
    engine.close()
    accepted = counters["accepted_tokens"] / counters["drafts"]
    assert len(found) == count and 0.2 < accepted < 1.5  # neither all nor nothing

    expected = exact_probabilities(target, 1.0).ravel() * count
    counts = np.bincount(np.ravel_multi_index(np.array(found).T, [VOCABULARY] * LENGTH),
                         minlength=VOCABULARY**LENGTH)  # fmt: skip
    # Continuations too rare for the test's approximation are counted together.
    common = expected >= 5
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum())
    p = chisquare(observed, wanted * count / wanted.sum()).pvalue
    print(f"{count} continuations, {len(observed)} classes: p = {p:.4f}, {accepted:.2f} accepted")
    assert p > 0.001
