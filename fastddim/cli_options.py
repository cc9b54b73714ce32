"""What the commands' options share: their types, and how their texts are read."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
import typer.models
from typer.core import TyperGroup

import fastddim
from fastddim.config import require_choice

if TYPE_CHECKING:
    import torch


# The guidance towards class labels, where none is given; that of CFG++ is the paper's lambda (arXiv:2406.08070, section 4).
DEFAULT_GUIDANCE = {"cfg": 2.0, "cfg++": 0.6, "apg": 2.0}


class CommandGroup(TyperGroup):
    """A group of commands whose error for an unknown one lists them all."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if self.get_command(ctx, args[0]) is None:
            ctx.fail(f"No such command {args[0]!r}; pass one of {', '.join(self.list_commands(ctx))}.")
        return super().resolve_command(ctx, args)


def _parser(kind: type[int] | type[float], noun: str) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            return kind(text)
        except ValueError:
            # typer's own message leaves out the value.
            raise typer.BadParameter(f"{text!r}; pass {noun}") from None

    return parse


# Options by what their text is.
integer = functools.partial(typer.Option, parser=_parser(int, "an integer"), metavar="INTEGER")
number = functools.partial(typer.Option, parser=_parser(float, "a number"), metavar="NUMBER")
integers = functools.partial(typer.Option, metavar="INTEGERS")
choice = functools.partial(typer.Option, metavar="NAME")

Model = Annotated[
    str | None,
    typer.Option(metavar="FOLDER_OR_HUB_ID", help="A diffusers folder or hub id. Default: the embedded digits."),
]
Variant = Annotated[str | None, choice(help="Which weights to take, such as fp16.")]
Steps = Annotated[int | None, integer(help="Model calls per image. Default: 50, or all of a shorter schedule.")]
Method = Annotated[
    str,
    typer.Option(metavar="NAME,K=V", show_default=False, help="As tcd,gamma=0.2 or euler,spacing=karras."),
]
Eta = Annotated[float | None, number(help="0 is DDIM, 1 is DDPM. Default: the method's.")]
GuidanceMethod = Annotated[
    str, typer.Option(metavar="NAME,K=V", show_default=False, help="cfg, cfg++, or as apg,apg_eta=0.5.")
]
Out = Annotated[Path, typer.Option(metavar="FILE", help="The picture: .png, .jpg, .webp, .bmp or .tif.")]
Device = Annotated[str | None, choice(help="cpu or cuda[:N]. Default: cuda where there is one.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, and no progress bar.")]


def parse_integers(text: str, option: str) -> list[int]:
    integers = []
    for part in text.split(","):
        if not part.strip().isdecimal():
            raise ValueError(f"{option}: {part.strip()!r} in {text!r}; pass integers with commas, such as 0,1,2")
        integers.append(int(part))
    return integers


def parse_method(text: str) -> dict[str, Any]:
    """`--method`'s text as the options `method`, `method_options` and `spacing` of a sampler."""
    name, options = _parse_named("--method", text)
    spacing = options.pop("spacing", None)
    return {"method": name, "method_options": options or None, "spacing": spacing}


def parse_guidance_method(text: str) -> dict[str, Any]:
    """`--guidance-method`'s text as `guidance_method` and its numbers."""
    name, numbers = _parse_named("--guidance-method", text)
    for key in numbers:
        require_choice("--guidance-method", key, ("apg_eta", "apg_norm_threshold"))
    return {"guidance_method": name, "apg_eta": 0.0, "apg_norm_threshold": 0.0, **numbers}


def _parse_named(option: str, text: str) -> tuple[str, dict[str, Any]]:
    """A name and what follows it as `K=V`; a V that is neither JSON nor True or False is a text."""
    name, *pairs = text.split(",")
    options: dict[str, Any] = {}
    for pair in pairs:
        key, given, value = pair.partition("=")
        if not given or not key:
            raise ValueError(f"{option}: {pair!r} in {text!r}; pass NAME,K=V")
        try:
            options[key] = json.loads(value.lower() if value in ("True", "False") else value)
        except ValueError:
            options[key] = value
    return name, options


def check_classes(classes: list[int] | None, null: int | None, owner: str) -> None:
    """Refuse classes that a model or a bundle does not have; `null` is its no class, None without any."""
    if classes is not None and null is None:
        raise ValueError(f"--labels: {','.join(map(str, classes))}, but this {owner} has no classes; leave them out")
    for label in classes or ():
        if null is not None and label > null:
            raise ValueError(f"--labels: {label}; pass integers in [0, {null}] ({null} is no class)")


def pick_device(device: str | None) -> torch.device:
    """The device that `--device` names, or by default a GPU where there is one."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    valid = [*(["cuda"] if gpus else []), "cpu", *(f"cuda:{index}" for index in range(gpus))]
    if device is not None and device not in valid:
        raise ValueError(f"--device: {device!r} is not on this machine; pass one of {', '.join(valid)}")
    return torch.device(device or valid[0])


@contextlib.contextmanager
def naming(argument: str, option: str) -> Iterator[None]:
    """Let an error that the library raises for an argument name the option that the user typed."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"{option}: {str(error).removeprefix(f'{argument}: ')}") from error


def with_options(function: Callable[..., None]) -> Callable[..., None]:
    """The command that a function is: parameters that are dataclasses become an option for each of their fields.

    typer reads parameters from a signature, so that commands which share options need not repeat them. Errors that the
    library raises for its arguments name the options that the user typed.
    """
    groups: dict[str, type[Any]] = {}
    parameters: list[inspect.Parameter] = []
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
    options = {parameter.name: option for parameter in parameters if (option := _option_of(parameter))}

    def command(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in dataclasses.fields(group)})
        with naming_options(options):
            function(**given)

    command.__name__, command.__doc__ = function.__name__, function.__doc__
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return command


def _option_of(parameter: inspect.Parameter) -> str | None:
    """The option of a parameter, which typer makes of its name where none is given; None for an argument."""
    (information,) = parameter.annotation.__metadata__
    if isinstance(information, typer.models.ArgumentInfo):
        return None
    given = information.default
    return given if isinstance(given, str) else f"--{parameter.name.replace('_', '-')}"


@contextlib.contextmanager
def naming_options(options: Mapping[str, str]) -> Iterator[None]:
    """Put options for the names of the library's arguments: at a message's start, in `name=value`, after "with"."""
    names = "|".join(options) or "(?!)"
    pattern = re.compile(rf"^({names})(?=:)|\b({names})(=True\b|=)|(?<=with )({names})\b|(?<=without )({names})\b")

    def typed(match: re.Match[str]) -> str:
        name = next(filter(None, match.group(1, 2, 4, 5)))
        return options[name] + (" " if match[3] == "=" else "")

    try:
        yield
    except (ValueError, ImportError, OSError) as error:
        message = pattern.sub(typed, str(error))
        if message == str(error):
            raise
        raise ValueError(message) from error


def load_model(model: str | None, variant: str | None = None) -> Any:
    """`fastddim.load_pipeline` of the options' values, without diffusers' own output."""
    quiet_diffusers()
    with naming_options({"model": "--model", "variant": "--variant"}):
        return fastddim.load_pipeline(model, variant)


def quiet_diffusers() -> None:
    """Errors come as exceptions; diffusers' own lines and bars would only repeat them."""
    import diffusers

    diffusers.utils.logging.set_verbosity(diffusers.utils.logging.CRITICAL)
    diffusers.utils.logging.disable_progress_bar()
