"""`fastddim export`: a command for each runtime, and one for the repositories of the inference server."""

from __future__ import annotations

from typing import Any

import typer

from fastddim.cli_options import CommandGroup
from fastddim.export.inference_server.command import repository_command
from fastddim.export.old_spelling import new_spelling
from fastddim.export.runtime import get_runtime, runtimes


class _Runtimes(CommandGroup):
    """The commands of all runtimes, each imported when it is needed, before those that are added here."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*runtimes(), *super().list_commands(ctx)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        added = super().get_command(ctx, cmd_name)
        if added is not None:
            return added
        try:
            runtime = get_runtime(cmd_name)
        except ValueError:
            return None
        alone = typer.Typer(add_completion=False, rich_markup_mode=None)
        alone.command(cmd_name)(runtime.load(runtime.command))
        return typer.main.get_command(alone)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0].startswith("--") and args[0] != "--help":
            raise ValueError(f"export: {args[0]!r} comes before the runtime's name; type {new_spelling(args)}")
        rest: list[str] = super().parse_args(ctx, args)
        return rest


app = typer.Typer(name="export", cls=_Runtimes, invoke_without_command=True, rich_markup_mode=None)
app.command("repository")(repository_command)


@app.callback()
def _export(context: typer.Context) -> None:
    """Write a model and its sampler for a runtime."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
