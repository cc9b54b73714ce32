"""Every pipeline with every feature of it, accelerated: its own pictures, and what of it is captured.

What is found is the table of docs/pipelines.md, which FASTDDIM_WRITE_TABLES=1 writes anew.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import diffusers
import pytest
import torch
from torch.utils import _pytree as pytree

import tiny_pipelines as tiny
from fastddim import accelerate
from fastddim.scheduler_rows import Original
from tape import Tape
from tiny_pipelines import CONTROL, IMAGE, MASK, PICTURES, TIME_IDS, flow_pipeline, randn, sdxl_pipeline, text_pipeline

PAGE = Path(__file__).resolve().parents[1] / "docs" / "pipelines.md"
CAPTURED = ("unet", "transformer", "controlnet", "prior")

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Case(NamedTuple):
    """A pipeline with a feature.

    Attributes:
        make: gives the pipeline and a call of it.
        before: gets the pipeline, the call's number and the call before each call, and may change them.
        calls: how many there are.
        tolerance: by how much of the largest value they may differ. FlowMatchEuler's and Euler's numbers are float32, whatever
            the model's are.
    """

    make: Callable[[], tuple[Any, dict[str, Any]]]
    before: Callable[[Any, int, dict[str, Any]], None] = lambda pipe, k, call: None
    calls: int = 3
    tolerance: float = 1e-9


def text(pipeline: str = "StableDiffusionPipeline", **call: Any) -> tuple[Any, dict[str, Any]]:
    return text_pipeline(pipeline, **call)


def xl(pipeline: str = "StableDiffusionXLPipeline", **call: Any) -> tuple[Any, dict[str, Any]]:
    return sdxl_pipeline(pipeline, **call)


def own_unet(pipe: Any) -> Any:
    """One that no other test shares, and so may change."""
    pipe.unet = copy.deepcopy(pipe.unet)
    return pipe.unet


# Features.


class Lora(torch.nn.Module):
    """A linear layer with adapters, laid out as PEFT's: scales in a dictionary, names in a list."""

    def __init__(self, base: torch.nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.base_layer = base
        size = {"in_features": base.in_features, "out_features": base.out_features}
        self.lora_A = torch.nn.ModuleDict({name: torch.nn.Linear(size["in_features"], 2, bias=False) for name in names})
        self.lora_B = torch.nn.ModuleDict(
            {name: torch.nn.Linear(2, size["out_features"], bias=False) for name in names}
        )
        self.scaling = dict.fromkeys(names, 1.0)
        self.active_adapters = list(names[:1])

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        out = self.base_layer(x, *args, **kwargs)
        for name in self.active_adapters:
            out = out + self.lora_B[name](self.lora_A[name](x)) * self.scaling[name]
        return out


def with_loras(*names: str) -> tuple[Any, dict[str, Any]]:
    pipe, call = text()
    torch.manual_seed(0)
    for part in list(own_unet(pipe).modules()):
        for name in ("to_q", "to_k", "to_v"):
            if hasattr(part, name):
                setattr(part, name, Lora(getattr(part, name), names).double())
    return pipe, call


def change_loras(pipe: Any, k: int, call: dict[str, Any]) -> None:
    for layer in pipe.unet.modules():
        if not isinstance(layer, Lora):
            continue
        if k == 2:
            layer.scaling["style"] = 0.3
        elif k == 3:
            with torch.no_grad():
                layer.lora_B["style"].weight.mul_(2)
        elif k == 4:
            layer.active_adapters = ["style", "subject"] if "subject" in layer.scaling else []
        elif k == 5:
            layer.active_adapters[:] = layer.active_adapters[1:]


def with_ip_adapter() -> tuple[Any, dict[str, Any]]:
    pipe, call = text()
    unet = own_unet(pipe)
    crossing = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    keys = {
        f"{2 * k + 1}.{name}_ip.weight": randn((unet.get_submodule(each.removesuffix(".processor")).inner_dim, 8), k)
        for k, each in enumerate(crossing)
        for name in ("to_k", "to_v")
    }
    projection = {
        "proj.weight": randn((4 * 8, 8), 0), "proj.bias": randn((4 * 8,), 1), "norm.weight": randn((8,), 2),
        "norm.bias": randn((8,), 3),
    }  # fmt: skip
    unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": keys}])
    unet.double()
    return pipe, {**call, "ip_adapter_image_embeds": [randn((4, 1, 8), 5)]}


def change_ip_adapter(pipe: Any, k: int, call: dict[str, Any]) -> None:
    if k == 1:
        call["ip_adapter_image_embeds"] = [randn((4, 1, 8), 6)]
    elif k == 2:
        pipe.set_ip_adapter_scale(0.4)


def with_prompts(**call: Any) -> tuple[Any, dict[str, Any]]:
    parts = {"tokenizer": copy.deepcopy(tiny.tokenizer()), "text_encoder": copy.deepcopy(tiny.text_encoder())}
    pipe, _ = text_pipeline("StableDiffusionPipeline", parts=parts)
    return pipe, {"prompt": ["a cat", "a dog"], "output_type": "latent", **call}


def invert_text(pipe: Any, k: int, call: dict[str, Any]) -> None:
    if k == 1:
        pipe.load_textual_inversion({"<style>": randn((1, 8), 9)}, token="<style>")
        call["prompt"] = ["a cat <style>", "a dog <style>"]


def change_freeu(pipe: Any, k: int, call: dict[str, Any]) -> None:
    if k == 0:
        own_unet(pipe)
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5 if k < 2 else 1.3, b2=1.6)


class Reader:
    """A callback that reads a number of every step's latents."""

    def __init__(self) -> None:
        self.read: list[float] = []

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        self.read.append(float(tensors["latents"].abs().sum()))
        return {}


def write(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    return {"latents": tensors["latents"] * 0.9}


def write_over(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    tensors["latents"].mul_(0.9)
    return {}


def change_guidance(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    pipe._guidance_scale = 6.0 - step
    return {}


def stop_guidance(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """As diffusers' guide has it."""
    if step != 1:
        return {}
    pipe._guidance_scale = 0.0
    return {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[-1]}


def change_scheduler(pipe: Any, k: int, call: dict[str, Any]) -> None:
    kind = diffusers.DDIMScheduler if k < 2 else diffusers.EulerDiscreteScheduler
    pipe.scheduler = kind.from_config(pipe.scheduler.config)


# What is run.


def controlled(pipeline: str, several: int = 1, parts: Any = (), **call: Any) -> tuple[Any, dict[str, Any]]:
    is_xl = "XL" in pipeline
    nets = [tiny.controlnet(**(TIME_IDS if is_xl else {})) for _ in range(several)]
    make = sdxl_pipeline if is_xl else text_pipeline
    parts = {"controlnet": nets[0] if several == 1 else nets, **dict(parts)}
    pictures = CONTROL if several == 1 else [CONTROL, IMAGE]
    changes = "Img2Img" in pipeline or "Inpaint" in pipeline
    given = {"control_image": pictures, **PICTURES} if changes else {"image": pictures}
    return make(pipeline, parts=parts, **given, **({"mask_image": MASK} if "Inpaint" in pipeline else {}), **call)


def adapted(pipeline: str = "StableDiffusionAdapterPipeline", several: bool = False, **call: Any) -> tuple[Any, Any]:
    is_xl = "XL" in pipeline
    unet = tiny.adapted_unet(**(TIME_IDS if is_xl else {}))
    image = [CONTROL, IMAGE] if several else CONTROL
    make = sdxl_pipeline if is_xl else text_pipeline
    return make(pipeline, unet, parts=tiny.adapter_parts(several), image=image, **call)


def scheduled(make: Callable[[], tuple[Any, dict[str, Any]]], **options: Any) -> tuple[Any, dict[str, Any]]:
    pipe, call = make()
    pipe.scheduler = type(pipe.scheduler).from_config({**pipe.scheduler.config, **options})
    return pipe, call


def case(make: Callable[..., Any], *args: Any, **call: Any) -> Case:
    tolerance = 1e-5 if make is flow_pipeline else 1e-9
    return Case(functools.partial(make, *args, **call), tolerance=tolerance)


SD, XL = "StableDiffusion", "StableDiffusionXL"
PAINT = {"image": IMAGE, "mask_image": MASK}
WINDOW = {"control_guidance_start": 0.3, "control_guidance_end": 0.8}
CASES = {
    (f"{SD}Pipeline", "text to image"): case(text),
    (f"{SD}Pipeline", "v prediction (2.x)"): case(scheduled, text, prediction_type="v_prediction"),
    (f"{SD}Pipeline", "no guidance"): case(text, guidance_scale=1.0),
    (f"{SD}Pipeline", "noise in every step (eta)"): case(text, eta=0.6),
    (f"{SD}Pipeline", "rescaled guidance"): case(text, guidance_rescale=0.7),
    (f"{SD}Pipeline", "a callback that reads"): Case(lambda: text(callback_on_step_end=Reader())),
    (f"{SD}Pipeline", "a callback that returns latents"): case(text, callback_on_step_end=write),
    (f"{SD}Pipeline", "a callback that writes over latents"): case(text, callback_on_step_end=write_over),
    (f"{SD}Pipeline", "a callback that changes the guidance"): case(text, callback_on_step_end=change_guidance),
    (f"{SD}Pipeline", "a callback that ends the guidance"): case(
        text,
        callback_on_step_end=stop_guidance,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
        num_inference_steps=6,
    ),
    (f"{SD}Pipeline", "prompts"): Case(with_prompts),
    (f"{SD}Pipeline", "textual inversion"): Case(with_prompts, invert_text, 4),
    (f"{SD}Pipeline", "LoRA"): Case(lambda: with_loras("style"), change_loras, 6),
    (f"{SD}Pipeline", "several LoRAs"): Case(lambda: with_loras("style", "subject"), change_loras, 7),
    (f"{SD}Pipeline", "IP-Adapter"): Case(with_ip_adapter, change_ip_adapter, 4),
    (f"{SD}Pipeline", "FreeU"): Case(text, change_freeu, 4),
    (f"{SD}Pipeline", "another scheduler from the third call on"): Case(text, change_scheduler, 5, 3e-6),
    (f"{SD}Img2ImgPipeline", "image to image"): case(text, f"{SD}Img2ImgPipeline", **PICTURES),
    (f"{SD}InpaintPipeline", "4 channels"): case(text, f"{SD}InpaintPipeline", **PAINT, strength=0.8),
    (f"{SD}InpaintPipeline", "9 channels"): Case(
        lambda: text(f"{SD}InpaintPipeline", unet=tiny.text_unet(in_channels=9), **PAINT)
    ),
    (f"{XL}Pipeline", "text to image"): case(xl),
    (f"{XL}Pipeline", "denoising_end"): case(xl, denoising_end=0.7, num_inference_steps=6),
    (f"{XL}Pipeline", "a callback that changes the guidance"): case(xl, callback_on_step_end=change_guidance),
    (f"{XL}Img2ImgPipeline", "image to image"): case(xl, f"{XL}Img2ImgPipeline", **PICTURES),
    (f"{XL}Img2ImgPipeline", "refiner, denoising_start"): case(
        xl,
        f"{XL}Img2ImgPipeline",
        refiner=True,
        image=randn((2, 4, 8, 8), 3),
        denoising_start=0.3,
        num_inference_steps=6,
    ),
    (f"{XL}InpaintPipeline", "4 channels"): case(xl, f"{XL}InpaintPipeline", **PAINT, strength=0.8),
    (f"{XL}InpaintPipeline", "9 channels"): Case(
        lambda: xl(f"{XL}InpaintPipeline", unet=tiny.text_unet(in_channels=9, **TIME_IDS), **PAINT, strength=0.99)
    ),
    (f"{SD}ControlNetPipeline", "one ControlNet"): case(controlled, f"{SD}ControlNetPipeline"),
    (f"{SD}ControlNetPipeline", "a window"): case(
        controlled, f"{SD}ControlNetPipeline", **WINDOW, num_inference_steps=6
    ),
    (f"{SD}ControlNetPipeline", "guess mode"): case(controlled, f"{SD}ControlNetPipeline", guess_mode=True),
    (f"{SD}ControlNetPipeline", "several ControlNets"): case(controlled, f"{SD}ControlNetPipeline", several=2),
    (f"{SD}ControlNetPipeline", "several, a window each"): case(
        controlled,
        f"{SD}ControlNetPipeline",
        several=2,
        num_inference_steps=8,
        control_guidance_start=[0.0, 0.5],
        control_guidance_end=[0.5, 1.0],
    ),
    (f"{SD}ControlNetImg2ImgPipeline", "one ControlNet"): case(controlled, f"{SD}ControlNetImg2ImgPipeline"),
    (f"{SD}ControlNetImg2ImgPipeline", "several ControlNets"): case(
        controlled, f"{SD}ControlNetImg2ImgPipeline", several=2
    ),
    (f"{SD}ControlNetInpaintPipeline", "one ControlNet"): case(controlled, f"{SD}ControlNetInpaintPipeline"),
    (f"{SD}ControlNetInpaintPipeline", "several ControlNets"): case(
        controlled, f"{SD}ControlNetInpaintPipeline", several=2
    ),
    (f"{XL}ControlNetPipeline", "one ControlNet"): case(controlled, f"{XL}ControlNetPipeline"),
    (f"{XL}ControlNetImg2ImgPipeline", "one ControlNet"): case(controlled, f"{XL}ControlNetImg2ImgPipeline"),
    (f"{XL}ControlNetInpaintPipeline", "one ControlNet"): case(controlled, f"{XL}ControlNetInpaintPipeline"),
    (f"{SD}AdapterPipeline", "one T2I-Adapter"): case(adapted),
    (f"{SD}AdapterPipeline", "several T2I-Adapters"): case(
        adapted, several=True, adapter_conditioning_scale=[0.7, 0.4]
    ),
    (f"{XL}AdapterPipeline", "one T2I-Adapter"): case(adapted, f"{XL}AdapterPipeline"),
    (f"{SD}InstructPix2PixPipeline", "guidance by text and picture"): Case(
        lambda: text(f"{SD}InstructPix2PixPipeline", unet=tiny.text_unet(in_channels=8), image=IMAGE)
    ),
    (f"{XL}InstructPix2PixPipeline", "guidance by text and picture"): Case(
        lambda: xl(f"{XL}InstructPix2PixPipeline", unet=tiny.text_unet(in_channels=8, **TIME_IDS), image=IMAGE)
    ),
    (f"{SD}PAGPipeline", "PAG"): case(text, f"{SD}PAGPipeline", parts={"pag_applied_layers": "mid"}),
    (f"{SD}PAGPipeline", "adaptive PAG"): case(
        text, f"{SD}PAGPipeline", parts={"pag_applied_layers": "mid"}, pag_adaptive_scale=0.001
    ),
    (f"{SD}ControlNetPAGPipeline", "PAG and a ControlNet"): case(
        controlled, f"{SD}ControlNetPAGPipeline", parts={"pag_applied_layers": "mid"}
    ),
    (f"{XL}PAGPipeline", "PAG"): case(xl, f"{XL}PAGPipeline", parts={"pag_applied_layers": "mid"}),
    (f"{SD}SAGPipeline", "SAG"): case(text, f"{SD}SAGPipeline"),
    (f"{SD}PanoramaPipeline", "two views"): case(text, f"{SD}PanoramaPipeline", height=8, width=16),
    (f"{SD}LDM3DPipeline", "picture and depth"): Case(tiny.make_ldm3d),
    (f"{SD}UpscalePipeline", "upscaling"): Case(tiny.make_upscale),
    (f"{SD}Depth2ImgPipeline", "image to image"): Case(tiny.make_depth2img),
    ("StableUnCLIPPipeline", "prior and decoder"): Case(tiny.make_unclip),
    ("StableUnCLIPImg2ImgPipeline", "image variation"): Case(tiny.make_unclip_img2img),
    ("CycleDiffusionPipeline", "two prompts"): Case(tiny.make_cycle),
    ("MarigoldDepthPipeline", "depth"): Case(tiny.make_marigold),
    ("AnimateDiffPipeline", "text to video"): case(tiny.make_animatediff, num_frames=2),
    ("AnimateDiffVideoToVideoPipeline", "video to video"): case(
        tiny.make_animatediff, "AnimateDiffVideoToVideoPipeline", video=[IMAGE[0], IMAGE[1]], strength=0.8
    ),
    ("StableVideoDiffusionPipeline", "image to video"): Case(tiny.make_svd, tolerance=3e-5),
    ("LattePipeline", "text to video"): Case(tiny.make_latte),
    ("AudioLDM2Pipeline", "text to audio"): Case(tiny.make_audioldm2),
    ("CogVideoXPipeline", "text to video"): Case(tiny.make_cogvideox, tolerance=1e-5),
    ("WanPipeline", "text to video"): Case(tiny.make_wan, tolerance=1e-5),
    ("WanPipeline", "a transformer in bfloat16, latents in float32"): Case(
        lambda: tiny.make_wan(torch.bfloat16), tolerance=0.02
    ),
    ("LTXPipeline", "text to video"): Case(tiny.make_ltx, tolerance=1e-5),
    ("SanaPipeline", "text to image"): Case(tiny.make_sana, tolerance=1e-5),
    ("AuraFlowPipeline", "text to image"): Case(tiny.make_auraflow, tolerance=1e-5),
    ("LatentConsistencyModelPipeline", "text to image"): Case(tiny.make_lcm, tolerance=1e-5),
    ("DDIMPipeline", "unconditional"): Case(tiny.make_ddim),
    ("LDMPipeline", "unconditional"): Case(tiny.make_ldm, tolerance=3e-5),
    ("LDMSuperResolutionPipeline", "upscaling"): Case(tiny.make_ldm_super_resolution),
    ("DiTPipeline", "classes"): Case(tiny.make_dit),
    ("PixArtAlphaPipeline", "text to image"): case(tiny.make_pixart, "PixArtAlphaPipeline"),
    ("PixArtSigmaPipeline", "text to image"): Case(tiny.make_pixart),
    ("HunyuanDiTPipeline", "text to image"): Case(tiny.make_hunyuan),
    (f"{SD}3Pipeline", "text to image"): Case(tiny.make_sd3, tolerance=1e-5),
    (f"{SD}3Img2ImgPipeline", "image to image"): case(flow_pipeline, f"{SD}3Img2ImgPipeline", **PICTURES),
    (f"{SD}3InpaintPipeline", "inpainting"): case(flow_pipeline, f"{SD}3InpaintPipeline", **PAINT),
    (f"{SD}3ControlNetPipeline", "one ControlNet"): case(
        flow_pipeline, f"{SD}3ControlNetPipeline", control_image=CONTROL
    ),
    ("FluxPipeline", "text to image"): Case(tiny.make_flux, tolerance=1e-5),
    ("FluxImg2ImgPipeline", "image to image"): case(flow_pipeline, "FluxImg2ImgPipeline", **PICTURES),
    ("FluxInpaintPipeline", "inpainting"): case(flow_pipeline, "FluxInpaintPipeline", **PAINT),
    ("FluxFillPipeline", "inpainting"): case(flow_pipeline, "FluxFillPipeline", **PAINT),
    ("FluxControlPipeline", "a control picture"): case(
        flow_pipeline, "FluxControlPipeline", control_image=randn((2, 3, 16, 16), 7).sigmoid()
    ),
    ("FluxControlNetPipeline", "one ControlNet"): case(flow_pipeline, "FluxControlNetPipeline", control_image=CONTROL),
}


class Outcome(NamedTuple):
    """What calls of a pipeline gave, and what its last call did.

    Attributes:
        results: each call's tensors, and the numbers that a callback read.
        states: the generator's, after each.
        model_calls, scheduler_steps: how often the last call ran these.
        graphs: how many are kept.
    """

    results: list[list[torch.Tensor]]
    states: list[torch.Tensor]
    model_calls: int
    scheduler_steps: int
    graphs: int


@contextlib.contextmanager
def counted(kinds: set[type], name: str) -> Iterator[list[str]]:
    """The calls of a method of some classes."""
    calls: list[str] = []

    def count(kind: type) -> Any:
        own = getattr(kind, name)

        @functools.wraps(own)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(kind.__name__)
            return own(self, *args, **kwargs)

        return mock.patch.object(kind, name, method)

    with contextlib.ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(count(kind))
        yield calls


def outcome(case: Case, graph: str | None, calls: int) -> Outcome:
    """Calls with one generator, accelerated or not."""
    torch.manual_seed(0)
    pipe, call = case.make()
    call = {"num_inference_steps": 3, **call}
    pipe.set_progress_bar_config(disable=True)
    if graph is not None:
        accelerate(pipe, graph=graph)
    generator = torch.Generator().manual_seed(1)
    reader = call.get("callback_on_step_end")
    results, states = [], []
    for k in range(calls):
        case.before(pipe, k, call)
        models = {type(getattr(pipe, name)) for name in CAPTURED if getattr(pipe, name, None) is not None}
        schedulers = {type(part) for part in pipe.components.values() if hasattr(part, "step")}
        # A patched step would be taken as it is.
        unseen = mock.patch.object(Original, "runs_in", return_value=True)
        with unseen, counted(models, "forward") as model_calls, counted(schedulers, "step") as steps:
            made = pipe(**call, generator=generator, return_dict=False)
        found = [torch.as_tensor(leaf).clone() for leaf in pytree.tree_leaves(made) if hasattr(leaf, "shape")]
        results.append([*found, torch.tensor(reader.read if isinstance(reader, Reader) else [])])
        states.append(generator.get_state())
    graphs = 0 if graph is None else len(pipe._acceleration.captures.graphs)
    return Outcome(results, states, len(model_calls), len(steps), graphs)


def check_same(got: Outcome, expected: Outcome, tolerance: float) -> None:
    assert all(map(torch.equal, got.states, expected.states))
    for k, (ours, own) in enumerate(zip(got.results, expected.results, strict=True)):
        for one, other in zip(ours, own, strict=True):
            assert one.shape == other.shape and one.dtype == other.dtype
            error, largest = ((value.abs().max().item() if one.numel() else 0.0) for value in (one - other, other))
            assert error <= tolerance * largest, (k, error, largest)


@pytest.fixture(scope="module")
def rows() -> Iterator[dict[tuple[str, str], str]]:
    found: dict[tuple[str, str], str] = {}
    yield found
    if os.environ.get("FASTDDIM_WRITE_TABLES") == "1":
        PAGE.write_text(f"{PAGE.read_text().partition(HEAD)[0]}{HEAD}{''.join(found.values())}")


HEAD = "| Pipeline | With | Model | Step | Graphs |\n|---|---|---|---|---|\n"


@functools.cache
def committed() -> dict[tuple[str, str], str]:
    lines = PAGE.read_text().partition(HEAD)[2].splitlines(keepends=True) if PAGE.exists() else []
    cells = ([cell.strip() for cell in line.split("|")[1:3]] for line in lines)
    return {(pipeline.strip("`"), feature): line for (pipeline, feature), line in zip(cells, lines, strict=True)}


@pytest.mark.parametrize(("pipeline", "feature"), CASES)
def test_the_pictures_are_the_pipelines_own(
    pipeline: str, feature: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    rows: dict[tuple[str, str], str],
) -> None:  # fmt: skip
    case = CASES[pipeline, feature]
    own = outcome(case, None, case.calls)
    Tape().install(monkeypatch)
    taped = outcome(case, "step", case.calls)
    check_same(taped, own, case.tolerance)
    model, step = (
        new if count == 0 else old if count == before else f"{new}, {count} of {before} {old}"
        for new, old, count, before in (
            ("captured", "as written", taped.model_calls, own.model_calls),
            ("fused", "the scheduler's", taped.scheduler_steps, own.scheduler_steps),
        )
    )
    logged = [record.getMessage() for record in caplog.records if record.name == "fastddim"]
    reasons = "".join(f" ({line.partition(': ')[2]})" for line in dict.fromkeys(logged))
    rows[pipeline, feature] = line = f"| `{pipeline}` | {feature} | {model}{reasons} | {step} | {taped.graphs} |\n"
    print(line)
    # What is not captured says why.
    assert taped.model_calls == 0 or logged
    if os.environ.get("FASTDDIM_WRITE_TABLES") != "1":
        assert committed()[pipeline, feature] == line


@pytest.mark.slow
@pytest.mark.parametrize("graph", ["off", "step"])
@pytest.mark.parametrize(("pipeline", "feature"), CASES)
def test_the_pictures_without_a_tape_are_the_pipelines_own(pipeline: str, feature: str, graph: str) -> None:
    case = CASES[pipeline, feature]
    check_same(outcome(case, graph, 2), outcome(case, None, 2), case.tolerance)


def test_the_page_has_these_alone() -> None:
    assert os.environ.get("FASTDDIM_WRITE_TABLES") == "1" or list(committed()) == list(CASES)
    assert all(re.fullmatch(r"\w+Pipeline", pipeline) and hasattr(diffusers, pipeline) for pipeline, _ in CASES)
