"""Tensors from and to picture files: any file that Pillow reads; a grid of tiles with labels, written whole or not at all."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont, ImageOps

from fastddim.files import check_writable, write_whole

if TYPE_CHECKING:
    import torch

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
_SAVE_OPTIONS: dict[str, dict[str, Any]] = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}
_LONGEST_SIDE = {"JPEG": 65500, "WEBP": 16383}
_GAP = 4
_TILE = 48


def open_picture(path: str | Path) -> Image.Image:
    """Read a picture's pixels, upright as its EXIF data says.

    Raises:
        ValueError: no such file, a file that Pillow cannot read, or one of more than 8 bits a channel.
    """
    if not os.path.isfile(path):
        raise ValueError(f"path: {str(path)!r} is no file; pass a picture")
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            upright.load()
    except Exception as error:  # Pillow's readers raise whatever a damaged file makes them stumble over
        raise ValueError(f"path: {str(path)!r} cannot be read as a picture ({error}); pass another file") from error
    if upright.mode.startswith(("I", "F")):
        raise ValueError(f"path: {str(path)!r} has the mode {upright.mode!r}; pass a picture of 8 bits a channel")
    return upright


def picture_tensor(image: Image.Image, shape: tuple[int, int, int]) -> torch.Tensor:
    """A picture as `[C, H, W]` float32 in [-1, 1], on the CPU: grey or colour by C (1 or 3), cropped at its longer sides
    and resampled to H by W; one that has that size keeps its pixels.
    """
    import torch

    channels, height, width = shape
    fitted = ImageOps.fit(image.convert("L" if channels == 1 else "RGB"), (width, height), Image.Resampling.LANCZOS)
    pixels = torch.tensor(np.asarray(fitted), device="cpu").reshape(height, width, channels)
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


def check_picture(path: str | Path, size: tuple[int, int] | None = None) -> None:
    """Raise now what `save_picture` would raise after the work is done.

    Args:
        path: where the picture is to go.
        size: its width and height in pixels, where they are known.

    Raises:
        ValueError: a suffix without a picture format, no regular file, a picture too large for its format.
        OSError: no such folder, a path that is a folder, or a file or folder that cannot be written.
    """
    if not os.path.isdir(path):
        kind = _format_of(Path(path))
        limit = _LONGEST_SIDE.get(kind)
        if size is not None and limit is not None and max(size) > limit:
            raise ValueError(
                f"path: {str(path)!r} would be {size[0]}x{size[1]} pixels, and {kind} ends at {limit};"
                " pass a .png path or fewer images"
            )
    check_writable(path)


def save_picture(image: Image.Image, path: str | Path) -> None:
    """Write a picture whole or not at all.

    Args:
        image: the picture.
        path: its suffix chooses the format.

    Raises:
        ValueError: a suffix without a picture format.
        OSError: the file could not be written; no part of it is left, and an earlier one is as it was.
    """
    kind = _format_of(Path(path))
    write_whole(path, lambda file: image.save(file, format=kind, **_SAVE_OPTIONS.get(kind, {})))


@dataclass(frozen=True)
class GridLayout:
    """Where each tile of a grid goes. Images of one label share rows if any label repeats; else rows fill in order.

    Attributes:
        rows: the image indices in each row.
        tile: width and height of a tile in pixels, scaled.
        scale: pixels per image pixel.
        cell_width: the width of a tile, or of the widest label if that is wider, in pixels.
        header: height above each tile, for its label.
        margin: width left of the rows, for their labels.
        top: height above the first row, for the columns' headings.
    """

    rows: tuple[tuple[int, ...], ...]
    tile: tuple[int, int]
    scale: int
    cell_width: int
    header: int
    margin: int
    top: int = 0

    @classmethod
    def plan(
        cls,
        count: int,
        height: int,
        width: int,
        labels: Sequence[int | str] | None = None,
        columns: int | None = None,
        scale: int | None = None,
        headings: Sequence[str] | None = None,
    ) -> GridLayout:
        """Lay out `count` images of `height` by `width` pixels; the arguments are `make_grid`'s.

        Raises:
            ValueError: a number below 1, labels of another number than images, or headings of another than columns.
        """
        for name, value in (("images", count), ("height", height), ("width", width)):
            if value < 1:
                raise ValueError(f"{name}: {value}; pass at least one")
        for name, option in (("columns", columns), ("scale", scale)):
            if option is not None and option < 1:
                raise ValueError(f"{name}: {option}; pass an integer >= 1")
        if labels is not None and len(labels) != count:
            raise ValueError(f"labels: {len(labels)} for {count} images; pass one per image")
        scale = scale or max(1, math.ceil(_TILE / max(height, width)))
        texts = [] if labels is None else [str(label) for label in labels]
        by_row = len(set(texts)) < len(texts)
        sizes = [_text_size(text) for text in set(texts)]
        text_width = max((size[0] for size in sizes), default=0)
        rows = _arrange(count, texts if by_row else None, columns)
        heading_sizes = [_text_size(text) for text in headings or ()]
        if headings is not None and len(headings) != max(map(len, rows)):
            raise ValueError(f"headings: {len(headings)} for {max(map(len, rows))} columns; pass one per column")
        heading_width = max((size[0] for size in heading_sizes), default=0)
        return cls(
            rows=rows,
            tile=(width * scale, height * scale),
            scale=scale,
            cell_width=max(width * scale, heading_width, 0 if by_row else text_width),
            header=max(size[1] for size in sizes) + 2 if texts and not by_row else 0,
            margin=text_width + _GAP if by_row else 0,
            top=max((size[1] + 2 for size in heading_sizes), default=0),
        )

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the picture in pixels."""
        columns = max(len(row) for row in self.rows)
        return (
            self.margin + _GAP + columns * (self.cell_width + _GAP),
            self.top + _GAP + len(self.rows) * (self.header + self.tile[1] + _GAP),
        )

    def corner(self, row: int, column: int) -> tuple[int, int]:
        """The top left pixel `(x, y)` of a tile."""
        inset = (self.cell_width - self.tile[0]) // 2
        return (
            self.margin + _GAP + column * (self.cell_width + _GAP) + inset,
            self.top + _GAP + row * (self.header + self.tile[1] + _GAP) + self.header,
        )


def make_grid(
    images: torch.Tensor | npt.NDArray[Any],
    labels: Sequence[int | str] | None = None,
    columns: int | None = None,
    scale: int | None = None,
    headings: Sequence[str] | None = None,
) -> Image.Image:
    """Draw a batch as tiles with white gaps.

    Args:
        images: `[B, C, H, W]` in [-1, 1], a tensor on any device or an array, of any floating dtype, C 1 (grey) or 3
            (colour); values outside are clipped.
        labels: one per image. If some repeat, images of one label share rows and the label stands left of them; else
            each stands over its tile.
        columns: tiles in a row; by default about square, and not below 10.
        scale: pixels per image pixel, nearest neighbour; by default tiles come to 48 pixels or more.
        headings: one per column, over the first row.

    Returns:
        A picture of mode `L` or `RGB`.

    Raises:
        ValueError: another shape or dtype, values that are not finite, labels of another number than images, headings of
            another number than columns.
    """
    values: Any = images
    if not isinstance(images, np.ndarray):
        # numpy has no bfloat16.
        values = (images.float() if images.is_floating_point() else images).numpy(force=True)
    if values.ndim != 4 or values.shape[1] not in (1, 3):
        raise ValueError(f"images: shape {tuple(images.shape)}; pass [B, C, H, W] with C 1 (grey) or 3 (colour)")
    if not np.issubdtype(values.dtype, np.floating):
        raise ValueError(f"images: {images.dtype}; pass floating-point values in [-1, 1]")
    count, channels, height, width = values.shape
    layout = GridLayout.plan(count, height, width, labels, columns, scale, headings)
    _check_finite(values)
    # uint8 by rounding, as diffusers does it.
    pixels = ((values.astype(np.float32) + 1) * 127.5).round().clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
    mode = "L" if channels == 1 else "RGB"
    picture = Image.new(mode, layout.size, "white")
    for row, indices in enumerate(layout.rows):
        for column, index in enumerate(indices):
            tile = Image.fromarray(pixels[index, :, :, 0] if channels == 1 else pixels[index])
            picture.paste(tile.resize(layout.tile, Image.Resampling.NEAREST), layout.corner(row, column))
    _write(picture, layout, [str(label) for label in labels or ()], headings or ())
    return picture


def _arrange(count: int, texts: Sequence[str] | None, columns: int | None) -> tuple[tuple[int, ...], ...]:
    """Image indices in rows; with texts, a row holds images of one text only."""
    groups: dict[str, list[int]] = {}
    for index in range(count):
        groups.setdefault("" if texts is None else texts[index], []).append(index)
    if columns is None:
        columns = max(10, math.isqrt(count - 1) + 1)
    return tuple(
        tuple(group[first : first + columns]) for group in groups.values() for first in range(0, len(group), columns)
    )


def _write(picture: Image.Image, layout: GridLayout, texts: Sequence[str], headings: Sequence[str]) -> None:
    """Headings over the first row, and each text over its tile or, where the tiles of one text share rows, left of them."""
    draw, (width, height) = ImageDraw.Draw(picture), layout.tile
    for column, heading in enumerate(headings):
        x, y = layout.corner(0, column)
        draw.text((x + width / 2, y - layout.header - 1), heading, fill=0, anchor="mb")
    for row, indices in enumerate(layout.rows if texts else ()):
        for column, index in enumerate(indices if layout.header else indices[:1]):
            x, y = layout.corner(row, column)
            if layout.header:
                draw.text((x + width / 2, y - 1), texts[index], fill=0, anchor="mb")
            else:
                draw.text((layout.margin, y + height / 2), texts[index], fill=0, anchor="rm")


def _text_size(text: str) -> tuple[int, int]:
    _, _, right, bottom = ImageFont.load_default().getbbox(text)
    return math.ceil(right), math.ceil(bottom)


def _check_finite(images: npt.NDArray[Any]) -> None:
    bad = (~np.isfinite(images)).reshape(len(images), -1).sum(1)
    broken = bad.nonzero()[0].tolist()
    if broken:
        raise ValueError(
            f"images: {len(broken)} of {len(images)} hold NaN or infinity, first image {broken[0]}"
            f" ({int(bad[broken[0]])} values); the model overflowed: check its weights, or run it in float32"
        )


def _format_of(path: Path) -> str:
    formats = Image.registered_extensions()
    # A build of Pillow may lack some.
    valid = [suffix for suffix in _SUFFIXES if formats.get(suffix) in Image.SAVE]
    if path.suffix.lower() not in valid:
        raise ValueError(f"path: {str(path)!r} has the suffix {path.suffix!r}; pass one of {', '.join(valid)}")
    return formats[path.suffix.lower()]
