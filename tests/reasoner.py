"""A reasoning parser as vLLM's `reasoning_parser_plugin` loads one, of tokens that nano has."""

from vllm.reasoning import ReasoningParserManager
from vllm.reasoning.basic_parsers import BaseThinkingReasoningParser

NAME = "to_a_colon"


@ReasoningParserManager.register_module(NAME)
class ToAColon(BaseThinkingReasoningParser):
    start_token = "<s>"
    end_token = ":"
