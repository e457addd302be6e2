"""A running server's OpenAI API: where it is, its key, and its errors as a sentence."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vllm_longspec.errors import LongSpecError, reason, short

if TYPE_CHECKING:
    import openai


def base_url(url: str) -> str:
    """Without a trailing slash and without `/v1`. Raises LongSpecError for what is no address."""
    if not url.startswith(("http://", "https://")):
        raise LongSpecError(f"url: {url} is no address; give http://HOST:PORT")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def api_key() -> str:
    return os.environ.get("OPENAI_API_KEY", "none")


def client(url: str, timeout: float | None = None) -> "openai.OpenAI":
    """Of a `base_url`; it tries once."""
    import openai

    return openai.OpenAI(base_url=f"{url}/v1", api_key=api_key(), timeout=timeout, max_retries=0)


@contextmanager
def server_errors(url: str) -> Iterator[None]:
    """A server that is not there or refuses is the user's mistake, told in a sentence."""
    import openai

    try:
        yield
    except (openai.APIConnectionError, OSError) as error:
        raise LongSpecError(
            f"url: no vLLM server answers at {url} ({reason(error)}); start one with `vllm serve`"
        ) from None
    except openai.APIStatusError as error:
        raise LongSpecError(f"url: {url} refused a request: {short(error.message)}") from None
    except openai.OpenAIError as error:
        raise LongSpecError(
            f"url: {url} does not answer as an OpenAI server ({reason(error)}); give a vLLM server"
        ) from None
