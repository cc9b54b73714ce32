"""Exported ONNX files, run with ONNX Runtime, against diffusers' loop, the sampler and torch's own quantile."""

import functools
import itertools
import json
import os
import shutil
import subprocess
import sys
from unittest import mock

import diffusers
import jsonschema
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

import fastddim
from damage import edit, flip_a_byte
from fastddim import DDIMConfig, DynamicThreshold, Sampler, StepTable
from fastddim.cli import main
from fastddim.export import (
    Bundle,
    BundleError,
    ExportError,
    ExportOptions,
    NotFiniteError,
    OrtSampler,
    ParityError,
    export_onnx,
    open_bundle,
    step_module,
    verify_bundle,
)
from fastddim.export.bundle import FORMAT, write_bundle
from fastddim.export.denoisers import describe
from fastddim.export.onnx import exporter
from fastddim.export.onnx.graph import symbolic_dims
from fastddim.export.sampler_plan import plan_sampler
from fastddim.export.schedule_module import ScheduleModule, TablesModule
from fastddim.models.policy import ActionUNet1d
from fastddim.noise import STREAM_INITIAL, STREAM_STEP, normal
from fastddim.reference import apply_limit
from fastddim.samplers import Steps
from fastddim.samplers.sampling import Sampling
from fastddim.schedule import EDMSchedule, FlowSchedule, Schedule
from oracle import ddim
from pairwise import pairwise
from unets import small_unet

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

QUICK = (1, 4)


class Tiny(torch.nn.Module):
    """Fast to export, and as nonlinear as a step needs."""

    def __init__(self, channels=2):
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(channels, channels, 3, padding=1)
        self.embedding = torch.nn.Embedding(5, channels)

    def forward(self, x, t, labels):
        shift = torch.cos(t.to(x.dtype) / 200)[:, None] + self.embedding(labels)
        return torch.tanh(self.conv(x)) + shift[:, :, None, None]


SHAPE = (2, 6, 6)
LABELS = torch.tensor([1, 4, 2])


def export_tiny(folder, config=None, **options):
    return export_onnx(
        Tiny(),
        config or DDIMConfig(),
        folder,
        ExportOptions(**options),
        sample_shape=SHAPE,
        example_kwargs={"labels": LABELS},
        parity_steps=QUICK,
    )


def run_tiny(bundle, batch=3, **arguments):
    labels = np.resize(LABELS.numpy(), batch)
    guided = bundle.manifest["sampling"]["guided"]
    uncond = {"labels": np.zeros(batch, dtype=np.int64)} if guided else None
    return OrtSampler(bundle)(batch, seeds=5, labels=labels, uncond_kwargs=uncond, **arguments)


def sample_tiny(config, steps, batch=3, **options):
    labels = torch.from_numpy(np.resize(LABELS.numpy(), batch))
    guided = options.get("guidance_scale") is not None
    uncond = {"labels": torch.zeros_like(labels)} if guided else None
    sampler = Sampler(Tiny(), config, steps, sample_shape=SHAPE, **options)
    return sampler(batch, seeds=5, labels=labels, uncond_kwargs=uncond).numpy()


CONFIGS = {
    "epsilon, clip": DDIMConfig(),
    "v, trailing": DDIMConfig(prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False),
    "sample, linspace": DDIMConfig(prediction_type="sample", timestep_spacing="linspace"),
    "threshold": DDIMConfig(thresholding=True, sample_max_value=1.5, dynamic_thresholding_ratio=0.9),
    "threshold of 1": DDIMConfig(thresholding=True),
}


@pytest.mark.parametrize(("name", "graph"), [*zip(CONFIGS, ("loop", "step", "step", "step", "loop"), strict=True)])
def test_a_file_samples_as_the_sampler_does(tmp_path, name, graph):
    config = CONFIGS[name]
    bundle = export_tiny(tmp_path / "bundle", config, kind=graph, guided=True, guidance_rescale=True, stochastic=True)
    for batch, steps, eta in ((1, 1, 0.0), (3, 7, 0.5), (8, 12, 1.0)):
        actual = run_tiny(bundle, batch, num_inference_steps=steps, eta=eta, guidance_scale=3.0, guidance_rescale=0.7)
        expected = sample_tiny(config, steps, batch, eta=eta, guidance_scale=3.0, guidance_rescale=0.7)
        np.testing.assert_allclose(actual, expected, atol=2e-5)


GUIDANCES = {
    "cfg++": {"guidance_method": "cfg++"},
    "apg": {"guidance_method": "apg", "apg_eta": 0.3, "apg_norm_threshold": 5.0},
}


@pytest.mark.parametrize(
    ("name", "options"),
    [("cfg++", {"kind": "loop"}), ("cfg++", {"bake_schedule": True}), ("apg", {"kind": "step"}),
     ("apg", {"dynamic_size": True})],
)  # fmt: skip
def test_a_file_guides_as_the_sampler_does(tmp_path, name, options):
    if options.get("dynamic_size"):
        bundle = export_onnx(
            class_pipeline().unet, DDIMConfig(), tmp_path / "bundle",
            ExportOptions(guided=True, **GUIDANCES[name], **options), parity_steps=(2,),
        )  # fmt: skip
        # Also compared at twice the height, a sample of its own number of elements.
        assert {entry["size"][1] for entry in bundle.manifest["parity"]} > {bundle.manifest["sample"]["shape"][1]}
        return
    bundle = export_tiny(tmp_path / "bundle", guided=True, guidance_rescale=True, **GUIDANCES[name], **options)
    recorded = bundle.manifest["sampling"]
    assert {key: recorded[key] for key in GUIDANCES[name]} == GUIDANCES[name]
    assert bundle.table.has_epsilon_term == (name == "cfg++")
    for batch, steps in ((1, 1), (3, 7)):
        given = {"guidance_scale": 0.7, "guidance_rescale": 0.4}
        actual = run_tiny(bundle, batch, num_inference_steps=steps, **given)
        expected = sample_tiny(DDIMConfig(), steps, batch, **given, **GUIDANCES[name])
        np.testing.assert_allclose(actual, expected, atol=2e-5)
    assert np.abs(sample_tiny(DDIMConfig(), steps, batch, **given) - expected).max() > 1e-3


def test_a_file_for_cfg_plus_plus_needs_an_epsilon_term(tmp_path):
    for options in ({"method": "lcm", "stochastic": True}, {"use_clipped_model_output": True}):
        with pytest.raises(ValueError, match=r"^guidance_method: 'cfg\+\+' with method '(lcm|ddim)', whose steps"):
            export_tiny(tmp_path / "bundle", guided=True, guidance_method="cfg++", **options)
    assert os.listdir(tmp_path) == []


LIMITS = {
    "none": {"clip_sample": False},
    "clip": {"clip_sample": True},
    "threshold": {"clip_sample": False, "thresholding": True, "sample_max_value": 1.5},
}
SETTINGS = (("leading", "trailing"), (1.0, 3.0), (0.0, 0.5), (1, 3, 8), ((8, 8), (16, 8)))
RUNS = pairwise(LIMITS, ("epsilon", "sample", "v_prediction"), *SETTINGS)


def diffusers_run(unet, scheduler, steps, batch, size, scale, eta):
    """The loop of diffusers' class-conditional pipelines, with the noise of seeds 5, 6, ..."""
    seeds, shape = range(5, 5 + batch), (unet.config.in_channels, *size)
    null = unet.config.num_class_embeds - 1
    labels = torch.arange(batch) % null
    x = normal(seeds, 0, shape, STREAM_INITIAL)
    scheduler.set_timesteps(steps)
    for k, t in enumerate(scheduler.timesteps):
        cond, uncond = (unet(x, t, class_labels=given).sample for given in (labels, torch.full_like(labels, null)))
        x = scheduler.step(
            uncond + scale * (cond - uncond), t, x, eta=eta, variance_noise=normal(seeds, k, shape, STREAM_STEP),
            use_clipped_model_output=scheduler.config.clip_sample or scheduler.config.thresholding,
        ).prev_sample  # fmt: skip
    return x.numpy()


def one_thread():
    """Options under which ONNX Runtime's threads do not spin while torch works."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return options


def sampler_run(unet, scheduler, steps, batch, size, scale, eta):
    """The loop of this library, whose table is float64: diffusers' own costs one step up to 1e-5."""
    null = unet.config.num_class_embeds - 1
    labels = torch.arange(batch) % null
    shape = (unet.config.in_channels, *size)
    # Guidance with scale 1 still calls the model with both halves in the file.
    sampler = Sampler(unet, scheduler, steps, eta=eta, guidance_scale=scale, sample_shape=shape)
    uncond = {"class_labels": torch.full_like(labels, null)}
    return sampler(batch, seeds=5, class_labels=labels, uncond_kwargs=uncond).numpy()


def check_runs(bundle, unet, config, run, steps, settings, tolerance):
    """One file, as the schedule, prediction type and number of steps end in the table."""
    for spacing, scale, eta, batch, size in settings:
        changed = {**config, "timestep_spacing": spacing}
        manifest = {**bundle.manifest, "schedule": {**bundle.manifest["schedule"], **changed}}
        actual = OrtSampler(Bundle(bundle.path, manifest), session_options=one_thread())(
            batch, seeds=5, num_inference_steps=steps, eta=eta, guidance_scale=scale, size=size,
            class_labels=np.arange(batch) % (unet.config.num_class_embeds - 1),
        )  # fmt: skip
        expected = run(unet, diffusers.DDIMScheduler(**changed), steps, batch, size, scale, eta)
        largest = max(1.0, float(np.abs(expected).max()))
        told = f"{changed} {steps=} {scale=} {eta=} {batch=} {size=}"
        np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * largest, err_msg=told)


def attention_unet(**options):
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4, **options,
    ).eval()  # fmt: skip
    with torch.no_grad():
        unet.conv_out.weight.mul_(0.1)
    return unet


@torch.no_grad()
@pytest.mark.parametrize(
    "limit", [pytest.param(each, marks=pytest.mark.slow if each == "threshold" else ()) for each in LIMITS]
)
def test_runs_are_those_of_diffusers_loop(tmp_path, limit):
    """Limits, prediction types, spacings, guidance, eta, batches and sizes."""
    # One with attention is much longer to export.
    unet = attention_unet(num_class_embeds=5) if limit == "threshold" else class_pipeline().unet
    options = ExportOptions(guided=True, stochastic=True, dynamic_size=True)
    bundle = export_onnx(unet, DDIMConfig(**LIMITS[limit]), tmp_path / "bundle", options, parity_steps=(1,))
    dims = symbolic_dims(onnx.load(bundle.model_path).graph)
    assert dims["sample"] == dims["samples"] == ["batch", 1, "height", "width"]
    assert dims["noise"] == ["steps", "batch", 1, "height", "width"]
    for size in ((0, 16), (12, 16.0)):
        with pytest.raises(ValueError, match=r"size: (0|16\.0); pass an integer >= 1"):
            OrtSampler(bundle)(2, seeds=1, guidance_scale=1.0, class_labels=np.zeros(2, np.int64), size=size)
    for _, prediction, *setting in (run for run in RUNS if run[0] == limit):
        config = {**LIMITS[limit], "prediction_type": prediction}
        check_runs(bundle, unet, config, diffusers_run, 10, [setting], 1e-4)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("limit", LIMITS)
def test_every_run_of_the_digits_is_that_of_the_loops(tmp_path, limit):
    pipe = fastddim.load_pipeline()
    config = {
        "beta_schedule": pipe.scheduler.config.beta_schedule, "prediction_type": "v_prediction", **LIMITS[limit],
    }  # fmt: skip
    options = ExportOptions(guided=True, stochastic=True, dynamic_size=True)
    bundle = export_onnx(pipe.unet, DDIMConfig(**config), tmp_path / "bundle", options, parity_steps=(1,))
    settings = [(*rest, (2 * height, 2 * width)) for *rest, (height, width) in itertools.product(*SETTINGS)]
    check_runs(bundle, pipe.unet, config, sampler_run, 1, settings, 2e-6)
    check_runs(bundle, pipe.unet, config, diffusers_run, 50, settings, 1e-4)


LATENT = DDIMConfig(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
METHODS = {
    "dpmsolver++": (LATENT, {}),
    "dpmsolver++, step": (LATENT, {"kind": "step", "guided": True}),
    "dpmsolver++, baked": (LATENT, {"bake_schedule": True, "seeded": True, "per_sample_steps": True}),
    "euler, flow": (FlowSchedule(shift=3.0), {"bake_schedule": True}),
    "euler, edm": (EDMSchedule(), {"kind": "step"}),
    "euler, karras": (LATENT, {"spacing": "karras"}),
    "euler_ancestral": (LATENT, {"stochastic": True, "method_options": {"eta": 0.5}}),
    "lcm, baked": (LATENT, {"stochastic": True, "bake_schedule": True, "seeded": True}),
    "tcd": (LATENT, {"stochastic": True, "kind": "step", "method_options": {"gamma": 0.5}}),
    "ddpm": (LATENT, {"stochastic": True}),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_exports_and_takes_other_numbers_of_steps(tmp_path, name):
    schedule, options = METHODS[name]
    options = {"method": name.partition(",")[0], **options}
    bundle = export_tiny(tmp_path / "bundle", schedule, num_inference_steps=6, **options)
    described = {
        "method": options["method"],
        "method_options": options.get("method_options"),
        "spacing": options.get("spacing"),
    }
    guided = options.get("guided", False)
    exported = OrtSampler(open_bundle(bundle.path))
    for steps in (6, 9):
        sampler = Sampler(
            Tiny(), schedule, steps, sample_shape=SHAPE, guidance_scale=3.0 if guided else None, **described
        )
        uncond = {"uncond_kwargs": {"labels": torch.zeros(3, dtype=torch.int64)}} if guided else {}
        expected = sampler(3, seeds=5, labels=LABELS, **uncond).numpy()
        actual = exported(
            3, seeds=5, num_inference_steps=steps, labels=LABELS.numpy(), guidance_scale=3.0 if guided else None,
            uncond_kwargs={"labels": np.zeros(3, np.int64)} if guided else None,
        )  # fmt: skip
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=2e-4 * max(1, np.abs(expected).max()))
    if options.get("bake_schedule"):
        with pytest.raises(ValueError, match=r"num_inference_steps: 101; pass an integer in \[1, (100|50)\]"):
            exported(3, seeds=5, num_inference_steps=101, labels=LABELS.numpy())
    else:
        with pytest.raises(ValueError, match=r"^eta: "):
            exported(3, seeds=5, eta=2.0, labels=LABELS.numpy(), guidance_scale=3.0 if guided else None)


def test_a_schedule_whose_start_differs_is_not_seeded(tmp_path):
    config = DDIMConfig(timestep_spacing="linspace", clip_sample=False)
    with pytest.raises(ValueError, match="seeded: True with bake_schedule and method 'euler', whose start is scaled"):
        export_tiny(tmp_path / "bundle", config, method="euler", bake_schedule=True, seeded=True)


def test_scales_differ_from_sample_to_sample(tmp_path):
    bundle = export_tiny(tmp_path / "bundle", guided=True)
    actual = run_tiny(bundle, 2, num_inference_steps=5, guidance_scale=np.array([1.5, 6.0]))
    for k, scale in enumerate((1.5, 6.0)):
        np.testing.assert_allclose(actual[k], sample_tiny(DDIMConfig(), 5, 2, guidance_scale=scale)[k], atol=1e-5)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("eta", [0.0, 0.8])
def test_a_baked_schedule_is_the_schedules_own_for_every_number_of_steps(spacing, eta):
    config = DDIMConfig(timestep_spacing=spacing, steps_offset=1 if spacing == "leading" else 0)
    schedule = Schedule(config)
    module = ScheduleModule(schedule, eta, True)
    for steps in range(1, 1000):
        timesteps, coefficients = module(torch.tensor(steps))
        pairs = schedule.pairs(steps)
        assert timesteps.tolist() == [t for t, _ in pairs]
        if steps < 30 or steps % 111 == 0:
            table = fastddim.StepTable.build(schedule, pairs, eta=eta, use_clipped_model_output=True)
            np.testing.assert_allclose(coefficients, table.columns, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("trained", [61, 1000])
def test_baked_tables_are_the_methods_own_for_every_number_of_steps(spacing, trained):
    config = DDIMConfig(timestep_spacing=spacing, num_train_timesteps=trained, clip_sample=False)
    sampling = Sampling(Schedule(config), "dpmsolver++")
    module = TablesModule(sampling)
    assert sampling.most_baked == min(trained - (spacing == "leading"), 100)
    for steps in range(1, sampling.most_baked + 1):
        timesteps, coefficients = module(torch.tensor(steps))
        table = sampling.build(Steps(steps))
        assert timesteps.tolist() == list(table.timesteps) and len(table) == steps
        np.testing.assert_allclose(coefficients, table.columns, rtol=1e-6, atol=1e-7)
    few = Sampling(Schedule(config), "dpmsolver++", {"lambda_min_clipped": 0.5})
    if spacing == "trailing":
        with pytest.raises(ValueError, match=r"^bake_schedule: .* leave out lambda_min_clipped"):
            TablesModule(few)


def test_a_baked_schedule_goes_through_states_without_signal():
    schedule = Schedule(DDIMConfig(beta_start=0.9, beta_end=0.99, prediction_type="v_prediction"))
    _, coefficients = ScheduleModule(schedule, 0.5, False)(torch.tensor(10))
    # Equation 16 between two alpha_bar of 0: v's epsilon is the state, of which sqrt(1 - eta**2) stays.
    expected = torch.tensor([0, -1, 0.75**0.5, 0, 0, 0.5])
    torch.testing.assert_close(coefficients[:8], expected.expand(8, 6))
    assert coefficients.isfinite().all()


def test_a_file_with_a_baked_schedule_needs_a_number_of_steps_alone(tmp_path):
    config = DDIMConfig(timestep_spacing="trailing", prediction_type="v_prediction")
    bundle = export_tiny(tmp_path / "bundle", config, bake_schedule=True, stochastic=True, eta=1.0)
    assert sorted(bundle.names("inputs")) == ["labels", "noise", "num_inference_steps", "sample"]
    for steps in (1, 7, 30):
        actual = run_tiny(bundle, num_inference_steps=steps)
        np.testing.assert_allclose(actual, sample_tiny(config, steps, eta=1.0), atol=2e-5)
    with pytest.raises(ValueError, match="timesteps, eta, method, strength: this bundle derives its table itself"):
        run_tiny(bundle, eta=0.0)
    with pytest.raises(ValueError, match="num_inference_steps: 0"):
        run_tiny(bundle, num_inference_steps=0)
    with pytest.raises(ValueError, match="uncond_kwargs: given, but this bundle was exported without guidance"):
        OrtSampler(bundle)(3, seeds=5, labels=LABELS.numpy(), uncond_kwargs={"labels": LABELS.numpy()})
    with pytest.raises(ValueError, match="quadratic"):
        export_tiny(tmp_path / "other", DDIMConfig(timestep_spacing="quadratic"), bake_schedule=True)
    assert os.listdir(tmp_path) == ["bundle"]


@pytest.mark.parametrize("largest_topk", [step_module.LARGEST_TOPK, 0], ids=["topk", "bisection"])
@pytest.mark.parametrize("n", [2, 7, 100, 3000])
def test_thresholds_are_torchs_quantile(largest_topk, n, monkeypatch):
    monkeypatch.setattr(step_module, "LARGEST_TOPK", largest_topk)
    for ratio, maximum, spread in itertools.product((0.0, 0.5, 0.995, 1.0), (1.2, 2.0, 9.0), (0.3, 1.0, 5.0)):
        x0 = spread * torch.randn(3, n, generator=torch.Generator().manual_seed(n))
        # Ties at the quantile.
        x0[0] = x0[0].round()
        limit = DynamicThreshold(ratio, maximum)
        rank = step_module.find_rank(limit, n)
        assert (rank is None) == (largest_topk == 0)
        quantile = functools.partial(step_module.quantile_in_graph, rank=rank)
        ours, theirs = apply_limit(x0.clone(), limit, quantile), apply_limit(x0.clone(), limit)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-7)


class Given(torch.nn.Module):
    """The model's output is an input."""

    def forward(self, x, t, output):
        return output.clone()


BROKEN = {
    "none": (DDIMConfig(clip_sample=False), True),
    "clip": (DDIMConfig(), False),
    "clip, guided": (DDIMConfig(), True),
    "fixed": (DDIMConfig(thresholding=True, sample_max_value=0.5), False),
    "threshold": (DDIMConfig(thresholding=True, sample_max_value=1.5, dynamic_thresholding_ratio=0.9), True),
    "bisection": (DDIMConfig(thresholding=True, sample_max_value=1.5, dynamic_thresholding_ratio=0.9), False),
}


def node_kinds(graphs):
    """The operators in graphs and the graphs inside them."""
    kinds = set()
    for node in (node for graph in graphs for node in graph.node):
        kinds.add(node.op_type)
        kinds |= node_kinds(attribute.g for attribute in node.attribute if attribute.HasField("g"))
    return kinds


@pytest.mark.parametrize("name", BROKEN)
def test_infinities_nan_and_columns_of_zero_end_as_in_the_reference(tmp_path, name, monkeypatch):
    """Whatever a file's operations make of them: where terms are left out, where infinities cancel, what NaN spreads to."""
    config, guided = BROKEN[name]
    if name == "bisection":
        monkeypatch.setattr(step_module, "LARGEST_TOPK", 0)
    options = ExportOptions(kind="step", guided=guided, stochastic=True)
    examples = {"output": torch.zeros(3, 3, 5)}
    bundle = export_onnx(
        Given(), config, tmp_path / "bundle", options, sample_shape=(3, 5), example_kwargs=examples, parity_steps=()
    )
    # Of large samples the file bisects.
    assert ("TopK" in node_kinds([onnx.load(bundle.model_path).graph])) == (name == "threshold")
    session = onnxruntime.InferenceSession(bundle.model_path, providers=["CPUExecutionProvider"])
    schedule = Schedule(config)
    x, noise = (torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(seed)) for seed in range(2))
    drawn = torch.randn(4 if guided else 2, 3, 5, generator=torch.Generator().manual_seed(2))
    places = [torch.zeros(len(drawn), 3, 5, dtype=torch.bool) for _ in range(3)]
    places[0][0, 1, 2] = places[0][-1, 0, 0] = True
    places[1][0] = places[1][-1, :2] = True
    places[2][:] = True
    for value, place, rederive, kind, scale in itertools.product(
        (float("nan"), float("inf"), float("-inf")), places, (False, True), ("epsilon", "sample", "v_prediction"),
        (0.3, 0.7, 1.0, 7.5) if guided else (None,),
    ):  # fmt: skip
        output = torch.where(place, value, drawn)
        table = StepTable.build(
            schedule, schedule.pairs(10), eta=1.0, use_clipped_model_output=rederive, prediction_type=kind
        )
        rows = torch.tensor([4, 9])
        feeds = {"sample": x, "timestep": torch.tensor([3, 1]), "noise": noise}
        feeds["coefficients"] = torch.tensor(table.columns, dtype=torch.float32)[rows]
        feeds |= {"uncond_output": output[:2], "guidance_scale": torch.full((2,), scale)} if guided else {}
        actual = session.run(None, {key: tensor.numpy() for key, tensor in ({**feeds, "output": output[-2:]}).items()})
        expected = fastddim.ddim_step(
            output, x, table, rows, guidance=scale, limit=config.limit, noise=noise, backend="reference"
        )
        for found, wanted in zip(actual, expected, strict=True):
            np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-4, atol=1e-4)


def test_an_infinite_output_that_is_clipped_leaves_a_finite_step(tmp_path):
    """The oracle's numbers, for the file and the reference alike: epsilon is told from the clipped x0 alone."""
    schedule = Schedule(DDIMConfig())
    (pair,) = schedule.pairs(10)[6:7]
    table = StepTable.build(schedule, [pair], use_clipped_model_output=True)
    x, output = torch.tensor([[0.3, -0.2]]), torch.tensor([[-torch.inf, torch.inf]])
    expected = ddim(x.double().numpy(), output.double().numpy(), *schedule.alpha_bar(pair), clip=1.0, rederive=True)
    assert np.isfinite(expected.x_next).all()
    inputs = {"sample": x, "coefficients": torch.tensor(table.columns, dtype=torch.float32)}
    module = step_module.StepModule(plan_sampler(Given(), schedule, None, (2,)))
    for x_next, x0 in (module.update(output, inputs), fastddim.ddim_step(output, x, table, 0, limit=fastddim.Clip())):
        np.testing.assert_allclose(x_next, expected.x_next, rtol=1e-6)
        np.testing.assert_allclose(x0, expected.x0, rtol=1e-6)


def conditional_unet(**options):
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=12,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4, **{"in_channels": 4, "out_channels": 4, **options},
    )  # fmt: skip
    with torch.no_grad():
        unet.conv_out.weight.mul_(0.1)
    return unet.eval()


XL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 10,
}


def class_pipeline():
    """Pictures of four classes, and one that is none; damped, so that roundings do not grow, and quick to compile."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",), mid_block_type=None, up_block_types=("UpBlock2D",), num_class_embeds=5,
    )  # fmt: skip
    with torch.no_grad():
        unet.conv_out.weight.mul_(0.1)
    return diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler())


def diffusers_loop(unet, steps, start, embeds, null, scale, added, added_null):
    """diffusers' own scheduler and guidance around the model."""
    scheduler = diffusers.DDIMScheduler(clip_sample=False, steps_offset=0)
    scheduler.set_timesteps(steps)
    x = start
    for t in scheduler.timesteps:
        cond = unet(x, t, encoder_hidden_states=embeds, added_cond_kwargs=added).sample
        uncond = unet(x, t, encoder_hidden_states=null, added_cond_kwargs=added_null).sample
        x = scheduler.step(uncond + scale * (cond - uncond), t, x).prev_sample
    return x


@pytest.mark.slow
@torch.no_grad()
def test_text_conditioned_unets_give_diffusers_own_loop(tmp_path):
    """SDXL's, with its added conditions."""
    unet = conditional_unet(**XL)
    config = DDIMConfig(clip_sample=False)
    bundle = export_onnx(unet, config, tmp_path / "bundle", ExportOptions(guided=True), parity_steps=QUICK, force=False)
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(3))
    start, embeds, null = draw(2, 4, 8, 8), draw(2, 77, 12), draw(2, 77, 12)
    added, added_null = ({"text_embeds": draw(2, 10), "time_ids": draw(2, 6)} for _ in range(2))
    actual = OrtSampler(bundle)(
        start.numpy(), num_inference_steps=10, guidance_scale=5.0,
        encoder_hidden_states=embeds.numpy(), **{name: value.numpy() for name, value in added.items()},
        uncond_kwargs={"encoder_hidden_states": null.numpy(), **{name: value.numpy() for name, value in added_null.items()}},
    )  # fmt: skip
    expected = diffusers_loop(unet, 10, start, embeds, null, 5.0, added, added_null)
    np.testing.assert_allclose(actual, expected, atol=1e-4 * float(expected.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"in_channels": 9}, id="inpainting"),
        pytest.param({"num_class_embeds": 7}, id="classes", marks=pytest.mark.slow),
        pytest.param({"class_embed_type": "timestep"}, id="noise levels", marks=pytest.mark.slow),
        pytest.param({"out_channels": 8}, id="learned variance", marks=pytest.mark.slow),
    ],
)
def test_what_text_unets_take_beside_texts_is_exported(tmp_path, options):
    unet = conditional_unet(**options)
    config = DDIMConfig(clip_sample=False)
    bundle = export_onnx(unet, config, tmp_path / "bundle", ExportOptions(guided=True), parity_steps=(3,))
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(3))
    start, embeds, null = draw(2, 4, 8, 8), draw(2, 77, 12), draw(2, 77, 12)
    beside = {}
    if "in_channels" in options:
        beside = {"mask": (draw(2, 1, 8, 8) > 0).float(), "masked_image_latents": draw(2, 4, 8, 8)}
    has_labels = options.keys() & {"num_class_embeds", "class_embed_type"}
    labels = {"class_labels": torch.tensor([2, 5])} if has_labels else {}
    inputs = {item["name"] for item in bundle.manifest["inputs"]}
    assert inputs >= {*beside, *labels} and not inputs & {f"uncond_{name}" for name in {*beside, *labels}}
    actual = OrtSampler(bundle)(
        start.numpy(), num_inference_steps=4, guidance_scale=5.0, encoder_hidden_states=embeds.numpy(),
        uncond_kwargs={"encoder_hidden_states": null.numpy()},
        **{name: value.numpy() for name, value in {**beside, **labels}.items()},
    )  # fmt: skip
    for name, value in {**beside, **labels}.items():
        given = {
            "encoder_hidden_states": embeds.numpy(),
            **{key: each.numpy() for key, each in {**beside, **labels}.items()},
        }
        uncond = {"encoder_hidden_states": null.numpy(), name: value.numpy()}
        with pytest.raises(
            ValueError, match=f"uncond_kwargs: '{name}' is one input for both halves here; leave it out"
        ):
            OrtSampler(bundle)(start.numpy(), guidance_scale=5.0, uncond_kwargs=uncond, **given)
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(4)
    x = start
    for t in scheduler.timesteps:
        given = torch.cat([x, *beside.values()], 1)
        uncond, cond = (unet(given, t, states, **labels).sample[:, :4] for states in (null, embeds))
        x = scheduler.step(uncond + 5.0 * (cond - uncond), t, x).prev_sample
    np.testing.assert_allclose(actual, x, atol=1e-4 * float(x.abs().max()))


@pytest.mark.parametrize(
    ("width", "projected", "shapes"),
    # SDXL's own configurations, of the base model and the refiner.
    [(2048, 2816, (1280, 6)), (1280, 2560, (1280, 5))],
)
def test_sdxls_conditions_are_those_of_its_configuration(width, projected, shapes):
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(
            sample_size=8, block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
            cross_attention_dim=width, addition_embed_type="text_time", addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=projected,
        )  # fmt: skip
    conditions = describe(unet).conditions
    assert tuple(conditions[name].example.shape[1] for name in ("text_embeds", "time_ids")) == shapes


def test_defaults_fit_a_short_schedule(tmp_path):
    pipe = class_pipeline()
    pipe.scheduler = diffusers.DDIMScheduler(num_train_timesteps=20)
    pipe.save_pretrained(tmp_path / "model")
    assert main(["export", "onnx", str(tmp_path / "model"), "--out", str(tmp_path / "bundle")]) == 0
    manifest = open_bundle(tmp_path / "bundle").manifest
    assert len(manifest["table"]["timesteps"]) == 20
    assert {entry["steps"] for entry in manifest["parity"]} == {1, 10, 20}
    worked = mock.patch.object(exporter, "write_sampler", side_effect=AssertionError("work was done first"))
    with worked, pytest.raises(ValueError, match=r"parity_steps: 21; pass an integer in \[1, 20\]"):
        export_onnx(pipe.unet, pipe.scheduler, tmp_path / "other", parity_steps=(1, 21))


def test_channels_of_another_kind_are_refused():
    with pytest.raises(ValueError, match=r"model: 6 channels, 3 of them the sample's, cannot be exported"):
        describe(small_unet(in_channels=6, out_channels=3))
    with pytest.raises(ValueError, match=r"model: 8 channels, 4 of them the sample's, cannot be exported"):
        describe(conditional_unet(in_channels=8))


@pytest.mark.slow
def test_transformers_with_a_learned_variance_export_their_mean(tmp_path):
    torch.manual_seed(0)
    dit = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=2, out_channels=4, num_layers=1, sample_size=4,
        patch_size=2, num_embeds_ada_norm=6, norm_num_groups=2,
    ).eval()  # fmt: skip
    bundle = export_onnx(dit, DDIMConfig(), tmp_path / "bundle", ExportOptions(guided=True), parity_steps=QUICK)
    assert bundle.manifest["sampling"]["null_values"] == {"class_labels": 6}
    labels = np.array([0, 3])
    sampler = OrtSampler(bundle)
    for bad in (-1, 7):
        with pytest.raises(
            ValueError, match=rf"class_labels: \[0, {bad}\]; pass integers in \[0, 6\] \(6 is no class\)"
        ):
            sampler(2, seeds=0, guidance_scale=2.0, class_labels=np.array([0, bad]))
    actual = sampler(2, seeds=0, num_inference_steps=5, guidance_scale=2.0, class_labels=labels)
    sampler = Sampler(
        lambda x, t, class_labels: dit(x, timestep=t, class_labels=class_labels).sample[:, :2],
        DDIMConfig(), 5, guidance_scale=2.0, sample_shape=(2, 4, 4),
    )  # fmt: skip
    expected = sampler(
        2, seeds=0, class_labels=torch.from_numpy(labels), uncond_kwargs={"class_labels": torch.tensor([6, 6])}
    )
    np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_action_sequences_of_a_policy(tmp_path):
    torch.manual_seed(0)
    policy = ActionUNet1d(action_dim=3, obs_dim=5, channels=(16, 32), horizon=8)
    config = DDIMConfig(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2")
    observation = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    bundle = export_onnx(
        policy, config, tmp_path / "bundle", sample_shape=(8, 3), example_kwargs={"observation": observation},
        parity_steps=(1, 10),
    )  # fmt: skip
    assert bundle.manifest["sample"]["layout"] == "N..."
    actual = OrtSampler(bundle)(4, seeds=2, num_inference_steps=10, observation=observation.numpy())
    expected = Sampler(policy, config, 10, sample_shape=(8, 3))(4, seeds=2, observation=observation)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_half_precision_weights_keep_a_float32_state(tmp_path):
    exact = sample_tiny(DDIMConfig(), 8, guidance_scale=2.0)
    labels = torch.from_numpy(np.resize(LABELS.numpy(), 3))
    torch_half = Sampler(Tiny().half(), DDIMConfig(), 8, sample_shape=SHAPE, guidance_scale=2.0)(
        3, seeds=5, labels=labels, uncond_kwargs={"labels": torch.zeros_like(labels)}
    )
    # What is hoisted is rounded to the weights' dtype, as torch rounds it; without that ONNX Runtime rounds less.
    bounds = {True: float((torch_half - torch.from_numpy(exact)).abs().max()), False: 5e-3}
    for hoist, bound in bounds.items():
        bundle = export_tiny(tmp_path / f"{hoist}", dtype="float16", guided=True, hoist=hoist)
        model = onnx.load(bundle.model_path)
        (loop,) = (node for node in model.graph.node if node.op_type == "Loop")
        weights = {tensor.name: tensor.data_type for tensor in loop.attribute[0].g.initializer if tensor.dims}
        assert onnx.TensorProto.FLOAT16 in weights.values()
        actual = run_tiny(bundle, num_inference_steps=8, guidance_scale=2.0)
        assert actual.dtype == np.float32
        np.testing.assert_allclose(actual, exact, rtol=0, atol=bound)


@pytest.mark.slow
@pytest.mark.parametrize("graph", ["loop", "step"])
def test_bfloat16_weights_are_compared_in_float32(tmp_path, graph, monkeypatch):
    unet = attention_unet()
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    options = ExportOptions(kind=graph, dtype="bfloat16")
    if graph == "loop":
        monkeypatch.setattr(exporter, "_LARGEST_FILE", 1000)
    bundle = export_onnx(unet, DDIMConfig(), tmp_path / "bundle", options, parity_steps=QUICK)
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    model = onnx.load(bundle.model_path)
    weights = [
        tensor.data_type
        for graph_ in [model.graph, *(a.g for node in model.graph.node for a in node.attribute if a.HasField("g"))]
        for tensor in graph_.initializer
        if tensor.name.endswith("weight")
    ]
    assert weights and set(weights) == {onnx.TensorProto.BFLOAT16}
    assert max(entry["largest_error"] for entry in bundle.manifest["parity"]) <= 2e-5
    assert [entry["steps"] for entry in verify_bundle(bundle, unet, steps=(2,))] == [2, 2]
    # The weights of the file are those of the model, rounded.
    with torch.no_grad():
        unet.conv_in.weight += 0.05
    with pytest.raises(ParityError):
        verify_bundle(bundle, unet, steps=(2,))
    with pytest.raises(ValueError, match="CPU has no bfloat16 convolutions; pass 'cuda' or 'tensorrt'"):
        OrtSampler(bundle, providers="cpu")


def test_the_model_is_left_as_it_was(tmp_path):
    model = Tiny().train()
    weight = model.conv.weight
    before = weight.detach().clone()
    export_onnx(
        model, DDIMConfig(), tmp_path / "bundle", ExportOptions(dtype="float16"), sample_shape=SHAPE,
        example_kwargs={"labels": LABELS}, parity_steps=(1,),
    )  # fmt: skip
    assert model.training and model.conv.weight is weight and weight.requires_grad
    assert weight.dtype == torch.float32 and torch.equal(weight, before)


def test_weights_that_one_file_cannot_hold_lie_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(exporter, "_LARGEST_FILE", 1000)
    model = Tiny(channels=24)
    bundle = export_onnx(
        model, DDIMConfig(), tmp_path / "bundle", sample_shape=(24, 6, 6), example_kwargs={"labels": LABELS},
        parity_steps=QUICK,
    )  # fmt: skip
    assert sorted(bundle.manifest["files"]) == ["README.md", "model.onnx", "model.onnx.data"]
    assert bundle.manifest["files"]["model.onnx.data"]["bytes"] >= 4 * model.conv.weight.numel()
    actual = OrtSampler(bundle)(3, seeds=5, num_inference_steps=5, labels=LABELS.numpy())
    expected = Sampler(model, DDIMConfig(), 5, sample_shape=(24, 6, 6))(3, seeds=5, labels=LABELS)
    np.testing.assert_allclose(actual, expected, atol=2e-5)


@pytest.mark.slow
def test_the_same_export_gives_the_same_bytes(tmp_path):
    first, second = (export_tiny(tmp_path / name, guided=True, bake_schedule=True) for name in "ab")
    assert first.model_path.read_bytes() == second.model_path.read_bytes()
    assert b"test_export" not in first.model_path.read_bytes()


def test_the_manifest_describes_the_file_and_keeps_its_schema(tmp_path):
    bundle = export_tiny(tmp_path / "bundle", guided=True, stochastic=True)
    jsonschema.Draft202012Validator.check_schema(FORMAT.schema())
    jsonschema.validate(json.loads((bundle.path / "manifest.json").read_text()), FORMAT.schema())
    graph = onnx.load(bundle.model_path).graph
    assert [(item["name"], item["shape"]) for item in bundle.manifest["inputs"]] == [
        (value.name, symbolic_dims(graph)[value.name]) for value in graph.input
    ]
    assert all(item["meaning"] for item in (*bundle.manifest["inputs"], *bundle.manifest["outputs"]))
    assert [entry["steps"] for entry in bundle.manifest["parity"]] == [*QUICK, *QUICK]
    expected = fastddim.StepTable.build(
        Schedule(DDIMConfig()), Schedule(DDIMConfig()).pairs(50), use_clipped_model_output=True
    )
    assert bundle.manifest["table"]["timesteps"] == list(expected.timesteps)
    assert np.array_equal(bundle.manifest["table"]["coefficients"], expected.columns)
    assert sorted(bundle.manifest["files"]) == ["README.md", "model.onnx"]


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept") / "bundle"
    export_tiny(folder, guided=True)
    return folder


@pytest.fixture
def copied(kept, tmp_path):
    return shutil.copytree(kept, tmp_path / "bundle")


DAMAGE = {
    "SHA-256": flip_a_byte,
    "bytes, the manifest says": lambda folder: (folder / "model.onnx").write_bytes(b"x"),
    "model.onnx' is missing": lambda folder: (folder / "model.onnx").unlink(),
    "manifest.json' is missing": lambda folder: (folder / "manifest.json").unlink(),
    "cannot be read": lambda folder: (folder / "manifest.json").write_text('{"format": '),
    "cannot be read: maximum recursion depth": lambda folder: (folder / "manifest.json").write_text("[" * 10**5),
    "is no manifest of a fastddim bundle": lambda folder: (folder / "manifest.json").write_text("[]"),
    "format_version 4, this fastddim reads up to 3; update fastddim": lambda folder: edit(
        folder, lambda manifest: manifest.update(format_version=4)
    ),
    "format_version 0, this fastddim reads from 1 up to 3; write it anew: `fastddim export onnx --out": lambda folder: (
        edit(folder, lambda manifest: manifest.update(format_version=0))
    ),
    "format_version 'x'": lambda folder: edit(folder, lambda manifest: manifest.update(format_version="x")),
    r"\$.table: 'timesteps' is a required property": lambda folder: edit(
        folder, lambda manifest: manifest["table"].pop("timesteps")
    ),
    r"\$.kind: 'whole' is not one of": lambda folder: edit(folder, lambda manifest: manifest.update(kind="whole")),
    "'../model.onnx', which leads out of the folder": lambda folder: edit(
        folder, lambda manifest: manifest["files"].update({"../model.onnx": {"sha256": "", "bytes": 1}})
    ),
    "'/etc/passwd', which leads out of the folder": lambda folder: edit(
        folder, lambda manifest: manifest["files"].update({"/etc/passwd": {"sha256": "", "bytes": 1}})
    ),
    "has no 'other.onnx'": lambda folder: edit(folder, lambda manifest: manifest.update(model="other.onnx")),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_damaged_bundle_is_refused(copied, message):
    open_bundle(copied)
    DAMAGE[message](copied)
    with pytest.raises(BundleError, match=message):
        OrtSampler(copied)


def test_a_link_out_of_the_folder_is_refused(copied, tmp_path):
    outside = tmp_path / "outside.onnx"
    (copied / "model.onnx").rename(outside)
    (copied / "model.onnx").symlink_to(outside)
    with pytest.raises(BundleError, match="leads out of the folder"):
        open_bundle(copied)


def test_nothing_is_replaced_without_force(copied, tmp_path):
    with pytest.raises(FileExistsError, match="--force"):
        export_tiny(copied)
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is no bundle, so --force does not replace it"):
        export_onnx(Tiny(), DDIMConfig(), stranger, sample_shape=SHAPE, example_kwargs={"labels": LABELS}, force=True)
    assert (stranger / "thesis.txt").read_text() == "mine"
    with pytest.raises(NotADirectoryError, match=r"out: .* is no folder"):
        export_tiny(tmp_path / "none" / "bundle")
    before = open_bundle(copied).manifest["files"]
    export_onnx(
        Tiny(), DDIMConfig(), copied, sample_shape=SHAPE, example_kwargs={"labels": LABELS}, force=True,
        parity_steps=(1,),
    )  # fmt: skip
    assert open_bundle(copied).manifest["files"] != before
    assert sorted(os.listdir(tmp_path)) == ["bundle", "stranger"]


def test_a_crash_leaves_nothing_half_written(tmp_path):
    def fill(folder):
        (folder / "model.onnx").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_bundle(tmp_path / "bundle", False, fill)
    assert os.listdir(tmp_path) == []


def test_a_file_that_differs_from_torch_is_not_written(tmp_path, monkeypatch):
    real = Sampler.__call__
    monkeypatch.setattr(Sampler, "__call__", lambda *arguments, **options: real(*arguments, **options) + 1e-3)
    with pytest.raises(ParityError, match=r"differs from torch by 0\.001"):
        export_tiny(tmp_path / "bundle")
    assert os.listdir(tmp_path) == []


def test_a_bundle_is_compared_again_with_its_model(kept):
    model = Tiny()
    entries = verify_bundle(open_bundle(kept), model, example_kwargs={"labels": LABELS}, steps=(2,))
    assert [entry["batch"] for entry in entries] == [1, 3]
    with torch.no_grad():
        model.conv.weight.mul_(1.01)
    with pytest.raises(ParityError):
        verify_bundle(open_bundle(kept), model, example_kwargs={"labels": LABELS}, steps=(2,))


class FixedSize(torch.nn.Module):
    def forward(self, x, t):
        return x * 0.1 if x.shape[0] == 4 else x * 0.1 + 0.0 * float(x.shape[0])


class Unsupported(torch.nn.Module):
    def forward(self, x, t):
        return x * float(x.sum() > 0)


def test_models_that_cannot_be_exported_are_named(tmp_path):
    with pytest.raises(ExportError, match="model: Unsupported cannot be exported"):
        export_onnx(Unsupported(), DDIMConfig(), tmp_path / "bundle", sample_shape=(2, 4, 4))
    with pytest.raises(ExportError, match="model: "):
        export_onnx(FixedSize(), DDIMConfig(), tmp_path / "bundle", sample_shape=(2, 4, 4))
    with pytest.raises(ValueError, match="sample_shape: not known for a Tiny"):
        export_onnx(Tiny(), DDIMConfig(), tmp_path / "bundle")
    with pytest.raises(TypeError, match="model: function; pass a torch module"):
        export_onnx(lambda x, t: x, DDIMConfig(), tmp_path / "bundle")
    with pytest.raises(ValueError, match="dynamic_size: True for a Tiny"):
        export_tiny(tmp_path / "bundle", dynamic_size=True)
    assert os.listdir(tmp_path) == []


BAD_OPTIONS = {
    "kind: 'all' is not one of": {"kind": "all"},
    "dtype: 'int8' is not one of": {"dtype": "int8"},
    "guidance_rescale: True without guided": {"guidance_rescale": True},
    "guidance_method: 'apg' without guided; pass both": {"guidance_method": "apg"},
    "apg_eta: 0.5 with guidance_method 'cfg'": {"guided": True, "apg_eta": 0.5},
    "bake_schedule: True with kind 'step'": {"bake_schedule": True, "kind": "step"},
    "eta: 0.5 adds noise; pass stochastic=True": {"eta": 0.5},
}


@pytest.mark.parametrize("message", BAD_OPTIONS)
def test_bad_options_are_named(message):
    with pytest.raises(ValueError, match=message):
        ExportOptions(**BAD_OPTIONS[message])


BAD_CALLS = {
    "guidance_scale: None; this bundle has guidance": {"guidance_scale": None},
    "guidance_scale: .*; pass a finite number, or one for each of 3": {"guidance_scale": np.ones(2)},
    "guidance_scale: nan": {"guidance_scale": float("nan")},
    "guidance_rescale: 0.5, but this bundle was exported without it": {"guidance_rescale": 0.5},
    "eta: 0.5, but this bundle has no input for noise": {"eta": 0.5},
    "num_inference_steps: 0": {"num_inference_steps": 0},
    r"labels: int64 of shape \(2,\); pass int64 of shape \(3,\)": {"labels": np.zeros(2, dtype=np.int64)},
    "labels: float64": {"labels": np.zeros(3)},
    "class_labels: this bundle takes labels": {"class_labels": np.zeros(3)},
    "uncond_kwargs: 'labels' is missing": {"uncond_kwargs": None},
    "seeds: None": {"seeds": None},
    r"size: \(8, 8\); this bundle makes samples of \(6, 6\) alone": {"size": (8, 8)},
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_calls_are_named(kept, message):
    arguments = {
        "seeds": 0,
        "guidance_scale": 2.0,
        "labels": LABELS.numpy(),
        "uncond_kwargs": {"labels": np.zeros(3, dtype=np.int64)},
    }
    with pytest.raises(ValueError, match=message):
        OrtSampler(kept)(3, **{**arguments, **BAD_CALLS[message]})


def test_states_that_do_not_fit_are_named(kept):
    sampler = OrtSampler(kept)
    for start in (np.zeros((1, 2, 5, 6), np.float32), np.zeros((1, 2, 6, 6), np.int64), 0, True):
        with pytest.raises(ValueError, match="start: "):
            sampler(start, seeds=0, guidance_scale=1.0, labels=LABELS.numpy()[:1])


def test_providers_that_are_not_there_are_named(kept):
    with pytest.raises(ValueError, match=r"providers: 'CUDAExecutionProvider' is not among .*; pip install"):
        OrtSampler(kept, providers="cuda")


@pytest.mark.parametrize("graph", ["loop", "step"])
def test_the_step_at_which_nan_appears_is_found(tmp_path, graph):
    class Overflows(torch.nn.Module):
        def forward(self, x, t):
            # Infinite from timestep 500 down.
            return x * 0.1 + torch.where(t < 500, torch.inf, 0.0).reshape(-1, 1, 1, 1) * 1.0

    config = DDIMConfig(clip_sample=False)
    with pytest.raises(ParityError):
        export_onnx(Overflows(), config, tmp_path / "bundle", sample_shape=(1, 2, 2), parity_steps=(10,))
    options = ExportOptions(kind=graph)
    export_onnx(Overflows(), config, tmp_path / "bundle", options, sample_shape=(1, 2, 2), parity_steps=())
    sampler = OrtSampler(tmp_path / "bundle", check_finite=True)
    with pytest.raises(NotFiniteError, match=r"after step 5 \(timestep 400\)"):
        sampler(1, seeds=0, num_inference_steps=10)
    assert np.isfinite(sampler(1, seeds=0, timesteps=[900, 600])).all()
    assert np.isnan(OrtSampler(tmp_path / "bundle")(1, seeds=0, num_inference_steps=10)).any()


def test_running_a_bundle_needs_no_torch(kept):
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('torch', 'diffusers', 'triton', 'onnx'):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import numpy as np
from fastddim.export import OrtSampler
null = {{'labels': np.zeros(2, dtype=np.int64)}}
print(OrtSampler({str(kept)!r})(2, seeds=5, num_inference_steps=4, guidance_scale=2.0, labels=np.array([1, 4]),
                                uncond_kwargs=null).sum())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(
        float(sample_tiny(DDIMConfig(), 4, 2, guidance_scale=2.0).sum()), abs=1e-3
    )


def test_the_digits_from_the_shell(tmp_path, capsys):
    """The commands as a user types them: export, run, verify; the pictures are the sampler's."""
    bundle, picture = tmp_path / "digits", tmp_path / "digits.png"
    assert main(["export", "onnx", "--out", str(bundle), "--guidance", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert max(entry["largest_error"] for entry in told["parity"]) <= 1e-4
    assert {entry["steps"] for entry in told["parity"]} == {1, 10, 50}
    assert max(entry["largest_error"] for entry in told["parity"] if entry["steps"] == 1) <= 2e-6
    run = ["run", str(bundle), "--labels", "3,1,4", "--steps", "20", "--seed", "7"]
    assert main([*run, "--out", str(picture)]) == 0
    sampled = tmp_path / "sampled.png"
    sample = ["sample", "--labels", "3,1,4", "--num-images", "3", "--steps", "20", "--seed", "7"]
    assert main([*sample, "--guidance-scale", "2", "--out", str(sampled)]) == 0
    ours, theirs = (np.asarray(Image.open(path)).astype(int) for path in (picture, sampled))
    assert ours.shape == theirs.shape and np.abs(ours - theirs).max() <= 1
    capsys.readouterr()
    assert main(["verify", str(bundle)]) == 0
    assert "largest difference from torch" in capsys.readouterr().out
    assert main(["export", "onnx", "--out", str(bundle)]) == 2
    assert "exists; pass another folder, or --force" in capsys.readouterr().err
    assert main([*run, "--providers", "cuda", "--out", str(picture)]) == 2
    assert "pip install" in capsys.readouterr().err
    assert main(["export", "onnx"]) == 2
    assert "Missing option '--out'. See fastddim export onnx --help." in capsys.readouterr().err
    assert main(["run", str(tmp_path)]) == 2
    assert "manifest.json' is missing" in capsys.readouterr().err
