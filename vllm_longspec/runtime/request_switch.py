"""What a request may say to LongSpec: `vllm_xargs: {"longspec": "off"}`, in Python
`SamplingParams(extra_args={"longspec": "off"})`."""

from functools import cache
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from vllm_longspec.errors import short
from vllm_longspec.runtime.switches import PARAMETERS, unknown

ARGUMENT = "longspec"
ON, OFF = "on", "off"


def check_request(params: SamplingParams) -> None:
    """Raises VLLMValidationError, which the server answers with 400."""
    value = (params.extra_args or {}).get(ARGUMENT, ON)
    if value not in (ON, OFF):
        raise VLLMValidationError(
            f'{ARGUMENT} has to be "{ON}" or "{OFF}", not {short(repr(value))}', parameter=ARGUMENT
        )
    for name, default in unknown_parameters().items():
        if getattr(params, name) != default:
            raise VLLMValidationError(
                f"{name}: {unknown('parameter')}; leave it out", parameter=name
            )


@cache
def unknown_parameters() -> dict[str, Any]:
    """Of a vLLM that was not read, with their defaults."""
    plain, names = SamplingParams(), SamplingParams.__struct_fields__
    return {name: getattr(plain, name) for name in names if name not in PARAMETERS.names}


def is_off(params: SamplingParams) -> bool:
    return (params.extra_args or {}).get(ARGUMENT) == OFF


def has_grammar(params: SamplingParams | None) -> bool:
    """Masks come for each token that was scheduled to be verified."""
    return params is not None and params.structured_outputs is not None
