"""What the commands' options share: their types, and how their texts are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


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
