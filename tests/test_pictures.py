"""`fastddim.pictures`: known images in, known pixels out; files whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastddim.pictures import GridLayout, check_picture, make_grid, open_picture, picture_tensor, save_picture


def ramp(count: int, channels: int = 1, height: int = 2, width: int = 3) -> torch.Tensor:
    """Images whose values step through [-1, 1]."""
    return torch.linspace(-1, 1, count * channels * height * width).reshape(count, channels, height, width)


def expected_pixels(image: torch.Tensor, scale: int) -> np.ndarray:
    pixels = np.floor((image.double().numpy() + 1) / 2 * 255 + 0.5).clip(0, 255).astype(np.uint8)
    pixels = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
    return pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("labels", [None, list(range(5)), [0, 1, 0, 1, 0]])
@pytest.mark.parametrize("scale", [1, 3])
def test_known_pixels(channels: int, labels: list[int] | None, scale: int) -> None:
    images = ramp(5, channels)
    picture = np.asarray(make_grid(images, labels, columns=2, scale=scale))
    layout = GridLayout.plan(5, 2, 3, labels, columns=2, scale=scale)
    assert picture.shape[:2] == layout.size[::-1]
    covered = np.zeros(picture.shape[:2], dtype=bool)
    for row, indices in enumerate(layout.rows):
        for column, index in enumerate(indices):
            x, y = layout.corner(row, column)
            tile = picture[y : y + 2 * scale, x : x + 3 * scale]
            assert np.array_equal(tile, expected_pixels(images[index], scale))
            assert not covered[y : y + 2 * scale, x : x + 3 * scale].any()
            covered[y : y + 2 * scale, x : x + 3 * scale] = True
    between = picture[~covered]
    assert (between == 255).all() if labels is None else (between < 128).any()
    assert sorted(sum(layout.rows, ())) == list(range(5))


def test_exact_size_and_gaps() -> None:
    picture = np.asarray(make_grid(torch.full((6, 1, 2, 3), -1.0), columns=3, scale=2))
    assert picture.shape == (2 * (4 + 4) + 4, 3 * (6 + 4) + 4)
    assert (picture == 0).sum() == 6 * 4 * 6
    assert (picture[:4] == 255).all() and (picture[-4:] == 255).all() and (picture[:, :4] == 255).all()


def test_rows_of_labels() -> None:
    labels = [k % 10 for k in range(100)]
    layout = GridLayout.plan(100, 16, 16, labels)
    assert layout.rows == tuple(tuple(range(label, 100, 10)) for label in range(10))
    assert layout.tile == (48, 48)
    assert GridLayout.plan(10, 16, 16, range(10)).rows == (tuple(range(10)),)
    assert [len(row) for row in GridLayout.plan(100, 16, 16, [7] * 100).rows] == [10] * 10
    assert [len(row) for row in GridLayout.plan(400, 16, 16).rows] == [20] * 20


def test_row_label_stands_beside_its_row() -> None:
    labels = ["1", "1", "22", "22"]
    layout = GridLayout.plan(4, 16, 16, labels)
    picture = np.asarray(make_grid(torch.ones(4, 1, 16, 16), labels))
    for row in range(2):
        y = layout.corner(row, 0)[1]
        assert (picture[y : y + layout.tile[1], : layout.margin] < 128).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_floating_dtype_clips(dtype: torch.dtype) -> None:
    images = torch.tensor([-9.0, -1.0, 1.0, 9.0], dtype=dtype).reshape(1, 1, 2, 2)
    layout = GridLayout.plan(1, 2, 2, scale=1)
    x, y = layout.corner(0, 0)
    assert np.asarray(make_grid(images, scale=1))[y : y + 2, x : x + 2].tolist() == [[0, 0], [255, 255]]


def test_gradient_is_no_obstacle() -> None:
    assert make_grid(ramp(2).requires_grad_()).mode == "L"


@pytest.mark.parametrize(
    ("images", "kwargs", "match"),
    [
        (torch.zeros(2, 4, 8, 8), {}, r"images: shape \(2, 4, 8, 8\); pass .* C 1 .* or 3"),
        (torch.zeros(1, 8, 8), {}, r"images: shape \(1, 8, 8\); pass"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), {}, r"images: torch.uint8; pass floating"),
        (torch.zeros(0, 1, 8, 8), {}, r"images: 0; pass at least one"),
        (torch.zeros(2, 1, 8, 8), {"labels": [1]}, r"labels: 1 for 2 images; pass one per image"),
        (torch.zeros(2, 1, 8, 8), {"columns": 0}, r"columns: 0; pass an integer >= 1"),
        (torch.zeros(2, 1, 8, 8), {"scale": -1}, r"scale: -1; pass an integer >= 1"),
    ],
)
def test_bad_images(images: torch.Tensor, kwargs: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make_grid(images, **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(value: float) -> None:
    images = torch.zeros(4, 1, 8, 8)
    images[2, 0, 3] = value
    with pytest.raises(ValueError, match=r"images: 1 of 4 hold NaN or infinity, first image 2 \(8 values\); .*float32"):
        make_grid(images)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".PNG"])
def test_formats(tmp_path: Path, suffix: str) -> None:
    picture = make_grid(ramp(4, 3))
    path = tmp_path / f"grid{suffix}"
    check_picture(path, picture.size)
    assert os.listdir(tmp_path) == []
    save_picture(picture, path)
    assert os.listdir(tmp_path) == [path.name]
    with Image.open(path) as read:
        assert read.size == picture.size
        if suffix not in (".jpg", ".jpeg"):
            assert np.array_equal(np.asarray(read.convert("RGB")), np.asarray(picture))


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("no/grid.png", r"no/grid.png' .*does not exist; create"),
        ("", r"is a folder; pass a file in it"),
        ("grid.xyz", r"grid.xyz' has the suffix '.xyz'; pass one of .png"),
        ("grid", r"has the suffix ''; pass one of .png"),
        ("file.png/grid.png", r"does not exist; create"),
        ("n" * 300 + ".png", r"cannot be written \(File name too long\); pass another path"),
        ("pipe.png", r"device or a pipe; pass a regular file"),
    ],
)
def test_paths_that_cannot_be_written(tmp_path: Path, name: str, match: str) -> None:
    (tmp_path / "file.png").touch()
    os.mkfifo(tmp_path / "pipe.png")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises((ValueError, OSError), match=match) as caught:
        check_picture(tmp_path / name)
    assert str(caught.value).startswith("path: ")
    assert sorted(os.listdir(tmp_path)) == before


def test_longest_name_is_written(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 251 + ".png")
    check_picture(path)
    save_picture(make_grid(ramp(1)), path)
    assert os.listdir(tmp_path) == [path.name]


def test_folder_or_file_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Simulated, since root may write anywhere.
    path = tmp_path / "grid.png"

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "touch", refuse)
        with pytest.raises(PermissionError, match=r"grid.png' cannot be written \(Permission denied\); pass another"):
            check_picture(path)
    path.touch()
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(PermissionError, match=r"grid.png' is write-protected; pass another"):
        check_picture(path)


def test_too_large_for_its_format(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"20000x10 pixels, and WEBP ends at 16383; pass a .png path or fewer images"):
        check_picture(tmp_path / "grid.webp", (20000, 10))
    check_picture(tmp_path / "grid.png", (20000, 10))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("encoder")])
def test_failure_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    path = tmp_path / "grid.png"
    path.write_bytes(b"old")

    def fail(self: Image.Image, file: object, **_: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise error

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(type(error)):
        save_picture(make_grid(ramp(2)), path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["grid.png"]


def test_failure_names_the_path(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"path: '.*grid.png' was not written \(No such file or directory\); pass"):
        save_picture(make_grid(ramp(2)), tmp_path / "no" / "grid.png")


def test_killed_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "grid.png"
    path.write_bytes(b"old")
    script = f"""
import os, signal, time
from PIL import Image
from fastddim.pictures import save_picture
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
save_picture(Image.new("L", (64, 64)), {str(path)!r})
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=300).returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"


def test_permissions_and_links(tmp_path: Path) -> None:
    picture = make_grid(ramp(2))
    fresh, kept, link = tmp_path / "fresh.png", tmp_path / "kept.png", tmp_path / "link.png"
    mask = os.umask(0o022)
    try:
        save_picture(picture, fresh)
    finally:
        os.umask(mask)
    assert fresh.stat().st_mode & 0o777 == 0o644
    kept.touch()
    kept.chmod(0o600)
    link.symlink_to(kept)
    save_picture(picture, link)
    assert link.is_symlink() and kept.stat().st_mode & 0o777 == 0o600
    assert kept.read_bytes() == fresh.read_bytes()


@pytest.mark.parametrize("labels", [None, [1, 1, 1, 2, 2, 2], list(range(6))])
def test_headings_stand_over_the_columns(labels: list[int] | None) -> None:
    headings = ("original", "x_T", "a long reconstruction")
    plain = GridLayout.plan(6, 2, 3, labels, columns=3, scale=4)
    layout = GridLayout.plan(6, 2, 3, labels, columns=3, scale=4, headings=headings)
    assert layout.cell_width > plain.cell_width and layout.size[1] == plain.size[1] + layout.top
    images = ramp(6)
    picture = np.asarray(make_grid(images, labels, columns=3, scale=4, headings=headings))
    assert picture.shape == layout.size[::-1]
    for row, indices in enumerate(layout.rows):
        for column, index in enumerate(indices):
            x, y = layout.corner(row, column)
            assert np.array_equal(picture[y : y + 8, x : x + 12], expected_pixels(images[index], 4))
    # The headings' own line, above the labels of tiles.
    assert (picture[: layout.top + 4] < 128).any(0).reshape(-1).nonzero()[0].min() >= layout.margin


def test_headings_of_another_number_are_refused() -> None:
    with pytest.raises(ValueError, match="headings: 2 for 3 columns; pass one per column"):
        make_grid(ramp(6), columns=3, headings=("a", "b"))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_of_the_right_size_comes_back_as_its_pixels(tmp_path: Path, channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, channels), dtype=np.uint8)
    Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels).save(tmp_path / "a.png")
    tensor = picture_tensor(open_picture(tmp_path / "a.png"), (channels, 6, 9))
    assert tensor.shape == (channels, 6, 9) and tensor.dtype == torch.float32
    assert np.array_equal(((tensor + 1) * 127.5).round().byte().permute(1, 2, 0).numpy(), pixels)
    assert tensor.min() >= -1 and tensor.max() <= 1


def test_a_picture_is_cropped_to_the_models_shape_and_turned_upright(tmp_path: Path) -> None:
    wide = Image.new("RGB", (60, 20), (255, 255, 255))
    wide.paste((0, 0, 0), (20, 0, 40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    wide.save(tmp_path / "a.jpg", exif=exif, quality=100)
    image = open_picture(tmp_path / "a.jpg")
    assert image.size == (20, 60)
    # The black middle is all that a square keeps.
    with torch.device("meta"):
        assert picture_tensor(image, (3, 8, 8)).shape == (3, 8, 8)
    assert picture_tensor(image, (1, 8, 8)).max() < -0.8
