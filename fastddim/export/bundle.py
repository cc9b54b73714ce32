"""A bundle: a folder with the exported graph, `manifest.json` that says what is in it, and a note for the integrator.

No torch here: a server's host code needs numpy and a runtime alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, TypeVar

import numpy as np
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from fastddim.coefficients import StepTable
from fastddim.config import LIMITS, DDIMConfig, Limit, limit_name
from fastddim.export.runtime import get_runtime, public_name
from fastddim.files import check_folder
from fastddim.samplers.sampling import Sampling

_HASH_BLOCK = 1 << 20


@dataclass(frozen=True)
class Format:
    """A kind of bundle.

    Attributes:
        name, version: as its manifest says; later versions are not read.
        file: the manifest.
        schema_file: its JSON schema, in the folder of `fastddim.export`.
        command: the command that writes such a bundle.
    """

    name: str
    version: int
    file: str
    schema_file: str
    command: str

    def schema(self) -> dict[str, Any]:
        """The JSON schema of the manifest."""
        text = resources.files("fastddim.export").joinpath(self.schema_file).read_text("utf-8")
        schema: dict[str, Any] = json.loads(text)
        return schema


FORMAT = Format("fastddim-bundle", 3, "manifest.json", "manifest.schema.json", "fastddim export onnx")


class BundleError(ValueError):
    """A bundle that cannot be read; the message names the folder, the file and what is wrong."""


@dataclass(frozen=True)
class Folder:
    """An opened bundle of any format, its files checked.

    Attributes:
        format: what its manifest looks like.
        path: the folder.
        manifest: its description, as the format's schema has it.
    """

    format: ClassVar[Format]

    path: Path
    manifest: Mapping[str, Any]

    def missing(self) -> str | None:
        """What one part of the manifest names and no other part describes; None where all is there."""
        return None


AnyFolder = TypeVar("AnyFolder", bound=Folder)


@dataclass(frozen=True)
class Bundle(Folder):
    """An opened bundle of a model and its sampler, described by `manifest.schema.json`."""

    format = FORMAT

    def missing(self) -> str | None:
        """A graph's file that is not among the bundle's files, or an input that is to take what `before` computes."""
        before = [] if self.before is None else [self.before]
        named = (str(described["model"]) for described in (self.manifest, *self.components.values(), *before))
        computed = (item["name"] for described in before for item in described["outputs"])
        inputs = self.names("inputs")
        absent = (name for name in computed if name not in inputs)
        return next((name for name in named if name not in self.manifest["files"]), None) or next(absent, None)

    @property
    def kind(self) -> str:
        """`"loop"`, a file that takes all steps, or `"step"`, one that takes one."""
        return str(self.manifest["kind"])

    @property
    def runtime(self) -> str:
        """The name of what runs the file, such as `"onnx"`."""
        return str(self.manifest["runtime"])

    @property
    def scheduling(self) -> Sampling | None:
        """The schedule and the method that tables are made by; None for a bundle made from a table."""
        return None if self.manifest["schedule"] is None else Sampling.from_record(self.manifest, self.limit)

    @property
    def limit(self) -> Limit:
        """What keeps the predicted x0 in range."""
        return read_limit(self.manifest)

    @property
    def table(self) -> StepTable:
        """The default run; its timesteps are of the dtype that the graph takes."""
        table = self.manifest["table"]
        dtypes = {name: item["dtype"] for name, item in self.taken.items()}
        # A baked schedule has no such input: there the numbers say it.
        dtype = dtypes.get("timesteps", dtypes.get("timestep"))
        built = StepTable.from_columns(
            np.array(table["timesteps"], dtype=np.float64 if dtype == "float32" else None),
            table["coefficients"],
            start_scale=table["start_scale"],
            noising=table["noising"],
        )
        if dtype is not None and built.timestep_dtype != dtype:
            raise ValueError(f"timesteps: {built.timestep_dtype}, but the graph takes {dtype}")
        return built

    @property
    def device(self) -> str:
        """What the file was compiled for, `"cpu"` or `"cuda"`; the CPU where it is not compiled."""
        return str(self.manifest.get("target", {}).get("device", "cpu"))

    @property
    def model_path(self) -> Path:
        """The graph's file."""
        return self.path / str(self.manifest["model"])

    @property
    def any_size(self) -> bool:
        """Whether heights and widths may differ from call to call."""
        return any("height" in item["shape"] for item in self.manifest["inputs"])

    @property
    def components(self) -> Mapping[str, Any]:
        """The graphs beside the sampler's, by name: empty but for a whole pipeline."""
        found: Mapping[str, Any] = self.manifest.get("components", {})
        return found

    @property
    def before(self) -> Mapping[str, Any] | None:
        """The graph that computes values for all steps of a run; None but for a file of one step that takes their rows."""
        found: Mapping[str, Any] | None = self.manifest.get("before")
        return found

    @property
    def before_path(self) -> Path:
        """The file of that graph."""
        assert self.before is not None
        return self.path / str(self.before["model"])

    @property
    def taken(self) -> Mapping[str, Any]:
        """The inputs of the graph, and of the one before its steps, by name."""
        before = () if self.before is None else self.before["inputs"]
        return {item["name"]: item for item in (*before, *self.manifest["inputs"])}

    def component_path(self, name: str) -> Path:
        """The file of a component's graph."""
        return self.path / str(self.components[name]["model"])

    def names(self, group: str) -> list[str]:
        """Names of the `"inputs"` or `"outputs"`."""
        return [item["name"] for item in self.manifest[group]]


def limit_record(limit: Limit) -> dict[str, Any] | None:
    """A limit as a manifest has it; None without one."""
    return None if limit is None else {"kind": limit_name(limit), **asdict(limit)}


def read_limit(manifest: Mapping[str, Any]) -> Limit:
    """What keeps the predicted x0 in range, by a manifest.

    Raises:
        ValueError: numbers that are out of range.
    """
    values = dict(manifest["sampling"]["limit"] or {})
    return LIMITS[values.pop("kind")](**values) if values else None


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def check_destination(path: str | Path, force: bool, format: Format = FORMAT) -> Path:
    """The absolute path of a bundle to write, before the work.

    Raises:
        FileExistsError: something is there, and `force` is off or it is no bundle.
        NotADirectoryError, PermissionError: the folder it goes to is none, or cannot be written to.
    """
    target = Path(path).expanduser().absolute()
    check_folder(target.parent, "out")
    if target.exists() or target.is_symlink():
        if not force:
            raise FileExistsError(f"out: {str(target)!r} exists; pass another folder, or --force to replace it")
        if not (target / format.file).is_file() and any(target.iterdir() if target.is_dir() else [target]):
            raise FileExistsError(
                f"out: {str(target)!r} is no bundle, so --force does not replace it; remove it yourself"
            )
    return target


def write_bundle(
    path: Path,
    force: bool,
    fill: Callable[[Path], Mapping[str, Any]],
    opened: type[AnyFolder] = Bundle,  # type: ignore[assignment]
) -> AnyFolder:
    """Write a bundle whole or not at all.

    Args:
        path: from `check_destination`.
        force: replace the bundle there.
        fill: writes the files to a folder and returns the manifest without `files`.
        opened: the class of what is returned, whose format is written.
    """

    def fill_whole(temporary: Path) -> None:
        manifest = dict(fill(temporary))
        manifest["files"] = {
            str(PurePosixPath(file.relative_to(temporary))): {"sha256": sha256(file), "bytes": file.stat().st_size}
            for file in sorted(temporary.rglob("*"))
            if file.is_file()
        }
        text = json.dumps(manifest, indent=1, allow_nan=False)
        (temporary / opened.format.file).write_text(text + "\n", "utf-8")

    write_folder(path, force, fill_whole)
    return open_folder(opened, path)


def write_folder(path: Path, force: bool, fill: Callable[[Path], None], workplace: Path | None = None) -> None:
    """Write a folder whole or not at all.

    Args:
        path: the folder to be.
        force: replace the one there.
        fill: writes the files to a folder.
        workplace: where that folder is until it is whole, on the same file system; beside `path` by default.
    """
    beside = path.parent if workplace is None else workplace
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=beside))
    try:
        fill(temporary)
        os.chmod(temporary, 0o755)
        if force and path.exists():
            # Out of the way first: renaming onto a folder that is not empty fails.
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=beside))
            os.replace(path, old / path.name)
            os.replace(temporary, path)
            shutil.rmtree(old)
        else:
            os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def open_bundle(path: str | Path, *, check_hashes: bool = True) -> Bundle:
    """Read and check a bundle.

    Args:
        path: the folder.
        check_hashes: read every file and compare; otherwise only names and sizes.

    Raises:
        BundleError: no bundle, one of a newer format, or one that is damaged.
    """
    bundle = open_folder(Bundle, path, check_hashes=check_hashes)
    file = str(bundle.path / FORMAT.file)
    try:
        get_runtime(bundle.runtime)
    except ValueError as error:
        raise BundleError(f"bundle: {file!r}: {error}") from error
    for name in ("scheduling", "limit", "table"):
        try:
            getattr(bundle, name)
        except (TypeError, ValueError) as error:
            raise BundleError(f"bundle: {file!r}: {name}: {error}; export it again") from error
    return bundle


def open_folder(opened: type[AnyFolder], path: str | Path, *, check_hashes: bool = True) -> AnyFolder:
    """Read and check a bundle of the format of a class, as `open_bundle` does."""
    folder = Path(path)
    file = folder / opened.format.file
    if not file.is_file():
        raise BundleError(f"bundle: {str(file)!r} is missing; pass a folder that `fastddim export` wrote")
    try:
        manifest: dict[str, Any] = json.loads(file.read_text("utf-8"))
    # Nested too deep is a RecursionError.
    except (ValueError, OSError, RecursionError) as error:
        raise BundleError(f"bundle: {str(file)!r} cannot be read: {error}; export it again") from error
    manifest = _check_manifest(file, manifest, opened.format)
    for name, expected in manifest["files"].items():
        member = folder / name
        outside = PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name
        if outside or member.is_symlink() or not member.resolve().is_relative_to(folder.resolve()):
            raise BundleError(f"bundle: {str(file)!r} names {name!r}, which leads out of the folder; export it again")
        if not member.is_file():
            raise BundleError(f"bundle: {str(member)!r} is missing; export it again")
        size = member.stat().st_size
        if size != expected["bytes"]:
            raise BundleError(
                f"bundle: {str(member)!r} has {size} bytes, the manifest says {expected['bytes']}; export it again"
            )
        if check_hashes and sha256(member) != expected["sha256"]:
            raise BundleError(f"bundle: {str(member)!r} is not the file that was exported (SHA-256); export it again")
    read = opened(folder, manifest)
    missing = read.missing()
    if missing is not None:
        raise BundleError(f"bundle: {str(file)!r} has no {missing!r}; export it again")
    return read


def require_runtime(bundle: Bundle, runtime: str) -> None:
    """Check that a bundle is of a runtime.

    Raises:
        BundleError: a bundle of another one; the message names the class that runs it.
    """
    if bundle.runtime != runtime:
        sampler = get_runtime(bundle.runtime).sampler
        fix = "" if sampler is None else f"; run it with {public_name(sampler)}"
        raise BundleError(f"bundle: {str(bundle.path)!r} is of runtime {bundle.runtime!r}, not {runtime!r}{fix}")


def _check_manifest(file: Path, manifest: Any, format: Format) -> dict[str, Any]:
    """A manifest of the newest version, its format and version checked, then everything that the schema asks for."""
    if not isinstance(manifest, dict) or manifest.get("format") != format.name:
        raise BundleError(f"bundle: {str(file)!r} is no manifest of a fastddim bundle")
    version = manifest.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise BundleError(
            f"bundle: {str(file)!r} has format_version {version!r}, this fastddim reads from 1 up to"
            f" {format.version}; write it anew: `{format.command} --out ...`"
        )
    if version > format.version:
        raise BundleError(
            f"bundle: {str(file)!r} has format_version {version}, this fastddim reads up to {format.version}; update"
            " fastddim"
        )
    if version < format.version:
        manifest = _upgrade(file, manifest)
    error = best_match(Draft202012Validator(format.schema()).iter_errors(manifest))
    if error is not None:
        raise BundleError(f"bundle: {str(file)!r}: {error.json_path}: {error.message}; export it again")
    checked: dict[str, Any] = manifest
    return checked


def _upgrade(file: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A bundle's manifest of version 1 or 2 as version 3 has it; what it lacks, the schema finds."""
    upgraded: dict[str, Any] = {**manifest, "format_version": FORMAT.version}
    schedule, sampling = upgraded.get("schedule"), upgraded.get("sampling")
    added: dict[str, dict[str, Any]] = {}
    if manifest["format_version"] == 1:
        upgraded["kind"] = upgraded.pop("graph", None)
        upgraded.setdefault("runtime", "onnx")
        added["table"] = {"start_scale": 1.0, "noising": None}
        if isinstance(schedule, dict):
            try:
                added["sampling"] = {"limit": limit_record(DDIMConfig.from_dict(schedule).limit)}
            except (TypeError, ValueError) as error:
                raise BundleError(f"bundle: {str(file)!r}: schedule: {error}; export it again") from error
    for name, fields in added.items():
        if isinstance(upgraded.get(name), dict):
            upgraded[name] = {**upgraded[name], **fields}
    upgraded |= {"schedule_type": None, "method": None}
    if isinstance(schedule, dict) and isinstance(sampling, dict):
        options = {name: sampling[name] for name in ("eta", "use_clipped_model_output") if name in sampling}
        upgraded |= {"schedule_type": "betas", "method": {"name": "ddim", "options": options, "spacing": None}}
    return upgraded
