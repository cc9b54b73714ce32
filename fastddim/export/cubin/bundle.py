"""A kernel bundle: a folder with the fused step compiled for GPUs, and `kernel.json`, which says how it is launched."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fastddim.export.bundle import Folder, Format, open_folder

FORMAT = Format("fastddim-kernels", 1, "kernel.json", "cubin/kernel.schema.json", "fastddim export cubin")


@dataclass(frozen=True)
class KernelBundle(Folder):
    """An opened kernel bundle, described by `kernel.schema.json`."""

    format = FORMAT

    def missing(self) -> str | None:
        """A kernel that a plan launches and is not there, or an image that is not among the bundle's files."""
        kernels = {kernel["name"]: kernel for kernel in self.manifest["kernels"]}
        launched = (launch["kernel"] for plan in self.manifest["plans"] for launch in plan["launches"])
        images = (image["file"] for kernel in kernels.values() for image in kernel["images"])
        absent = [name for name in launched if name not in kernels]
        absent += [name for name in images if name not in self.manifest["files"]]
        return absent[0] if absent else None


def open_kernels(path: str | Path, *, check_hashes: bool = True) -> KernelBundle:
    """Read and check a kernel bundle.

    Args:
        path: the folder.
        check_hashes: read every file and compare; otherwise only names and sizes.

    Raises:
        BundleError: no kernel bundle, one of a newer format, or one that is damaged.
    """
    return open_folder(KernelBundle, path, check_hashes=check_hashes)
