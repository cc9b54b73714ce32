"""A kernel bundle: a folder with the fused step compiled for GPUs, and `kernel.json`, which says how it is launched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastddim.export.bundle import BundleError, Format, read_manifest

FORMAT = Format("fastddim-kernels", 1, "kernel.json", "kernel.schema.json", "fastddim export cubin")


@dataclass(frozen=True)
class KernelBundle:
    """An opened kernel bundle, its files checked.

    Attributes:
        path: the folder.
        manifest: its description, as the schema has it (`kernel.schema.json`).
    """

    path: Path
    manifest: Mapping[str, Any]


def open_kernels(path: str | Path, *, check_hashes: bool = True) -> KernelBundle:
    """Read and check a kernel bundle. Arguments as `open_bundle`'s.

    Raises:
        BundleError: no kernel bundle, one of a newer format, or one that is damaged.
    """
    folder = Path(path)
    manifest = read_manifest(folder, FORMAT, check_hashes)
    kernels = {kernel["name"] for kernel in manifest["kernels"]}
    missing = [
        *(
            launch["kernel"]
            for plan in manifest["plans"]
            for launch in plan["launches"]
            if launch["kernel"] not in kernels
        ),
        *(
            image["file"]
            for kernel in manifest["kernels"]
            for image in kernel["images"]
            if image["file"] not in manifest["files"]
        ),
    ]
    if missing:
        raise BundleError(f"bundle: {str(folder / FORMAT.file)!r} has no {missing[0]!r}; export it again")
    return KernelBundle(folder, manifest)
