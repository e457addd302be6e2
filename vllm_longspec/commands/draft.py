"""Commands that make one draft from another: `vllm-longspec trim-head` and `convert`."""

from pathlib import Path
from typing import Annotated

import typer

from vllm_longspec.commands import DATA, mistakes_in_a_sentence
from vllm_longspec.commands.values import check_local
from vllm_longspec.records import check_source


def trim_head(
    draft: Annotated[Path, typer.Option(help="Folder of the LongSpec draft.")],
    target: Annotated[str, typer.Option(help="Its target, folder or repository, to tokenise.")],
    data: Annotated[str, typer.Option(help=DATA)],
    output: Annotated[Path, typer.Option(help="Folder to write the new draft to.")],
    draft_vocab_size: Annotated[
        int, typer.Option(min=1, help="Draft vocabulary: tokens that the draft may propose.")
    ] = 32768,
) -> None:
    """Reduce a draft's vocabulary to the most frequent tokens of your text: it reads less at each
    level of a tree, for a copy of these tokens' rows of the target's head. Outputs stay equal."""
    with mistakes_in_a_sentence():
        check_source(data)
        check_local(draft.resolve(), "draft")
        check_local(target, "target")
        from vllm_longspec.draft import trim

        trim.trim_head(draft, target, data, draft_vocab_size, output)


def convert(
    draft: Annotated[
        str,
        typer.Option(
            help="Draft, folder or repository such as sail/longspec-...: any format; or the "
            "torch file of tensors that the authors' trainer writes."
        ),
    ],
    target: Annotated[str, typer.Option(help="The target it is for, folder or repository.")],
    output: Annotated[Path, typer.Option(help="Folder to write the draft and its card to.")],
) -> None:
    """Write a draft in this project's format: safetensors, a config that names the target, so that
    `vllm serve OUTPUT` serves it, and a model card. To serve a published draft or to train on from
    it there is no need to."""
    with mistakes_in_a_sentence():
        check_local(draft, "draft")
        check_local(target, "target")
        from vllm_longspec.draft import convert

        convert.convert(draft, target, output)
