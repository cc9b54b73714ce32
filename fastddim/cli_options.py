"""What the commands' options share: their types, and how their texts are read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import fastddim

if TYPE_CHECKING:
    from fastddim.pipeline import DDIMPipeline


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
def naming_options(options: Mapping[str, str]) -> Iterator[None]:
    """Let errors that the library raises for arguments name the options that the user typed; `options` has them."""
    try:
        yield
    except (ValueError, ImportError) as error:
        name, colon, rest = str(error).partition(":")
        raise ValueError(f"{options.get(name, name)}{colon}{rest}") from error


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
