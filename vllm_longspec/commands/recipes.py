"""`vllm-longspec recipes`."""

from pathlib import Path
from typing import Annotated

import typer

from vllm_longspec.commands import mistakes_in_a_sentence
from vllm_longspec.errors import LongSpecError
from vllm_longspec.output import claim_file, unreadable
from vllm_longspec.train.shipped import shipped
from vllm_longspec.writing import write_text


def recipes(
    name: Annotated[str | None, typer.Argument(help="A recipe to copy.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="File to copy it to.", show_default="NAME.yaml, here")
    ] = None,
) -> None:
    """List the recipes that come with the package, each with its target, or copy one to change it.

    `vllm-longspec train --config NAME` takes one as it is.
    """
    with mistakes_in_a_sentence():
        texts = shipped()
        if name is None:
            if output is not None:
                raise LongSpecError("output: there is nothing to copy; name a recipe")
            for known, text in texts.items():
                print(f"{known:14}{text.partition(chr(10))[0].removeprefix('# ')}")
            return
        if name not in texts:
            raise LongSpecError(f"name: {name!r} is none of {', '.join(texts)}")
        output = output or Path(f"{name}.yaml")
        with unreadable(output, "output"):  # a copy that was changed is the user's
            if output.is_file() and output.stat().st_size:
                raise LongSpecError(f"output: {output} is there already; name another file")
        claim_file(output, ())
        write_text(output, texts[name])
        print(f"wrote {output}")
