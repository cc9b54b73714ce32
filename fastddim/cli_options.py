"""What the commands' options share: their types, and how their texts are read."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from typer.core import TyperGroup

import fastddim

if TYPE_CHECKING:
    from fastddim.pipeline import DDIMPipeline


class CommandGroup(TyperGroup):
    """A group of commands whose error for an unknown one lists them all."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if self.get_command(ctx, args[0]) is None:
            ctx.fail(f"No such command {args[0]!r}; pass one of {', '.join(self.list_commands(ctx))}.")
        return super().resolve_command(ctx, args)


# typer's own message for these leaves out the value.
def integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r}; pass an integer.") from None


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r}; pass a number.") from None


Model = Annotated[
    str | None,
    typer.Option(metavar="FOLDER_OR_HUB_ID", help="A diffusers folder or hub id. Default: the embedded digits."),
]
Steps = Annotated[int, typer.Option(parser=integer, metavar="INTEGER", help="Model calls per image.")]
Out = Annotated[Path, typer.Option(help="The picture: .png, .jpg, .webp, .bmp or .tif.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda[:N]. Default: cuda where there is one.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, and no progress bar.")]


def parse_integers(text: str, option: str) -> list[int]:
    integers = []
    for part in text.split(","):
        if not part.strip().isdecimal():
            raise ValueError(f"{option}: {part.strip()!r} in {text!r}; pass integers with commas, such as 0,1,2")
        integers.append(int(part))
    return integers


@contextlib.contextmanager
def naming(argument: str, option: str) -> Iterator[None]:
    """Let an error that the library raises for an argument name the option that the user typed."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"{option}: {str(error).removeprefix(f'{argument}: ')}") from error


@contextlib.contextmanager
def naming_options(options: type[Any], **renamed: str) -> Iterator[None]:
    """Let errors for the fields of a dataclass of options name the options that the user typed.

    Args:
        options: the dataclass; a field `tf32` is the option `--tf32`.
        **renamed: the options of fields that have another name, and of further arguments.
    """
    try:
        yield
    except (ValueError, ImportError, OSError) as error:
        name, colon, rest = str(error).partition(":")
        named = {field.name: option_of(field.name) for field in dataclasses.fields(options)} | renamed
        raise ValueError(f"{named.get(name, name)}{colon}{rest}") from error


def option_of(name: str) -> str:
    """The option that typer makes of a parameter."""
    return f"--{name.replace('_', '-')}"


def with_options(function: Callable[..., None]) -> Callable[..., None]:
    """The command that a function is: parameters that are dataclasses become an option for each of their fields.

    typer reads parameters from a signature, so that commands which share options need not repeat them.
    """
    groups: dict[str, type[Any]] = {}
    parameters = []
    hints = get_type_hints(function, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        group = hints[name]
        if not dataclasses.is_dataclass(group):
            parameters.append(parameter.replace(annotation=group))
            continue
        assert isinstance(group, type)
        groups[name] = group
        types = get_type_hints(group, include_extras=True)
        for field in dataclasses.fields(group):
            default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
            kind = inspect.Parameter.KEYWORD_ONLY
            parameters.append(inspect.Parameter(field.name, kind, default=default, annotation=types[field.name]))

    def command(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in dataclasses.fields(group)})
        function(**given)

    command.__name__, command.__doc__ = function.__name__, function.__doc__
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return command


def load_model(model: str | None) -> DDIMPipeline:
    """`fastddim.load_pipeline` of an option's value, without diffusers' own output."""
    quiet_diffusers()
    with naming("model", "--model"):
        return fastddim.load_pipeline(model)


def quiet_diffusers() -> None:
    """Errors come as exceptions; diffusers' own lines and bars would only repeat them."""
    import diffusers

    diffusers.utils.logging.set_verbosity(diffusers.utils.logging.CRITICAL)
    diffusers.utils.logging.disable_progress_bar()
