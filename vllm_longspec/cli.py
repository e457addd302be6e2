"""The command line `vllm-longspec`."""

from typing import Annotated

import typer

from vllm_longspec import SUPPORTED_VLLM, __version__
from vllm_longspec.commands import bench, doctor, draft, eval, recipes, regenerate, train

app = typer.Typer(
    help="LongSpec for vLLM: train and measure drafts; serve them with `vllm serve`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def print_version(asked: bool) -> None:
    if asked:
        print(f"vllm-longspec {__version__}, for vLLM {SUPPORTED_VLLM}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=print_version, is_eager=True, help="And which vLLM."),
    ] = False,
) -> None:
    pass


app.command()(train.train)
app.command()(recipes.recipes)
app.command()(regenerate.regenerate)
app.command("trim-head")(draft.trim_head)
app.command()(draft.convert)
app.command()(doctor.doctor)
app.add_typer(eval.app, name="eval")
app.add_typer(bench.app, name="bench")

if __name__ == "__main__":
    app()
