"""Kernel bundles: what they say against what the compiler made, and the C++ launcher and Triton's over a stub of the driver,
with the machine in tests/ptx behind it, against the reference."""

import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import jsonschema
import pytest
import stub_cuda
import torch
from cpp_driver import ROOT, build

import damage
from cubin_runs import CASES, ROW, STEPS, VARIANTS, can_prepare, eta_of, export, make_request, make_step, vary
from fastddim import DDIMConfig, Schedule, StepTable
from fastddim.cli import main
from fastddim.export import BundleError, ExportError, KernelOptions, export_cubin, open_kernels
from fastddim.export.cubin import exporter
from fastddim.export.cubin.bundle import FORMAT
from fastddim.reference import ddim_step as reference_step
from ptx.launcher import Machine
from ptx.stub import StubDevice, serve

TOOLS = stub_cuda.HEADERS.parent / "bin"
edited, put = partial(damage.edited, name="kernel.json"), partial(damage.put, name="kernel.json")
flip_a_byte = partial(damage.flip_a_byte, name="ddim_step_kernel_0.sm_90a.cubin")
TARGETS = ["sm_80", "sm_90a", "sm_100a", "sm_120a"]


def run_without_interpreter(*command, **variables):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")])}
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=environment | variables, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="session")
def bundles(tmp_path_factory):
    """A folder with a kernel bundle of every variant."""
    folder = tmp_path_factory.mktemp("kernels")
    run_without_interpreter(ROOT / "tests" / "cubin_runs.py", "export", folder, TRITON_CACHE_DIR=str(folder / "cache"))
    return folder


@pytest.fixture(scope="session")
def by_triton(bundles):
    """A folder with what Triton's launcher, over the machine, made of every variant's tensors."""
    # The cache's keys are all that decides the code, so what the export compiled is taken where it is the same.
    run_without_interpreter(
        ROOT / "tests" / "cubin_runs.py", "launch", bundles, STUB_CUDA_RECORD=str(bundles / "record"),
        TRITON_DISABLE_LINE_INFO="1",
    )  # fmt: skip
    return bundles


@pytest.fixture(scope="session")
def machine_of(bundles):
    """The variables that put the machine behind the stub of other processes."""
    with serve(StubDevice(Machine(90, seed=0), bundles / "cache")) as variables:
        yield variables


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    """cpp/tests/step_driver.cpp and a stub driver's folder, both under sanitizers."""
    folder = tmp_path_factory.mktemp("driver")
    stub_cuda.build(folder, "clang", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    return build("checked", "step_driver") / "step_driver", folder


@pytest.fixture
def cpp(program, tmp_path):
    """Answers requests to the C++ program; returns them, and what the stub driver recorded."""

    def run(*requests, **variables):
        executable, folder = program
        record = tmp_path / "record"
        environment = os.environ | {"LD_LIBRARY_PATH": str(folder), "STUB_CUDA_RECORD": str(record)}
        text = "".join(json.dumps(request) + "\n" for request in requests)
        done = subprocess.run(
            [executable], input=text, env=environment | variables, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        lines = record.read_text().splitlines() if record.exists() else []
        return [json.loads(line) for line in done.stdout.splitlines()], [json.loads(line) for line in lines]

    return run


def manifest_of(folder, name):
    return json.loads((folder / name / "kernel.json").read_text())


def shapes_of(manifest, batch):
    (plan,) = (plan for plan in manifest["plans"] if plan["batch"] == batch)
    return {name: [STEPS if size == "num_steps" else size for size in shape] for name, shape in plan["shapes"].items()}


def arrays_of(manifest, batch):
    """Every argument of a launch, as the C++ program takes them."""
    arrays = {
        name: {"dtype": manifest["arguments"][name]["dtype"], "size": torch.Size(shape).numel()}
        for name, shape in shapes_of(manifest, batch).items()
    }
    tabled = {"table", "timesteps"} | ({"step"} if not manifest["arguments"]["step"]["written"] else set())
    return {name: None if name in tabled else array for name, array in arrays.items()}


def step_request(name, arrays, **changes):
    return {"launch": arrays, "steps": STEPS, "eta": eta_of(name), "row": ROW, **changes}


def test_the_variants_are_every_tier_argument_and_dtype(bundles):
    manifests = [manifest_of(bundles, name) for name in VARIANTS]
    tiers = {plan["tier"] for manifest in manifests for plan in manifest["plans"]}
    assert tiers == {"elements", "whole", "statistics"}
    assert {name for manifest in manifests for name in manifest["arguments"]} == set(exporter._MEANINGS)
    dtypes = {value["dtype"] for manifest in manifests for value in manifest["arguments"].values()}
    assert dtypes == {"float32", "float16", "bfloat16", "float64", "int64"}
    scratch = {name for manifest in manifests for plan in manifest["plans"] for name in plan["scratch"]}
    assert scratch == {"tickets", "counters", "statistics"}


def parameter_bytes(type_):
    return 4 if type_ == "int32" else 8


@pytest.mark.parametrize("name", VARIANTS)
def test_the_description_is_that_of_the_compiled_code(bundles, name):
    folder = bundles / name
    bundle = open_kernels(folder)
    jsonschema.Draft202012Validator.check_schema(FORMAT.schema())
    assert bundle.manifest["options"]["shape"] == list(VARIANTS[name]["shape"])
    for kernel in bundle.manifest["kernels"]:
        sizes = [parameter_bytes(parameter["type"]) for parameter in kernel["parameters"]]
        assert [image["target"] for image in kernel["images"] if image["kind"] == "cubin"] == TARGETS
        (ptx,) = (image for image in kernel["images"] if image["kind"] == "ptx")
        text = (folder / ptx["file"]).read_text()
        head = re.search(rf"\.visible \.entry {kernel['entry']}\((.*?)\)\s*\.reqntid (\d+)", text, re.DOTALL)
        kinds = re.findall(r"\.param \.u(\d+)( \.ptr \.global)?", head[1])
        assert [(int(bits) // 8, bool(pointer)) for bits, pointer in kinds] == [
            (size, parameter["type"].endswith("*")) for size, parameter in zip(sizes, kernel["parameters"], strict=True)
        ]
        assert int(head[2]) == 32 * kernel["num_warps"]
        # No path of the machine that compiled it.
        assert str(ROOT) not in text
        for image in kernel["images"]:
            path = folder / image["file"]
            if image["kind"] == "cubin":
                assert parameter_sizes(path, kernel["entry"]) == sizes
                assert str(ROOT).encode() not in path.read_bytes()


def parameter_sizes(cubin, entry):
    """What the binary itself says of its parameters."""
    dump = subprocess.run([TOOLS / "cuobjdump", "-elf", cubin], capture_output=True, text=True, check=True).stdout
    section = dump.partition(f"\n.nv.info.{entry}\n")[2].partition("\n.nv.")[0]
    found = re.findall(r"Ordinal : 0x(\w+)\s+Offset  : 0x\w+\s+Size    : 0x(\w+)", section)
    return [size for _, size in sorted((int(ordinal, 16), int(size, 16)) for ordinal, size in found)]


@pytest.mark.parametrize("target", ["sm_86", "sm_103", "sm_121"])
def test_the_ptx_is_for_later_gpus_too(bundles, tmp_path, target):
    for file in (bundles / "latents").glob("*.ptx"):
        assert ".version 8.0\n" in file.read_text()
        command = [TOOLS / "ptxas-blackwell", f"--gpu-name={target}", file, "-o", tmp_path / "kernel.cubin"]
        subprocess.run(command, check=True)
        assert parameter_sizes(tmp_path / "kernel.cubin", "ddim_step_kernel")


def close_to_the_reference(arguments, found):
    """Compare results, by their names, with those of the step in plain torch."""
    options = arguments["options"]
    x_next, x0 = reference_step(**arguments)
    expected = {"out": x_next, "x0": x0, "model_input": options.model_input, "next_timestep": options.next_timestep}
    if options.advance:
        expected["step"] = arguments["step"]
    expected = {slot: tensor for slot, tensor in expected.items() if tensor is not None}
    assert set(expected) <= set(found)
    half = {torch.float16: 2**-9, torch.bfloat16: 2**-6}
    for slot, tensor in expected.items():
        tolerance = half.get(tensor.dtype, 3e-5 if tensor.is_floating_point() else 0)
        torch.testing.assert_close(
            found[slot], tensor, rtol=tolerance, atol=tolerance, msg=lambda text, s=slot: f"{s}: {text}"
        )


def keep(arrays, tensors, folder):
    """Let the C++ program begin with these tensors, and write what became of them."""
    for slot, array in arrays.items():
        if array is not None and "same_as" not in array:
            array |= {"file": str(folder / f"{slot}.before"), "save": str(folder / f"{slot}.after")}
            (folder / f"{slot}.before").write_bytes(raw(tensors[slot]))


def kept(arrays, tensors, folder):
    """What became of them."""
    return {
        slot: torch.frombuffer(bytearray((folder / f"{slot}.after").read_bytes()), dtype=tensors[slot].dtype).view(
            tensors[slot].shape
        )
        for slot, array in arrays.items()
        if array is not None and "same_as" not in array
    }


def by_cpp(bundles, cpp, folder, name, batch, change=None, **variables):
    """The C++ program's results on a variant's tensors, its answer to the launch and the record."""
    tensors = torch.load(bundles / f"{name}-{batch}.pt")["before"]
    arrays = arrays_of(manifest_of(bundles, name), batch)
    if change is not None:
        change(arrays)
    keep(arrays, tensors, folder)
    (loaded, launched), record = cpp(
        {"load": str(bundles / name), "batch": batch}, step_request(name, arrays, stream=4711), **variables
    )
    assert "error" not in loaded and "error" not in launched, (loaded, launched)
    return kept(arrays, tensors, folder), launched, record


@pytest.mark.parametrize(("name", "batch"), CASES)
def test_tritons_launcher_takes_the_references_step(by_triton, name, batch):
    found = torch.load(by_triton / f"{name}-{batch}.pt")
    close_to_the_reference(make_step(name, batch), found["after"])
    assert ("prepared" in found) == can_prepare(name)
    arguments = make_step(name, batch)
    for (output, row), results in zip(vary(arguments), found.get("prepared", ()), strict=can_prepare(name)):
        close_to_the_reference(arguments | {"model_output": output, "step": row}, results)


def test_what_the_machine_finds_is_raised_by_tritons_launcher(by_triton):
    message = (by_triton / "error").read_text()
    assert re.match(r"Triton Error \[CUDA\]: PtxError: no memory was given at 0x", message), message


@pytest.mark.parametrize(("name", "batch"), CASES)
def test_cpp_gives_tritons_bits(by_triton, cpp, machine_of, tmp_path, name, batch):
    expected = torch.load(by_triton / f"{name}-{batch}.pt")["after"]
    found, launched, record = by_cpp(by_triton, cpp, tmp_path, name, batch, **machine_of)
    for slot, tensor in found.items():
        assert raw(tensor) == raw(expected[slot]), slot
    launches = [line for line in record if line["call"] == "launch"]
    assert {line["stream"] for line in launches} == {4711}
    schedule = Schedule(DDIMConfig())
    table = StepTable.build(schedule, schedule.pairs(STEPS), eta=eta_of(name))
    assert launched["columns"] == table.columns.ravel().tolist()
    assert launched["timesteps"] == list(table.timesteps)
    assert sorted(line["image"] for line in record if line["call"] == "unload") == sorted(
        {launch["image"] for launch in launches}
    )


@pytest.mark.parametrize(
    ("capability", "file"),
    [(80, "sm_80.cubin"), (86, "sm_80.cubin"), (89, "sm_80.cubin"), (90, "sm_90a.cubin"), (100, "sm_100a.cubin"),
     (103, "sm_80.ptx"), (120, "sm_120a.cubin"), (121, "sm_80.ptx")],
)  # fmt: skip
def test_every_gpu_gets_its_code(by_triton, cpp, machine_of, tmp_path, capability, file):
    found, _, record = by_cpp(by_triton, cpp, tmp_path, "action", 1, STUB_CUDA_CAPABILITY=str(capability), **machine_of)
    close_to_the_reference(make_step("action", 1), found)
    (image,) = (line for line in record if line["call"] == "function")
    assert Path(image["path"]).read_bytes() == (by_triton / "action" / f"ddim_step_kernel_0.{file}").read_bytes()


FAULTS = {
    r"PTX line \d+, @%p\d+ ld\.global.*: outside a tensor of 14 bytes, by": put(
        64, "plans", 0, "launches", 0, "numbers", "n"
    ),
    r"ddim_step_kernel: launched in blocks of \[32, 1, 1\] threads, and is for 64": put(1, "kernels", 0, "num_warps"),
}


@pytest.mark.parametrize("message", FAULTS)
def test_what_the_machine_finds_is_an_error_of_the_driver(bundles, cpp, machine_of, tmp_path, message):
    folder = shutil.copytree(bundles / "action", tmp_path / "action")
    FAULTS[message](folder)
    request = step_request("action", arrays_of(manifest_of(bundles, "action"), 1))
    (_, answer), _ = cpp({"load": str(folder), "batch": 1}, request, **machine_of)
    assert answer["error"] == "CudaError"
    assert re.match(rf"cuLaunchKernel: error 719 \(PtxError: {message}", answer["message"])


@pytest.mark.parametrize("capability", [75, 110])
def test_a_gpu_without_code_is_named(bundles, cpp, tmp_path, capability):
    folder = shutil.copytree(bundles / "action", tmp_path / "action")
    edited(lambda manifest: manifest["kernels"][0]["images"].pop(1))(folder)
    (answer,), _ = cpp({"load": str(folder), "batch": 1}, STUB_CUDA_CAPABILITY=str(capability))
    assert answer["error"] == "BundleError"
    assert "for sm_80, sm_90a, sm_100a, sm_120a; none runs on this GPU" in answer["message"]
    assert f"compute capability {capability // 10}.{capability % 10}" in answer["message"]


def link_out(folder):
    file = folder / "ddim_step_kernel_0.sm_90a.cubin"
    shutil.move(file, folder.parent / "elsewhere")
    file.symlink_to(folder.parent / "elsewhere")


DAMAGES = {
    "sm_90a.cubin' is not the file that was exported (SHA-256); export it again": flip_a_byte,
    "sm_90a.cubin' has 1 bytes, the manifest says": lambda folder: (
        folder / "ddim_step_kernel_0.sm_90a.cubin"
    ).write_bytes(b"x"),
    "sm_90a.cubin' is missing": lambda folder: (folder / "ddim_step_kernel_0.sm_90a.cubin").unlink(),
    "leads out of the folder": link_out,
    "kernel.json' is missing": lambda folder: (folder / "kernel.json").unlink(),
    "kernel.json' cannot be read": lambda folder: (folder / "kernel.json").write_text("{"),
    "is no manifest of a fastddim bundle": put("fastddim-bundle", "format"),
    "has format_version 2, this fastddim reads up to 1; update fastddim": put(2, "format_version"),
    "has no 'other'": put("other", "plans", 0, "launches", 0, "kernel"),
    "has no 'other.cubin'": put("other.cubin", "kernels", 0, "images", 2, "file"),
    "$.plans[0].batch": put(0, "plans", 0, "batch"),
    "$.kernels[0].num_warps": put(33, "kernels", 0, "num_warps"),
    "$.kernels[0].parameters[0].type": put("float8*", "kernels", 0, "parameters", 0, "type"),
}
# What Python's schema says in other words, or does not check.
WORDS = {"has no 'other'": "no kernel", "has no 'other.cubin'": "no file"}
CPP_DAMAGES = {
    "nothing for the parameter 'x'": put("x", "kernels", 0, "parameters", 0, "name"),
    "'n' is no int32": put(1 << 31, "plans", 0, "launches", 0, "numbers", "n"),
    "'n' is no multiple of 4": put(4, "kernels", 0, "parameters", -7, "divisible_by"),
    "no 'x' among 'arguments'": put([1], "plans", 0, "shapes", "x"),
    "'sample' is a required property": edited(lambda manifest: manifest["plans"][0]["shapes"].pop("sample")),
    "has more than 2**40 elements": put([1 << 40, 1 << 40], "plans", 0, "shapes", "sample"),
    "3 is no power of two": put(3, "kernels", 0, "parameters", -7, "divisible_by"),
    "$.plans[0].launches: no launch": put([], "plans", 0, "launches"),
    "names '../x', which leads out": put({"sha256": "", "bytes": 1}, "files", "../x"),
    "needs 300000 bytes of shared memory, this GPU has 232448": put(300000, "kernels", 0, "images", 2, "shared_bytes"),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_a_damaged_bundle_is_refused(bundles, cpp, tmp_path, message):
    folder = shutil.copytree(bundles / "action", tmp_path / "action")
    DAMAGES[message](folder)
    with pytest.raises(BundleError, match=re.escape(message)):
        open_kernels(folder)
    (answer,), record = cpp({"load": str(folder), "batch": 1})
    assert answer["error"] == "BundleError" and WORDS.get(message, message) in answer["message"]
    assert not record


@pytest.mark.parametrize("message", CPP_DAMAGES)
def test_cpp_checks_what_it_launches_by(bundles, cpp, tmp_path, message):
    folder = shutil.copytree(bundles / "action", tmp_path / "action")
    CPP_DAMAGES[message](folder)
    (answer,), record = cpp({"load": str(folder), "batch": 1})
    assert answer["error"] == "BundleError" and message in answer["message"]
    assert not record


def changed(name, **values):
    def change(arrays):
        arrays[name] = {**(arrays[name] or {}), **values}

    return change


# By the message: what is wrong with the arguments of "latents" at batch 6.
REFUSALS = {
    "sample: 6143 elements of float32; pass float32 [6, 4, 16, 16]": changed("sample", size=6143),
    "sample: 6144 elements of float16; pass float32 [6, 4, 16, 16]": changed("sample", dtype="float16"),
    "model_output: not given; pass bfloat16 [12, 4, 16, 16]": lambda arrays: arrays.pop("model_output"),
    "noise: given, but these kernels do not take it; leave it out": lambda arrays: arrays.update(
        noise={"dtype": "float32", "size": 6144}
    ),
    "model_output: its address is no multiple of 16 bytes": changed("model_output", shift=2),
    "step: its address is no multiple of 8 bytes": changed("step", dtype="int64", size=1, shift=4),
    "table: 31 elements of float64; pass float64 [num_steps, 6]": changed("table", dtype="float64", size=31),
    "table: 0 elements of float64; pass float64 [num_steps, 6]": changed("table", dtype="float64", size=0),
    "out: shares memory with sample": changed("out", same_as="sample", shift=16),
    "out: shares memory with model_output": changed("out", same_as="model_output"),
    "out: shares memory with model_input": changed("model_input", same_as="out"),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_wrong_arguments_are_named(bundles, cpp, message):
    arrays = arrays_of(manifest_of(bundles, "latents"), 6)
    REFUSALS[message](arrays)
    (loaded, answer), record = cpp({"load": str(bundles / "latents"), "batch": 6}, step_request("latents", arrays))
    assert "error" not in loaded
    assert answer["error"] == "invalid_argument" and answer["message"].startswith(message)
    assert not [line for line in record if line["call"] == "launch"]


def test_a_step_may_be_in_place(by_triton, cpp, machine_of, tmp_path):
    found, _, _ = by_cpp(
        by_triton, cpp, tmp_path, "latents", 6, lambda arrays: arrays["out"].update(same_as="sample"), **machine_of
    )
    assert torch.equal(found["sample"], torch.load(by_triton / "latents-6.pt")["after"]["out"])


def test_a_batch_or_row_that_is_not_there_is_named(bundles, cpp):
    folder = bundles / "latents"
    arrays = arrays_of(manifest_of(bundles, "latents"), 6)
    (batch, _, row, none), _ = cpp(
        {"load": str(folder), "batch": 4},
        {"load": str(folder), "batch": 6},
        step_request("latents", arrays, row=STEPS),
        step_request("latents", arrays, steps=0),
    )
    assert (
        batch["message"].startswith("batch: 4; ") and "kernels for 1, 6; export it with --batch 4" in batch["message"]
    )
    assert row["message"] == f"step: {STEPS} is outside the table of {STEPS} steps"
    assert none["message"] == "table: 0 timesteps and 0 rows; pass as many of both, at least one"


def test_much_shared_memory_is_asked_for(bundles, cpp, tmp_path):
    folder = shutil.copytree(bundles / "action", tmp_path / "action")
    put(60000, "kernels", 0, "images", 2, "shared_bytes")(folder)
    _, record = cpp(
        {"load": str(folder), "batch": 1}, step_request("action", arrays_of(manifest_of(bundles, "action"), 1))
    )
    (attribute,) = (line for line in record if line["call"] == "attribute")
    (launch,) = (line for line in record if line["call"] == "launch")
    # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    assert (attribute["attribute"], attribute["value"], launch["shared"]) == (8, 60000, 60000)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("cuInit:100", r"cuInit: error 100 \(an error of the stub driver\)"),
        ("cuModuleLoadData:209", r"cuModuleLoadData of '.*sm_90a\.cubin': CUDA_ERROR_NO_BINARY_FOR_GPU \("),
        ("cuModuleGetFunction:500", "cuModuleGetFunction of 'ddim_step_kernel' in '.*': error 500"),
        ("cuMemAlloc:2", "cuMemAlloc of .* bytes: error 2"),
        ("cuLaunchKernel:1", "cuLaunchKernel: error 1"),
    ],
)
def test_what_the_driver_says_is_passed_on(bundles, cpp, fault, message):
    manifest = manifest_of(bundles, "captured")
    answers, _ = cpp(
        {"load": str(bundles / "captured"), "batch": 3},
        step_request("captured", arrays_of(manifest, 3)),
        STUB_CUDA_FAIL=fault,
    )
    failed = next(answer for answer in answers if "error" in answer)
    assert failed["error"] == "CudaError" and re.match(message, failed["message"])


def test_a_missing_driver_or_one_without_a_function_is_named(cpp, tmp_path):
    (tmp_path / "empty.c").write_text("int empty;")
    subprocess.run(["gcc", "-shared", "-fPIC", tmp_path / "empty.c", "-o", tmp_path / "libold.so"], check=True)
    (missing, old), _ = cpp({"driver": "libnone.so.1"}, {"driver": str(tmp_path / "libold.so")})
    assert missing["error"] == old["error"] == "CudaError"
    assert re.match(r"CUDA driver: libnone\.so\.1: .*; install the NVIDIA driver", missing["message"])
    assert old["message"].endswith("libold.so has no cuInit; update the driver")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": ()}, "shape: empty"),
        ({"shape": (4, 0)}, "shape: 0; pass an integer >= 1"),
        ({"shape": (4,), "batches": ()}, "batches: ()"),
        ({"shape": (4,), "batches": (2, 2)}, "batches: (2, 2); pass one or more sizes, none twice"),
        ({"shape": (65536, 32768)}, "shape: (65536, 32768) has 2147483648 elements; pass fewer than 2**31"),
        ({"shape": (4,), "model_dtype": "float64"}, "model_dtype: 'float64' is not one of"),
        ({"shape": (4,), "noise": "some"}, "noise: 'some' is not one of"),
        ({"shape": (4,), "guidance_rescale": True}, "guidance_rescale: True without guided; pass both"),
        ({"shape": (4,), "guidance_method": "cfg++"}, "guidance_method: 'cfg++' without guided; pass both"),
    ],
)
def test_options_that_cannot_be_are_named(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        KernelOptions(**options)


def test_timesteps_are_of_the_tables_dtype(tmp_path):
    options = "fastddim.export.KernelOptions(shape=(4, 6), advance=True, timestep_dtype='float32')"
    code = f"import fastddim.export, sys; fastddim.export.export_cubin(sys.argv[1], {options})"
    run_without_interpreter("-c", code, tmp_path / "kernels")
    arguments = open_kernels(tmp_path / "kernels").manifest["arguments"]
    assert {arguments[name]["dtype"] for name in ("timesteps", "next_timestep")} == {"float32"}
    assert arguments["step"]["dtype"] == "int64"
    with pytest.raises(ValueError, match="timestep_dtype: 'float32' without advance"):
        KernelOptions(shape=(4, 6), timestep_dtype="float32")
    with pytest.raises(ValueError, match="timestep_dtype: 'float16' is not one of 'int64', 'float32'"):
        KernelOptions(shape=(4, 6), advance=True, timestep_dtype="float16")


def test_nothing_is_left_of_an_export_that_fails(tmp_path, monkeypatch):
    options = KernelOptions(shape=(4,))
    monkeypatch.setattr(exporter.triton.knobs.runtime, "interpret", True)
    with pytest.raises(ExportError, match="TRITON_INTERPRET: set"):
        export_cubin(tmp_path / "kernels", options)
    monkeypatch.setattr(exporter.triton.knobs.runtime, "interpret", False)

    def fill(folder, _):
        (folder / "kernel.cubin").write_bytes(b"half")
        raise ExportError("ddim_step_kernel: does not compile")

    monkeypatch.setattr(exporter, "_fill", fill)
    with pytest.raises(ExportError, match="does not compile"):
        export_cubin(tmp_path / "kernels", options)
    assert not list(tmp_path.iterdir())
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="exists; pass another folder"):
        export_cubin(tmp_path / "kernels", options)
    with pytest.raises(FileExistsError, match="is no bundle"):
        export_cubin(tmp_path / "kernels", options, force=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing option '--shape'. See fastddim export cubin --help."),
        (["--shape", "4x6", "--steps", "3"], "No such option: --steps"),
        (["--shape", "4x6", "model"], "unexpected extra argument"),
        (["--shape", "4xa"], "--shape: 'a'"),
        (["--shape", "4x6", "--noise", "given,drawn"], "--noise: 'given,drawn' is not one of 'none', 'given', 'drawn'"),
        (["--shape", "4x6", "--guidance-rescale"], "--guidance-rescale: True without --guidance; pass both"),
        (["--shape", "4x6", "--guidance-method", "apg"], "--guidance-method: 'apg' without --guidance; pass both"),
        (
            ["--shape", "4x6", "--guidance", "--guidance-method", "cfg,apg_eta=0.5"],
            "apg_eta: 0.5 with --guidance-method 'cfg'",
        ),
        (["--shape", "4x6", "--limit", "clip=x"], "--limit: 'clip=x'"),
        (["--shape", "4x6", "--limit", "threshold=2:2"], "--limit: 'threshold=2:2'"),
        (
            ["--shape", "4x6", "--limit", "threshold=0.9"],
            "--limit: 'threshold=0.9' (threshold takes ratio and max_value)",
        ),
        (["--shape", "4x6", "--limit", "clamp=1"], "'clamp' is not one of 'clip', 'threshold'"),
    ],
)
def test_the_command_names_what_is_wrong(arguments, message, tmp_path, capsys):
    assert main(["export", "cubin", "--out", str(tmp_path / "kernels"), *arguments]) != 0
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_command_exports(tmp_path):
    command = ["-m", "fastddim", "export", "cubin", "--shape", "1x8x8", "--batch", "1,2", "--guidance",
               "--limit", "threshold=0.9:1", "--dtype", "float16"]  # fmt: skip
    for repeat in ([], ["--force"]):
        run_without_interpreter(
            *command, "--out", tmp_path / "kernels", *repeat, TRITON_CACHE_DIR=str(tmp_path / "cache")
        )
        manifest = open_kernels(tmp_path / "kernels").manifest
        assert [plan["batch"] for plan in manifest["plans"]] == [1, 2]
        assert manifest["arguments"]["model_output"]["dtype"] == "float16"
        assert manifest["kernels"][0]["constants"]["LIMIT"] == "clip"


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "batch"), CASES)
def test_on_a_gpu_cpp_gives_tritons_bits(name, batch, tmp_path):
    export(name, tmp_path)
    request, tensors = make_request(name, batch, "cuda")
    manifest = manifest_of(tmp_path, name)
    arrays = arrays_of(manifest, batch)
    keep(arrays, tensors, tmp_path)
    request.run()
    executable = build("kernels", "step_driver") / "step_driver"
    requests = [{"load": str(tmp_path / name), "batch": batch}, step_request(name, arrays)]
    text = "".join(json.dumps(request) + "\n" for request in requests)
    done = subprocess.run([executable], input=text, capture_output=True, text=True, check=True)
    assert "error" not in done.stdout, done.stdout
    for slot, array in arrays.items():
        if array is not None:
            assert (tmp_path / f"{slot}.after").read_bytes() == raw(tensors[slot]), slot


def raw(tensor):
    return (
        tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes() if tensor.ndim else tensor.cpu().numpy().tobytes()
    )
