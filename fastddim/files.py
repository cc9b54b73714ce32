"""Files that are written whole or not at all, and checked before the work that fills them."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def check_folder(path: str | Path, argument: str) -> None:
    """Raise an `OSError`, which calls the folder `argument`, where there is none or it cannot be written to."""
    named = f"{argument}: {str(path)!r}"
    if not os.path.isdir(path):
        raise NotADirectoryError(f"{named} is no folder; create it first")
    try:
        # A probe, as permission bits say nothing of read-only mounts.
        os.rmdir(tempfile.mkdtemp(prefix=".fastddim-", dir=path))
    except OSError as error:
        raise type(error)(f"{named} cannot be written to ({error.strerror}); pass another folder") from error


def check_writable(path: str | Path, argument: str = "path") -> None:
    """Raise now what `write_whole` would raise after the work is done.

    Args:
        path: where the file is to go.
        argument: what messages call it.

    Raises:
        ValueError: a path that is a device or a pipe.
        OSError: no such folder, a path that is a folder, or a file or folder that cannot be written.
    """
    named = f"{argument}: {str(path)!r}"
    # os.path says no to a name that is too long, where pathlib raises.
    target = os.path.realpath(path)
    if os.path.isdir(target):
        raise IsADirectoryError(f"{named} is a folder; pass a file in it")
    folder = os.path.dirname(target)
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{named} is in a folder that does not exist; create {folder!r} first")
    if os.path.exists(target) and not os.path.isfile(target):
        raise ValueError(f"{named} is a device or a pipe; pass a regular file")
    if os.path.exists(target) and not os.access(target, os.W_OK):
        raise PermissionError(f"{named} is write-protected; pass another file or change its permissions")
    # A probe, as permission bits say nothing of read-only mounts; the lookup finds names that are too long.
    probe = _temporary_beside(target)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.lstat(target)
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise type(error)(f"{named} cannot be written ({error.strerror}); pass another path") from error


def write_whole(path: str | Path, write: Callable[[BinaryIO], object], argument: str = "path") -> None:
    """Let `write` fill a file; an earlier one at `path` stays as it was until the new one is on disk.

    Args:
        path: symbolic links are followed, and an existing file's permissions are kept.
        write: called once with the open binary file.
        argument: what messages call `path`.

    Raises:
        OSError: the file could not be written; no part of it is left.
    """
    target = os.path.realpath(path)
    temporary = _temporary_beside(target)
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if os.path.exists(target):
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"{argument}: {str(path)!r} was not written ({reason}); pass another path") from error
    finally:
        # After a successful replace there is nothing left to remove.
        temporary.unlink(missing_ok=True)


def _temporary_beside(target: str) -> Path:
    # Its own short name, so that a target name near the file system's limit still has a temporary one.
    return Path(os.path.dirname(target)) / f".fastddim-{secrets.token_hex(8)}.tmp"
