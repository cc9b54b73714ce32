"""The command line: exit statuses, one-line errors before any work, and the pictures it writes."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import fastddim
from fastddim.cli import main
from fastddim.pictures import GridLayout, make_grid, save_picture
from unets import small_unet

ROOT = Path(__file__).parent.parent


def tiny_pipeline(classes: int | None = 4, channels: int = 1) -> fastddim.DDIMPipeline:
    torch.manual_seed(0)
    unet = small_unet(in_channels=channels, out_channels=channels, num_class_embeds=classes)
    return fastddim.DDIMPipeline(unet, fastddim.DDIMScheduler(num_train_timesteps=1000))


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Tiny model folders: three classes and the null one; no classes; four channels, which are no picture."""
    root = tmp_path_factory.mktemp("models")
    models = {"classes": tiny_pipeline(), "plain": tiny_pipeline(None, 3), "latent": tiny_pipeline(None, 4)}
    for name, pipeline in models.items():
        pipeline.save_pretrained(root / name)
    return {name: str(root / name) for name in models}


@dataclass
class Result:
    status: int
    out: str
    err: str


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Runs a command in an empty folder, without a network."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the network was used")

    monkeypatch.chdir(tmp_path)
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)

    def call(*arguments: object) -> Result:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        return Result(status, *capsys.readouterr())

    return call


Run = Callable[..., Result]


def pixels(path: str | Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def test_version_and_help(run: Run) -> None:
    assert run("--version") == Result(0, f"fastddim {fastddim.__version__}\n", "")
    for arguments in ([], ["--help"]):
        result = run(*arguments)
        assert result.status == 0 and all(name in result.out for name in ("sample", "invert", "interpolate", "info"))
    result = run("sample", "--help")
    assert result.status == 0 and "--guidance-rescale" in result.out


def test_help_loads_no_torch() -> None:
    script = "import sys, fastddim.cli as c; c.main(['sample', '--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=300, capture_output=True).returncode == 0


def test_embedded_model_samples_ten_digits(run: Run) -> None:
    result = run("sample", "--num-images", 10, "--steps", 5)
    assert (result.status, result.err) == (0, "")
    assert "'grid.png': 10 images, " in result.out and "s per image on" in result.out
    layout = GridLayout.plan(10, 16, 16, range(10))
    assert pixels("grid.png").shape == layout.size[::-1]
    for column in range(10):
        x, y = layout.corner(0, column)
        assert pixels("grid.png")[y : y + 48, x : x + 48].std() > 20


def test_embedded_model_is_the_default_for_json_too(run: Run) -> None:
    result = run("sample", "--num-images", 20, "--steps", 2, "--json")
    assert result.status == 0
    summary = json.loads(result.out)
    assert summary["labels"] == [*range(10), *range(10)] and summary["guidance_scale"] == 2.0


def test_json(run: Run, folders: dict[str, str]) -> None:
    result = run(
        *("sample", "--model", folders["classes"], "--num-images", 7, "--steps", 3, "--eta", 0.5, "--seed", 11),
        *("--guidance-scale", 3, "--guidance-rescale", 0.7, "--labels", "2, 0", "--batch-size", 2),
        *("--out", "some.png", "--device", "cpu", "--json"),
    )
    assert (result.status, result.err) == (0, "")
    summary = json.loads(result.out)
    seconds = summary.pop("seconds")
    assert seconds > 0 and summary.pop("seconds_per_image") == pytest.approx(seconds / 7)
    assert summary == {
        "path": "some.png",
        "num_images": 7,
        "steps": 3,
        "eta": 0.5,
        "guidance_scale": 3.0,
        "guidance_rescale": 0.7,
        "guidance_method": "cfg",
        "method": "ddim",
        "seed": 11,
        "device": "cpu",
        "labels": [2, 0, 2, 0, 2, 0, 2],
    }
    assert os.listdir() == ["some.png"]


def test_latents_are_decoded(run: Run, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vqvae = diffusers.VQModel(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2, num_vq_embeddings=16, latent_channels=3,
    ).eval()  # fmt: skip
    unet = small_unet(in_channels=3, out_channels=3).eval()
    pipe = diffusers.LDMPipeline(vqvae, unet, diffusers.DDIMScheduler(clip_sample=False))
    pipe.save_pretrained(tmp_path / "ldm")
    assert run("sample", "--model", "ldm", "--num-images", 2, "--steps", 2, "--device", "cpu").status == 0
    latents = fastddim.Sampler(unet, pipe.scheduler, 2)(2, seeds=0)
    with torch.no_grad():
        expected = vqvae.decode(latents / vqvae.config.scaling_factor).sample
    save_picture(make_grid(expected), "expected.png")
    np.testing.assert_allclose(pixels("grid.png").astype(float), pixels("expected.png"), atol=1)
    assert run("interpolate", "--model", "ldm", "--num", 2, "--steps", 2, "--device", "cpu").status == 0
    result = run("invert", "expected.png", "--model", "ldm", "--device", "cpu")
    assert result.status == 2 and "--model: LDMPipeline samples latents" in result.err
    result = run("export", "onnx", "ldm", "--out", "bundle")
    assert result.status == 2 and "model: LDMPipeline has encoders or a decoder that are not exported" in result.err
    assert result.err.count("--sampler-only") == 1 and not Path("bundle").exists()


@pytest.mark.parametrize("method", ["auto", "dpmsolver++"])
def test_the_default_steps_fit_a_short_schedule(run: Run, method: str) -> None:
    scheduler = fastddim.DDIMScheduler(num_train_timesteps=3)
    fastddim.DDIMPipeline(tiny_pipeline().unet, scheduler).save_pretrained("short")
    common = ("--model", "short", "--device", "cpu", "--json")
    result = run("sample", *common, "--num-images", 1, "--method", method)
    # diffusers' "leading" leaves DPM-Solver++ no more.
    assert json.loads(result.out)["steps"] == (3 if method == "auto" else 2)
    if method == "auto":
        for command in (("interpolate", "--num", 2), ("invert", "grid.png")):
            assert json.loads(run(*command, *common).out)["steps"] == 3


@pytest.mark.slow
def test_the_weights_of_a_variant(run: Run, tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    pipeline.save_pretrained("half", variant="fp16")
    arguments = ("--model", "half", "--num-images", 1, "--steps", 1, "--device", "cpu")
    assert run("sample", *arguments, "--variant", "fp16").status == 0
    for variant in ((), ("--variant", "ema")):
        result = run("sample", *arguments, *variant)
        assert result.status == 2 and result.err.startswith("error: --variant: ") and "'fp16'; pass that" in result.err
    result = run("export", "onnx", "half", "--out", "bundle")
    assert result.status == 2 and result.err.startswith("error: --variant: None, but ")
    assert run("export", "onnx", "half", "--variant", "fp16", "--out", "bundle", "--parity-steps", 1).status == 0


def test_defaults_of_a_model_with_classes(run: Run, folders: dict[str, str]) -> None:
    result = run("sample", "--model", folders["classes"], "--steps", 2, "--num-images", 9, "--device", "cpu", "--json")
    summary = json.loads(result.out)
    assert summary["labels"] == [0, 1, 2] * 3 and summary["guidance_scale"] == 2.0 and summary["eta"] == 0
    assert pixels("grid.png").shape == GridLayout.plan(9, 8, 8, [0, 1, 2] * 3).size[::-1]


def test_defaults_of_a_model_without_classes(run: Run, folders: dict[str, str]) -> None:
    result = run("sample", "--model", folders["plain"], "--steps", 2, "--num-images", 3, "--device", "cpu", "--json")
    summary = json.loads(result.out)
    assert summary["labels"] is None and summary["guidance_scale"] is None
    assert pixels("grid.png").shape == (*GridLayout.plan(3, 8, 8).size[::-1], 3)


@pytest.mark.parametrize(
    ("given", "options"),
    [
        (["--guidance-method", "cfg++"], {"guidance_method": "cfg++", "guidance_scale": 0.6}),
        (["--guidance-method", "cfg++", "--guidance-scale", 1], {"guidance_method": "cfg++", "guidance_scale": 1.0}),
        (
            ["--guidance-method", "apg,apg_eta=0.5,apg_norm_threshold=2"],
            {"guidance_method": "apg", "guidance_scale": 2.0, "apg_eta": 0.5, "apg_norm_threshold": 2.0},
        ),
    ],
)
def test_guidance_methods(run: Run, folders: dict[str, str], given: list[Any], options: dict[str, Any]) -> None:
    command = ("sample", "--model", folders["classes"], "--steps", 3, "--num-images", 3, "--device", "cpu", "--json")
    result = run(*command, *given)
    assert result.status == 0, result.err
    summary = json.loads(result.out)
    assert {name: summary[name] for name in ("guidance_method", "guidance_scale")} == {
        name: options[name] for name in ("guidance_method", "guidance_scale")
    }
    pipeline, labels = tiny_pipeline(), torch.tensor([0, 1, 2])
    sampler = fastddim.Sampler(pipeline.unet, pipeline.scheduler, 3, **options)
    images = sampler(3, seeds=0, class_labels=labels, uncond_kwargs={"class_labels": torch.full_like(labels, 3)})
    layout, picture = GridLayout.plan(3, 8, 8, [0, 1, 2]), pixels("grid.png").astype(float)
    for row, indices in enumerate(layout.rows):
        for column, index in enumerate(indices):
            x, y = layout.corner(row, column)
            tile = picture[y : y + 48 : 6, x : x + 48 : 6]
            assert np.abs(tile - (images[index, 0].clamp(-1, 1).numpy() + 1) * 127.5).max() < 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--guidance-method", "cfgpp"], "--guidance-method: 'cfgpp' is not one of 'cfg', 'cfg++', 'apg'"),
        (
            ["--guidance-method", "cfg,apg_eta=0.5"],
            "apg_eta: 0.5 with --guidance-method 'cfg'; pass --guidance-method 'apg', or leave it out",
        ),
        (["--method", "dpmsolver++,lower_order_final=no"], "lower_order_final: 'no'; pass True or False"),
        # Its value is taken.
        (["--method", "dpmsolver++,lower_order_final=False,solver_order=3"], "solver_order: 3; pass 1 or 2"),
        (
            ["--guidance-method", "cfg++", "--method", "lcm"],
            "--guidance-method: 'cfg++' with --method 'lcm', whose",
        ),
        (
            ["--guidance-method", "apg,apg_eta=2", "--guidance-scale", 0.5],
            "apg_eta: 2; pass a number in [0, 1]",
        ),
        (
            ["--guidance-method", "apg,eta=2"],
            "--guidance-method: 'eta' is not one of 'apg_eta', 'apg_norm_threshold'",
        ),
    ],
)
def test_guidance_methods_that_cannot_be(run: Run, folders: dict[str, str], given: list[Any], message: str) -> None:
    result = run("sample", "--model", folders["classes"], "--steps", 3, "--num-images", 3, "--device", "cpu", *given)
    assert result.status == 2 and message in result.err


@pytest.mark.parametrize("scale", [1, 3])
def test_picture_holds_the_sampler_s_images(run: Run, folders: dict[str, str], scale: int) -> None:
    assert run(
        *("sample", "--model", folders["classes"], "--steps", 3, "--num-images", 6, "--seed", 5, "--eta", 1),
        *("--guidance-scale", scale, "--batch-size", 4, "--device", "cpu"),
    ).status == 0  # fmt: skip
    pipeline = tiny_pipeline()
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    guided: dict[str, Any] = {"uncond_kwargs": {"class_labels": torch.full_like(labels, 3)}} if scale > 1 else {}
    sampler = fastddim.Sampler(
        pipeline.unet, pipeline.scheduler, 3, eta=1.0, guidance_scale=float(scale) if scale > 1 else None
    )
    images = sampler(6, seeds=range(5, 11), class_labels=labels, **guided)
    layout, picture = GridLayout.plan(6, 8, 8, labels.tolist()), pixels("grid.png").astype(float)
    for row, indices in enumerate(layout.rows):
        assert {int(labels[index]) for index in indices} == {row}
        for column, index in enumerate(indices):
            x, y = layout.corner(row, column)
            tile = picture[y : y + 48 : 6, x : x + 48 : 6]
            # The batches differ, and with them the model's last bits.
            assert np.abs(tile - (images[index, 0].clamp(-1, 1).numpy() + 1) * 127.5).max() < 1


def test_seed_decides_the_bytes(run: Run, folders: dict[str, str]) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        common = ("sample", "--model", folders["plain"], "--steps", 2, "--num-images", 4, "--device", "cpu")
        assert run(*common, "--seed", seed, "--out", f"{name}.png").status == 0
    contents = {name: Path(f"{name}.png").read_bytes() for name in "abc"}
    assert contents["a"] == contents["b"] != contents["c"]


BAD_VALUES = [
    (["--steps", "0"], "--steps: 0; pass an integer >= 1"),
    (["--steps", "1001"], "--steps: 1001; pass an integer in [1, 1000]"),
    (["--steps", "many"], "--steps: 'many'; pass an integer. See"),
    (["--eta", "some"], "--eta: 'some'; pass a number. See"),
    (["--stps", "3"], "No such option: --stps (Possible options: --steps). See fastddim sample --help."),
    (["--steps"], "Option '--steps' requires an argument."),
    (["--json=yes"], "Option '--json' does not take a value."),
    (["--num-images", "0"], "--num-images: 0; pass an integer in [1, 100000]"),
    (["--num-images", "1000000000000"], "--num-images: 1000000000000; pass an integer in [1, 100000]"),
    (["--eta", "1.5"], "--eta: 1.5; pass a number in [0, 1]"),
    (["--eta", "-0.1"], "--eta: -0.1; pass a number in [0, 1]"),
    (["--eta", "nan"], "--eta: nan; pass a number in [0, 1]"),
    (["--guidance-scale", "inf"], "--guidance-scale: inf; pass a number in"),
    (["--guidance-rescale", "2"], "--guidance-rescale: 2.0; pass a number in [0, 1]"),
    (["--guidance-rescale", "0.5", "--guidance-scale", "1"], "--guidance-rescale: 0.5 without guidance; leave it out"),
    (["--labels", "0,7"], "--labels: 7; pass integers in [0, 3] (3 is no class)"),
    (["--labels", "0,x"], "--labels: 'x' in '0,x'; pass integers with commas"),
    (["--labels", "-1"], "--labels: '-1' in '-1'; pass integers with commas"),
    (["--labels", ""], "--labels: '' in ''; pass integers with commas"),
    (["--seed", "-1"], "--seed: -1; pass an integer in [0, "),
    (["--seed", str(2**64)], f"--seed: {2**64}; pass an integer in [0, "),
    (["--batch-size", "0"], "--batch-size: 0; pass an integer >= 1"),
    (["--out", "no/grid.png"], "--out: 'no/grid.png' is in a folder that does not exist; create"),
    (["--out", "."], "--out: '.' is a folder; pass a file"),
    (["--out", "grid.txt"], "--out: 'grid.txt' has the suffix '.txt'; pass one of .png"),
    (["--out", "g.webp", "--num-images", "100000"], "WEBP ends at 16383; pass a .png path or fewer images"),
    (["--device", "gpu"], "--device: 'gpu' is not on this machine; pass one of cpu"),
    (["--device", "cuda:99"], "--device: 'cuda:99' is not on this machine; pass one of cpu"),
    (["--model", "./nowhere"], "--model: 'nowhere' is no folder; pass a diffusers folder or a hub id"),
    (["extra"], "unexpected extra argument"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_VALUES, ids=[" ".join(pair[0]) for pair in BAD_VALUES])
def test_errors_come_before_any_work(
    run: Run, folders: dict[str, str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setattr(fastddim.Sampler, "__call__", lambda *_, **__: pytest.fail("sampling began"))
    check_error(run("sample", "--model", folders["classes"], *arguments), message)
    assert os.listdir() == []


def check_error(result: Result, *messages: str) -> None:
    assert result.status == 2
    assert result.out == ""
    assert result.err.startswith("error: ") and result.err.count("\n") == 1
    for message in messages:
        assert message in result.err


def test_unknown_command(run: Run) -> None:
    check_error(run("smaple"), "No such command 'smaple'; pass one of sample, invert, interpolate, info, run, verify")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--labels", "0,1"], "--labels: 0,1, but this model has no classes; leave them out"),
        (["--guidance-scale", "2"], "--guidance-scale: 2.0, but this model has no classes; leave it out"),
        (["--guidance-rescale", "0.5"], "--guidance-rescale: 0.5 without guidance; leave it out"),
    ],
)
def test_options_for_classes(run: Run, folders: dict[str, str], arguments: list[str], message: str) -> None:
    check_error(run("sample", "--model", folders["plain"], *arguments), message)


def test_model_that_makes_no_pictures(run: Run, folders: dict[str, str]) -> None:
    check_error(run("sample", "--model", folders["latent"]), "--model: ", "(4, 8, 8); pass one that makes pictures")


@pytest.mark.parametrize("damage", ["truncated", "empty", "no weights", "no config", "no index", "bad json"])
def test_damaged_model(run: Run, folders: dict[str, str], tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folders["classes"], folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "empty":
        weights.write_bytes(b"")
    elif damage == "no weights":
        weights.unlink()
    elif damage == "no config":
        (folder / "unet" / "config.json").unlink()
    elif damage == "no index":
        (folder / "model_index.json").unlink()
    else:
        (folder / "scheduler" / "scheduler_config.json").write_text("{")
    check_error(run("sample", "--model", folder), "--model: ", str(folder))


def test_model_whose_values_overflow(run: Run, tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    pipeline.unet.conv_out.bias.data.fill_(float("nan"))
    pipeline.save_pretrained(tmp_path / "model")
    result = run("sample", "--model", "./model", "--steps", 1, "--num-images", 2)
    check_error(result, "images: 2 of 2 hold NaN")
    assert not Path("grid.png").exists()


def test_out_of_memory_names_the_batch_size(run: Run, folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(fastddim.Sampler, "__call__", fail)
    result = run("sample", "--model", folders["classes"], "--batch-size", 64, "--device", "cpu")
    check_error(result, "--batch-size: 64 exceeds the memory of cpu; pass a smaller one")


def test_interrupt_leaves_the_old_file(run: Run, folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    Path("grid.png").write_bytes(b"old")
    monkeypatch.setattr(fastddim.Sampler, "__call__", interrupt)
    assert run("sample", "--model", folders["classes"]).status == 130
    assert Path("grid.png").read_bytes() == b"old" and os.listdir() == ["grid.png"]


def write_pictures(*sizes: tuple[int, int]) -> list[str]:
    """Grey noise, `0.png` and so on."""
    paths = [f"{k}.png" for k in range(len(sizes))]
    for k, (path, (width, height)) in enumerate(zip(paths, sizes, strict=True)):
        noise = np.random.default_rng(k).integers(0, 256, (height, width), dtype=np.uint8)
        Image.fromarray(noise).save(path)
    return paths


def tile_of(layout: GridLayout, picture: np.ndarray, row: int, column: int) -> np.ndarray:
    x, y = layout.corner(row, column)
    width, height = layout.tile
    return picture[y : y + height : layout.scale, x : x + width : layout.scale]


HEADINGS = ("original", "x_T", "reconstruction")


@pytest.mark.parametrize("options", [[], ["--labels", "2,0", "--guidance-scale", 3], ["--labels", 1]])
def test_invert_writes_original_state_and_reconstruction(
    run: Run, folders: dict[str, str], options: list[object]
) -> None:
    paths = write_pictures((8, 8), (8, 8), (8, 8))
    common = ("--model", folders["classes"], "--steps", 5, "--batch-size", 2, "--device", "cpu", "--json")
    result = run("invert", *paths, *common, *options)
    assert (result.status, result.err) == (0, "")
    summary = json.loads(result.out)
    labels = {0: [3, 3, 3], 2: [1, 1, 1], 4: [2, 0, 2]}[len(options)]
    assert (summary["pictures"], summary["path"], summary["steps"]) == (paths, "strip.png", 5)
    assert summary["labels"] == labels and summary["guidance_scale"] == (3.0 if len(options) == 4 else None)

    pipeline = tiny_pipeline()
    sampler = fastddim.Sampler(pipeline.unet, pipeline.scheduler, 5, guidance_scale=summary["guidance_scale"])
    kwargs: dict[str, Any] = {"class_labels": torch.tensor(labels)}
    if len(options) == 4:
        kwargs["uncond_kwargs"] = {"class_labels": torch.full((3,), 3)}
    x0 = torch.tensor(np.stack([pixels(path) for path in paths]) / 127.5 - 1, dtype=torch.float32)[:, None]
    x = sampler.invert(x0, **kwargs)
    reconstruction = sampler(x, **kwargs)
    assert summary["errors"] == pytest.approx(((reconstruction - x0) / 2).square().mean((1, 2, 3)).tolist(), rel=1e-3)
    layout = GridLayout.plan(9, 8, 8, [1, 1, 1, 2, 2, 2, 3, 3, 3], 3, headings=HEADINGS)
    picture = pixels("strip.png")
    assert picture.shape == layout.size[::-1]
    for row in range(3):
        assert (tile_of(layout, picture, row, 0) == pixels(paths[row])).all()
        for column, image in ((1, x[row, 0] / 3), (2, reconstruction[row, 0])):
            expected = (image.clamp(-1, 1).numpy() + 1) * 127.5
            # The batches differ, and with them the model's last bits.
            assert np.abs(tile_of(layout, picture, row, column).astype(float) - expected).max() <= 1


def test_invert_takes_any_picture_and_any_model(run: Run, folders: dict[str, str]) -> None:
    write_pictures((5, 30))
    Image.new("RGBA", (40, 9), (255, 0, 0, 128)).save("a.webp", lossless=True)
    Image.new("P", (8, 8)).save("b.gif")
    result = run("invert", "0.png", "a.webp", "b.gif", "--model", folders["plain"], "--steps", 2, "--device", "cpu")
    assert (result.status, result.err) == (0, "")
    lines = result.out.splitlines()
    assert [line.split(": reconstruction error ")[0] for line in lines[:3]] == [
        "1: '0.png'",
        "2: 'a.webp'",
        "3: 'b.gif'",
    ]
    assert lines[3] == "'strip.png': 3 pictures, 2 steps each way on cpu"
    layout = GridLayout.plan(9, 8, 8, [1, 1, 1, 2, 2, 2, 3, 3, 3], 3, headings=HEADINGS)
    assert pixels("strip.png").shape == (*layout.size[::-1], 3)
    assert (tile_of(layout, pixels("strip.png"), 1, 0) == (255, 0, 0)).all()


def test_interpolate_writes_a_row_for_each_pair_of_seeds(run: Run, folders: dict[str, str]) -> None:
    result = run(
        *("interpolate", "--model", folders["classes"], "--seeds", "1,2,5,1", "--num", 4, "--steps", 3),
        *("--labels", 2, "--guidance-scale", 3, "--out", "way.png", "--device", "cpu", "--json"),
    )
    assert (result.status, result.err) == (0, "")
    summary = json.loads(result.out)
    assert summary["seeds"] == [[1, 2], [5, 1]] and summary["num"] == 4 and summary["labels"] == [2, 2]
    pipeline = tiny_pipeline()
    sampler = fastddim.Sampler(pipeline.unet, pipeline.scheduler, 3, guidance_scale=3.0)
    labels = torch.full((3,), 2)
    uncond = {"class_labels": torch.full((3,), 3)}
    images = sampler(3, seeds=[1, 2, 5], class_labels=labels, uncond_kwargs=uncond)
    headings = ["0", "0.33", "0.67", "1"]
    layout = GridLayout.plan(8, 8, 8, ["1, 2: 2"] * 4 + ["5, 1: 2"] * 4, 4, headings=headings)
    picture = pixels("way.png")
    assert picture.shape == layout.size[::-1]
    for row, column, k in ((0, 0, 0), (0, 3, 1), (1, 0, 2), (1, 3, 0)):
        expected = (images[k, 0].clamp(-1, 1).numpy() + 1) * 127.5
        assert np.abs(tile_of(layout, picture, row, column).astype(float) - expected).max() <= 1


def test_interpolate_without_classes_and_with_the_embedded_model(run: Run, folders: dict[str, str]) -> None:
    for model in (["--model", folders["plain"]], []):
        result = run("interpolate", *model, "--num", 2, "--steps", 2, "--device", "cpu")
        assert (result.status, result.out) == (0, "'strip.png': 1 rows of 2 images, 2 steps on cpu\n")
    layout = GridLayout.plan(2, 16, 16, ["0, 1"] * 2, 2, headings=["0", "1"])
    assert pixels("strip.png").shape == layout.size[::-1]


BAD_STRIPS = [
    ("invert", [], "Missing argument 'PICTURE'"),
    ("invert", ["none.png"], "PICTURE: 'none.png' is no file; pass a picture"),
    ("invert", ["."], "PICTURE: '.' is no file; pass a picture"),
    ("invert", ["0.png", "text.png"], "PICTURE: 'text.png' cannot be read as a picture (cannot identify"),
    ("invert", ["cut.png"], "PICTURE: 'cut.png' cannot be read as a picture (image file is truncated"),
    ("invert", ["deep.png"], "PICTURE: 'deep.png' has the mode 'I;16'; pass a picture of 8 bits a channel"),
    ("invert", ["0.png", "--out", "0.png"], "--out: '0.png' is one of the pictures; pass another path"),
    ("invert", ["0.png", "--out", "no/s.png"], "--out: 'no/s.png' is in a folder that does not exist"),
    ("invert", ["0.png", "--out", "s.txt"], "--out: 's.txt' has the suffix '.txt'"),
    ("invert", ["0.png", "--steps", "0"], "--steps: 0; pass an integer >= 1"),
    ("invert", ["0.png", "--steps", "1001"], "--steps: 1001; pass an integer in [1, 1000]"),
    ("invert", ["0.png", "--labels", "7"], "--labels: 7; pass integers in [0, 3]"),
    ("invert", ["0.png", "--labels", "1,2"], "--labels: 2 for 1 rows; pass at most one for each"),
    ("invert", ["0.png", "--guidance-scale", "2"], "--guidance-scale: 2.0 without --labels to guide towards"),
    ("invert", ["0.png", "--guidance-scale", "nan"], "--guidance-scale: nan; pass a number in"),
    ("invert", ["0.png", "--batch-size", "0"], "--batch-size: 0; pass an integer >= 1"),
    ("invert", ["0.png", "--device", "gpu"], "--device: 'gpu' is not on this machine"),
    ("interpolate", ["--seeds", "1"], "--seeds: '1' has 1; pass two for each row"),
    ("interpolate", ["--seeds", "1,2,3"], "--seeds: '1,2,3' has 3; pass two for each row"),
    ("interpolate", ["--seeds", "1,x"], "--seeds: 'x' in '1,x'; pass integers with commas"),
    ("interpolate", ["--seeds", f"1,{2**64}"], f"--seeds: {2**64}; pass an integer in [0, "),
    ("interpolate", ["--num", "1"], "--num: 1; pass an integer in [2, 100000]"),
    ("interpolate", ["--num", "9999", "--out", "s.webp"], "WEBP ends at 16383"),
    ("interpolate", ["--labels", "0,1"], "--labels: 2 for 1 rows"),
    ("interpolate", ["--model", "./nowhere"], "--model: 'nowhere' is no folder"),
]


@pytest.mark.parametrize(
    ("command", "arguments", "message"), BAD_STRIPS, ids=[" ".join([c, *a]) for c, a, _ in BAD_STRIPS]
)
def test_errors_of_strips_come_before_any_work(
    run: Run,
    folders: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    arguments: list[str],
    message: str,
) -> None:
    for method in ("__call__", "invert", "interpolate"):
        monkeypatch.setattr(fastddim.Sampler, method, lambda *_, **__: pytest.fail("sampling began"))
    write_pictures((40, 40))
    Path("text.png").write_text("no picture")
    Path("cut.png").write_bytes(Path("0.png").read_bytes()[:-900])
    Image.fromarray(np.full((8, 8), 40000, dtype=np.uint16)).save("deep.png")
    before = {name: Path(name).read_bytes() for name in os.listdir()}
    check_error(run(command, "--model", folders["classes"], *arguments), message)
    assert {name: Path(name).read_bytes() for name in os.listdir()} == before


def test_strips_of_a_model_without_classes(run: Run, folders: dict[str, str]) -> None:
    error = "--labels: 1, but this model has no classes; leave them out"
    check_error(run("interpolate", "--model", folders["plain"], "--labels", 1), error)
    check_error(
        run("interpolate", "--model", folders["latent"]), "--model: ", "(4, 8, 8); pass one that makes pictures"
    )


@pytest.mark.parametrize(("command", "option"), [("invert", "--batch-size: 100"), ("interpolate", "--num: 10")])
def test_out_of_memory_of_strips(
    run: Run, folders: dict[str, str], monkeypatch: pytest.MonkeyPatch, command: str, option: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(fastddim.Sampler, command, fail)
    paths = write_pictures((8, 8)) if command == "invert" else []
    result = run(command, *paths, "--model", folders["classes"], "--device", "cpu")
    check_error(result, f"{option} exceeds the memory of cpu; pass a smaller one")
    assert not Path("strip.png").exists()


def test_info(run: Run) -> None:
    result = run("info", "--json")
    assert (result.status, result.err) == (0, "")
    report = json.loads(result.out)
    assert report["versions"]["fastddim"] == fastddim.__version__ and report["versions"]["torch"] == torch.__version__
    assert report["devices"][0]["device"] == "cpu"
    assert report["backends"]["reference"] == {"usable": True, "reason": None}
    for backend in report["backends"].values():
        assert backend["usable"] == (backend["reason"] is None)
    text = run("info").out
    assert "reference    yes" in text and f"torch        {torch.__version__}" in text


@pytest.mark.parametrize(
    ("package", "backend", "remedy"),
    [
        ("triton", "triton", "triton is not installed (pip install triton)"),
        ("onnxruntime", "onnxruntime", "onnxruntime is not installed (pip install fastddim[onnx])"),
        ("tensorrt", "tensorrt", "tensorrt is not installed (pip install fastddim[tensorrt])"),
        ("tensorrt_rtx", "tensorrt_rtx", "tensorrt_rtx is not installed (pip install fastddim[rtx])"),
    ],
)
def test_info_says_what_is_missing(
    run: Run, monkeypatch: pytest.MonkeyPatch, package: str, backend: str, remedy: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    report = json.loads(run("info", "--json").out)["backends"][backend]
    assert not report["usable"] and remedy in report["reason"]


def test_info_without_triton_in_a_process() -> None:
    script = (
        "import sys; sys.modules['triton'] = None; import runpy, fastddim; fastddim.Sampler;"
        "sys.argv = ['fastddim', 'info', '--json']; runpy.run_module('fastddim', run_name='__main__')"
    )
    process = subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=120, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert not json.loads(process.stdout)["backends"]["triton"]["usable"]


def test_module_runs_as_a_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fastddim"]
    process = subprocess.run([*command, "info"], cwd=ROOT, timeout=120, capture_output=True, text=True)
    assert process.returncode == 0 and "reference" in process.stdout and process.stderr == ""
    out = str(tmp_path / "no" / "grid.png")
    process = subprocess.run([*command, "sample", "--out", out], cwd=ROOT, timeout=120, capture_output=True, text=True)
    assert process.returncode == 2
    assert process.stderr.startswith("error: --out: ") and process.stderr.count("\n") == 1
