"""What a request may say to LongSpec: `vllm_xargs: {"longspec": "off"}`, in Python
`SamplingParams(extra_args={"longspec": "off"})`."""

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from vllm_longspec.errors import short

ARGUMENT = "longspec"
ON, OFF = "on", "off"


def check_request(params: SamplingParams) -> None:
    """Raises VLLMValidationError, which the server answers with 400."""
    value = (params.extra_args or {}).get(ARGUMENT, ON)
    if value not in (ON, OFF):
        raise VLLMValidationError(
            f'{ARGUMENT} has to be "{ON}" or "{OFF}", not {short(repr(value))}', parameter=ARGUMENT
        )


def is_off(params: SamplingParams) -> bool:
    return (params.extra_args or {}).get(ARGUMENT) == OFF


def has_grammar(params: SamplingParams | None) -> bool:
    """Masks come for each token that was scheduled to be verified."""
    return params is not None and params.structured_outputs is not None
