"""MkDocs hook: writes the commands of `vllm-longspec` and their options into options.md."""

from collections.abc import Iterator
from typing import Any

import typer

MARKER = "<!-- commands -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    if MARKER not in markdown:
        return markdown
    return markdown.replace(MARKER, "\n".join(command_lines()))


def command_lines() -> Iterator[str]:
    from vllm_longspec.cli import app

    for name, command in leaf_commands(typer.main.get_command(app), "vllm-longspec"):
        yield f"\n### `{name}`\n\n{one_line(command.help)}\n"
        yield "| option | default | what it does |\n|---|---|---|"
        for option in command.params:
            if not getattr(option, "hidden", False) and option.name != "help":
                flags = ", ".join(f"`{flag}`" for flag in (*option.opts, *option.secondary_opts))
                yield f"| {flags} | {default_of(option)} | {one_line(option.help)} |"


def leaf_commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    for child_name, child in getattr(command, "commands", {}).items():
        child_path = f"{name} {child_name}"
        if getattr(child, "commands", None):
            yield from leaf_commands(child, child_path)
        elif not child.hidden:
            yield child_path, child


def default_of(option: Any) -> str:
    if option.required:
        return "required"
    if isinstance(option.show_default, str):  # of options that a recipe may set too
        return option.show_default
    if option.default in (None, [], ()):
        return ""
    if isinstance(option.default, bool):
        return "yes" if option.default else "no"
    values = option.default if isinstance(option.default, list | tuple) else [option.default]
    return " ".join(f"`{value}`" for value in values)


def one_line(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")
