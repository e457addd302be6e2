"""Chat templates: conversations as text, and which of that text are answers."""

import re
from typing import TYPE_CHECKING, Any

from vllm_longspec.errors import LongSpecError, reason, short

if TYPE_CHECKING:  # it takes seconds, and sources are checked before
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
Spans = tuple[tuple[int, int], ...]  # of characters, from and up to

MARKS_ANSWERS = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatError(ValueError):
    """Why messages give no text, as a part of a sentence."""


def chat_text(messages: list[Message], tokenizer: "PreTrainedTokenizerBase") -> str:
    """Raises ChatError where the template refuses the messages."""
    return _render(messages, tokenizer)


def chat_answers(
    messages: list[Message], tokenizer: "PreTrainedTokenizerBase"
) -> tuple[str, Spans]:
    """The text of a conversation and where in it the assistant speaks, ends of turns included: as
    the template marks it (`{% generation %}`), else by rendering what goes before each answer.
    Raises ChatError."""
    from transformers.utils.chat_template_utils import render_jinja_template

    template = _template(tokenizer)
    if not MARKS_ANSWERS.search(template):
        text = _render(messages, tokenizer)
        spans = answers_by_prefixes(messages, text, tokenizer)
    else:
        try:
            texts, marked = render_jinja_template(
                [messages], chat_template=template, return_assistant_tokens_mask=True,
                **tokenizer.special_tokens_map,
            )  # fmt: skip
        except Exception as error:  # a template may raise anything
            raise _refusal(error) from error
        text, spans = texts[0], tuple((start, end) for start, end in marked[0] if end > start)
    if not spans:
        raise ChatError("its messages have no answer of the assistant")
    return text, spans


def answers_by_prefixes(
    messages: list[Message], text: str, tokenizer: "PreTrainedTokenizerBase"
) -> Spans:
    """An answer begins where the prompt for it ends. It ends where the conversation up to it does;
    the beginnings of earlier answers may be left out of `text`, as thoughts are (Qwen3)."""
    spans: list[tuple[int, int]] = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(messages[:turn], tokenizer) if turn else ""
        if not text.startswith(before):
            raise ChatError(f"the chat template changes what stands before message {turn + 1}")
        prompt = _render(messages[:turn], tokenizer, prompt=True) if turn else ""
        start = common_length(prompt, text)
        answer = _render(messages[: turn + 1], tokenizer)[start:].rstrip()
        if not answer:
            continue
        length = overlap(answer, text[start:])
        said = message.get("content")
        last_word = said.split()[-1:] if isinstance(said, str) else []
        if not length or not all(word in answer[-length:] for word in last_word):
            raise ChatError(f"the chat template shows message {turn + 1} differently later on")
        spans.append((start, start + length))
    return tuple(spans)


def chat_prompt(
    tokenizer: "PreTrainedTokenizerBase", text: str, system: str | None = None
) -> list[int]:
    """One user message in the tokenizer's chat format, up to where the answer starts. Raises
    LongSpecError where the format has none or no place for a system prompt."""
    if tokenizer.chat_template is None:
        raise LongSpecError(
            f"target: the tokenizer of {tokenizer.name_or_path} has no chat template; take the "
            "target's chat version"
        )
    messages = [{"role": "user", "content": text}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    try:
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    except Exception as error:  # a template may raise anything
        fix = "take the target's chat version" if system is None else "leave --prompts paper out"
        raise LongSpecError(
            f"target: the chat template of {tokenizer.name_or_path} refuses "
            f"{'a question' if system is None else 'a system prompt'} ({reason(error)}); {fix}"
        ) from error


def common_length(a: str, b: str) -> int:
    """Of what both begin with."""
    if b.startswith(a):
        return len(a)
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def overlap(a: str, b: str) -> int:
    """How long the longest end of `a` is that `b` begins with."""
    return next((len(a) - i for i in range(len(a)) if a[i] == b[:1] and b.startswith(a[i:])), 0)


def _template(tokenizer: "PreTrainedTokenizerBase") -> str:
    try:
        return tokenizer.get_chat_template()
    except ValueError:
        raise ChatError("the target has no chat template for its messages") from None


def _render(
    messages: list[Message], tokenizer: "PreTrainedTokenizerBase", prompt: bool = False
) -> str:
    _template(tokenizer)
    try:
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        )
    except Exception as error:  # a template may raise anything
        raise _refusal(error) from error


def _refusal(error: Exception) -> ChatError:
    return ChatError(f"the chat template refuses its messages ({short(reason(error))})")
