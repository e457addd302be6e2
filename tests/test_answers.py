"""Training on answers only: which tokens are learned, kept through cache, packing and batches."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import TARGET, documents
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer
from typer.testing import CliRunner

from vllm_longspec.chat import ChatError, chat_answers
from vllm_longspec.cli import app
from vllm_longspec.errors import LongSpecError
from vllm_longspec.train.loss import IGNORED
from vllm_longspec.train.packing import make_batch, pack, step_batches, step_data
from vllm_longspec.train.tokens import learned, token_ids

# Turns that begin and end with special tokens, which no neighbour is merged with.
PLAIN = (
    "{% for m in messages %}<s>{{ m.role }}<s>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant<s>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<s>{{ m.role }}<s>{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}</s>{% endgeneration %}{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
# As Qwen3's: thoughts are left out of earlier answers, the last one has some, if empty ones.
THINKING = """{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- set said = m.content.split('</think>')[-1].lstrip('\\n') %}
{%- set thought = m.content.split('</think>')[0] if '</think>' in m.content else '<think>\\n' %}
{{- '<s>assistant\\n' + (thought + '\\n</think>\\n\\n' if loop.last else '') + said + '</s>\\n' }}
{%- else %}{{- '<s>' + m.role + '\\n' + m.content + '</s>\\n' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<s>assistant\\n' }}{%- endif %}"""


def tokenizer_with(template: str) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    tokenizer.chat_template = template
    return tokenizer


TOKENIZER = tokenizer_with(PLAIN)


def chat(*turns: str) -> list[dict[str, str]]:
    """A user and an assistant in turn; "system: ..." is neither's."""
    roles = iter(("user", "assistant") * len(turns))
    return [
        {"role": "system", "content": turn[8:]}
        if turn.startswith("system: ")
        else {"role": next(roles), "content": turn}
        for turn in turns
    ]


def answers(messages: list[dict[str, str]], template: str) -> list[str]:
    text, spans = chat_answers(messages, tokenizer_with(template))
    return [text[start:end] for start, end in spans]


def test_answers_by_prefixes_and_by_marks() -> None:
    messages = chat("system: Be.", "Hi", "Yes.", "More", " No \n")
    for template in (PLAIN, MARKED):
        assert answers(messages, template) == ["Yes.</s>", " No \n</s>"], template
    assert answers(chat("Hi", "", "More", "Hi"), PLAIN) == ["</s>", "Hi</s>"]


def test_thoughts_of_earlier_answers_are_left_out_as_the_template_does() -> None:
    turns = ("<think>\nno</think>\n\nYes.", "More", "<think>\nwell</think>\n\nNo.")
    assert answers(chat("Hi", *turns), THINKING) == [
        "Yes.</s>", "<think>\nwell\n</think>\n\nNo.</s>"
    ]  # fmt: skip
    assert answers(chat("Hi", "Yes.", "More"), THINKING) == ["Yes.</s>"]


def test_templates_by_which_answers_are_not_known() -> None:
    shouting = "{% for m in messages %}{{ m.content.upper() if not loop.last else m.content }} "
    for template, messages, why in (
        (PLAIN, chat("Hi"), "no answer"),
        (MARKED, chat("Hi"), "no answer"),
        (shouting + "{% endfor %}", chat("Hi", "yes", "so"), "what stands before message 2"),
        ("{{ messages | length }}" + PLAIN, chat("Hi", "yes", "so"), "before message 2"),
        ("{{ raise_exception('roles') }}", chat("Hi", "yes"), "template refuses .*roles"),
        (PLAIN.replace("{{ m.content }}", "{{ m.content if loop.last else '' }}"),
         chat("", "yes", "so"), "message 2 differently"),
    ):  # fmt: skip
        with pytest.raises(ChatError, match=why):
            answers(messages, template)


def write(path: Path, records: list[Any]) -> tuple[str]:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return (str(path),)


def test_masks_are_those_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    marked = tokenizer_with(MARKED)
    messages = chat(*(text[i * 50 : i * 90] for i, text in enumerate(documents()[1:7], start=1)))
    tokens, _ = token_ids(write(tmp_path / "a.jsonl", [{"messages": messages}]), marked, None, True)
    theirs = marked.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = np.asarray(theirs["input_ids"]), np.asarray(theirs["assistant_masks"], dtype=bool)
    start = len(tokens) - len(ids)  # what the tokenizer puts before a text
    assert np.where(tokens < 0, ~tokens, tokens)[start:].tolist() == ids.tolist()
    assert (tokens >= 0)[start:].tolist() == mask.tolist()


def slowly(record: dict[str, Any]) -> list[tuple[int, bool]]:
    """Each turn tokenised alone, (token, whether it is learned)."""

    def ids(text: str, is_answer: bool) -> list[tuple[int, bool]]:
        made = TOKENIZER(text, add_special_tokens=False)["input_ids"]
        return [(token, is_answer) for token in made]

    if "prompt" in record:
        return ids(record["prompt"], False) + ids(record["completion"], True)
    return [
        pair
        for m in record["messages"]
        for pair in (
            *ids(f"<s>{m['role']}<s>", False),
            *ids(m["content"] + "</s>", m["role"] == "assistant"),
        )
    ]


@given(
    st.lists(st.lists(st.integers(0, 300), min_size=2, max_size=5), min_size=1, max_size=6),
    st.integers(8, 80),
    st.integers(0, 100),
)
def test_what_is_learned_is_what_a_slow_version_says(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[list[int]], length: int, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    text = documents()[0]
    records: list[dict[str, Any]] = []
    for number, turns in enumerate(sizes):
        starts = generator.integers(0, 10_000, len(turns))
        said = [text[a : a + n] for a, n in zip(starts, turns, strict=True)]
        pair = {"prompt": said[0] + "</s>", "completion": "<s>" + said[1]}
        records.append({"messages": chat(*said)} if number % 3 else pair)
    folder = tmp_path_factory.mktemp("slow")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        sources = write(folder / "a.jsonl", records)
        for _ in range(2):  # the second time from the cache
            tokens, lengths = token_ids(sources, TOKENIZER, None, True)
    expected = [slowly(record) for record in records]
    flat = [pair for document in expected for pair in document]
    assert lengths.tolist() == [len(document) for document in expected]
    assert tokens.tolist() == [token if is_learned else ~token for token, is_learned in flat]
    assert learned(tokens).tolist() == [token for token, is_learned in flat if is_learned]

    # A place is learned if the next token is in the same piece and of an answer.
    wanted: list[tuple[int, int]] = []
    for document in expected:
        for start in range(0, len(document), length):
            piece = document[start : start + length]
            wanted += [
                (token, answer)
                for (token, _), (answer, is_learned) in itertools.pairwise(piece)
                if is_learned
            ]
    rows = pack(lengths, length, tokens)
    assert rows.num_labels.sum() == len(wanted) and (rows.num_labels > 0).all()
    if not len(rows):
        return
    batch = make_batch(tokens, [rows])
    places = batch.labels != IGNORED
    pairs = torch.stack([batch.tokens[0], batch.labels], 1)[places].tolist()
    assert sorted(map(tuple, pairs)) == sorted(wanted)
    data = step_data(rows, 0, (0, 0), 3, 4, None)
    (whole,) = step_batches(tokens, data, range(3), 3)
    assert data.num_labels == int((whole.labels != IGNORED).sum())


def test_trains_on_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompts' tokens change what is read, not what is learned."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    texts = [text[:600] for text in documents()[:20]]
    pairs = [{"prompt": text[:200], "completion": text[200:]} for text in texts]

    def run(data: str, *more: str):
        command = ["train", "--target", str(TARGET), "--data", data, "--steps", "2",
                   "--sequence-length", "64", "--sequences-per-step", "4", *more]  # fmt: skip
        return CliRunner().invoke(app, command, catch_exceptions=False)

    (data,) = write(tmp_path / "pairs.jsonl", pairs)
    done = run(data, "--output", str(tmp_path / "draft"), "--train-on", "answers")
    assert done.exit_code == 0, done.output
    log = [json.loads(line) for line in (tmp_path / "draft/training_log.jsonl").open()]
    assert 6 < log[0]["loss"] < 12  # a mean over what is learned
    recipe = (tmp_path / "draft/recipe.yaml").read_text()
    assert "train_on: answers" in recipe
    (plain,) = write(tmp_path / "plain.jsonl", texts)
    done = run(plain, "--output", str(tmp_path / "no"), "--train-on", "answers")
    assert done.exit_code == 2 and not (tmp_path / "no").exists()
    assert f"data: line 1 of {plain}, the first record, cannot be used: it is plain text" in (
        done.stderr
    )
    done = run(data, "--output", str(tmp_path / "no"), "--train-on", "me")
    assert done.exit_code == 2 and "--train-on: 'me' is not valid" in done.stderr
    with pytest.raises(LongSpecError, match="gives no text"):
        token_ids(write(tmp_path / "empty.jsonl", []), TOKENIZER, None, True)
