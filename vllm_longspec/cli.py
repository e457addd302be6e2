"""The command line `vllm-longspec`."""

import typer

from vllm_longspec.commands import bench, doctor, draft, eval, regenerate, train

app = typer.Typer(
    help="LongSpec for vLLM: train and measure drafts; serve them with `vllm serve`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(train.train)
app.command()(regenerate.regenerate)
app.command("trim-head")(draft.trim_head)
app.command()(draft.convert)
app.command()(doctor.doctor)
app.add_typer(eval.app, name="eval")
app.add_typer(bench.app, name="bench")

if __name__ == "__main__":
    app()
