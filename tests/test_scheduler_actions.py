"""What a user may do to a scheduler, in any order, done to ours and to diffusers': each step has diffusers' numbers.

A step that diffusers refuses is left out; one that it takes, ours takes.
"""

import copy
import pickle
import tempfile
import warnings

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import fastddim

WIDE, SINGLE = torch.float64, torch.float32
VALUES = {
    "prediction_type": ["epsilon", "sample", "v_prediction"],
    "clip_sample": [True, False, None],
    "clip_sample_range": [1.0, 0.3, 2, 0, True, np.float32(0.4), torch.tensor(0.5)],
    "thresholding": [True, False],
    "dynamic_thresholding_ratio": [0.995, 0.9, 0, 1.0, torch.tensor(0.5)],
    "sample_max_value": [1.0, 1.5, 0.5, None, 3],
    "num_train_timesteps": [1000, 500, 777, np.int64(600)],
    "timestep_spacing": ["leading", "trailing"],
    "steps_offset": [0, 1],
}
ALPHAS = {
    "power": lambda alphas: alphas**1.3,
    "float64": torch.Tensor.double,
    "float16": torch.Tensor.half,
    "bfloat16": torch.Tensor.bfloat16,
    "fewer": lambda alphas: alphas[: 2 * len(alphas) // 3],
    "strided": lambda alphas: alphas.repeat_interleave(2)[::2],
    "array": lambda alphas: alphas.detach().numpy(),
    "list": torch.Tensor.tolist,
    "parameter": torch.nn.Parameter,
    "a view of a parameter": lambda alphas: torch.nn.Parameter(alphas) * 0.99,
    "meta": lambda alphas: alphas.to("meta"),
}
WRITES = {
    "in place": lambda alphas: alphas.mul_(0.97),
    "an element": lambda alphas: alphas.__setitem__(500, 0.3),
    "data": lambda alphas: alphas.data.mul_(0.98),
    "numpy": lambda alphas: np.multiply(alphas.numpy(), 0.96, out=alphas.numpy()),
    "new data": lambda alphas: setattr(alphas, "data", alphas.data * 0.95),
    "the same memory": lambda alphas: setattr(alphas, "data", alphas.data.as_strided((len(alphas),), (0,))),
}
ENDS = [torch.tensor(1.0), torch.tensor(0.9999), torch.tensor(0.9998, dtype=WIDE), torch.tensor([0.9999]), 0.9999, 1]
TIMESTEPS = [int, np.int64, torch.tensor, lambda t: torch.tensor([t]), lambda t: np.array([t]), lambda t: t - 1000]
NOISES = {
    "generator": lambda noise: {"generator": torch.Generator().manual_seed(5)},
    "tensor": lambda noise: {"variance_noise": noise},
    "broadcast": lambda noise: {"variance_noise": noise[:1]},
    "float64": lambda noise: {"variance_noise": noise.double()},
    "float": lambda noise: {"variance_noise": 0.4},
}


def small_variance(timestep, prev_timestep):
    return torch.tensor(0.0 if prev_timestep < 0 else 1e-6)


def halved(sample):
    return 0.5 * sample


PATCHES = {"_get_variance": small_variance, "_threshold_sample": halved}


class OurSubclass(fastddim.DDIMScheduler):
    def _threshold_sample(self, sample):
        return super()._threshold_sample(sample) * 0.7


class TheirSubclass(diffusers.DDIMScheduler):
    def _threshold_sample(self, sample):
        return super()._threshold_sample(sample) * 0.7


KINDS = {
    "plain": (fastddim.DDIMScheduler, diffusers.DDIMScheduler),
    "subclass": (OurSubclass, TheirSubclass),
    "inverse": (fastddim.DDIMInverseScheduler, diffusers.DDIMInverseScheduler),
}


def unpickle(scheduler):
    return pickle.loads(pickle.dumps(scheduler))


def reload(scheduler):
    with tempfile.TemporaryDirectory() as folder:
        scheduler.save_pretrained(folder)
        return type(scheduler).from_pretrained(folder)


def convert(scheduler):
    return type(scheduler).from_config(scheduler.config)


COPIES = [copy.copy, copy.deepcopy, unpickle, reload, convert]


def attempt(function, *args):
    """The result, or the exception."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(*args)
    except Exception as error:
        return error


def assert_same(results, expected, tolerance):
    for result, wanted in zip(results, expected, strict=True):
        assert (result.dtype, result.shape, result.device) == (wanted.dtype, wanted.shape, wanted.device)
        if wanted.device.type != "meta":
            torch.testing.assert_close(result, wanted, rtol=2e-6, atol=tolerance, equal_nan=True)


class Schedulers(RuleBasedStateMachine):
    compiles = False

    @initialize(
        kind=st.sampled_from(list(KINDS)),
        prediction_type=st.sampled_from(VALUES["prediction_type"]),
        set_alpha_to_one=st.booleans(),
    )
    def make(self, kind, prediction_type, set_alpha_to_one):
        self.inverse = kind == "inverse"
        config = {"prediction_type": prediction_type, "set_alpha_to_one": set_alpha_to_one}
        self.pair = [made(**config, beta_schedule="scaled_linear", beta_end=0.012) for made in KINDS[kind]]
        self.patched, self.compiled = [], None
        self.each(lambda scheduler: scheduler.set_timesteps(10))

    def each(self, function):
        """Do the same to both; what neither takes is left out."""
        outcomes = [attempt(function, scheduler) for scheduler in self.pair]
        assert isinstance(outcomes[0], Exception) == isinstance(outcomes[1], Exception), outcomes
        return outcomes

    @rule(n=st.sampled_from([1, 5, 50, 61, 999]))
    def set_timesteps(self, n):
        self.each(lambda scheduler: scheduler.set_timesteps(n))

    @rule(n=st.sampled_from([1, 7, 50, 1000, np.int64(20)]))
    def set_steps_by_hand(self, n):
        self.each(lambda scheduler: setattr(scheduler, "num_inference_steps", n))

    @rule(data=st.data(), name=st.sampled_from(list(VALUES)), way=st.sampled_from(["attribute", "item", "register"]))
    def configure(self, data, name, way):
        value = data.draw(st.sampled_from(VALUES[name]))
        if way == "attribute":
            self.each(lambda scheduler: setattr(scheduler.config, name, value))
        elif way == "item":
            self.each(lambda scheduler: scheduler.config.__setitem__(name, value))
        else:
            self.each(lambda scheduler: scheduler.register_to_config(**{name: value}))

    @rule(way=st.sampled_from(list(ALPHAS)))
    def replace_alphas(self, way):
        self.each(lambda scheduler: setattr(scheduler, "alphas_cumprod", ALPHAS[way](scheduler.alphas_cumprod)))

    @rule(way=st.sampled_from(list(WRITES)))
    def write_to_alphas(self, way):
        with torch.no_grad():
            self.each(lambda scheduler: WRITES[way](scheduler.alphas_cumprod))

    @rule()
    def put_alphas_back(self):
        self.each(lambda scheduler: setattr(scheduler, "alphas_cumprod", torch.cumprod(scheduler.alphas, 0)))

    @rule(end=st.sampled_from(ENDS))
    def replace_end(self, end):
        name = "initial_alpha_cumprod" if self.inverse else "final_alpha_cumprod"
        self.each(lambda scheduler: setattr(scheduler, name, copy.deepcopy(end)))

    @rule(name=st.sampled_from(list(PATCHES)), undo=st.booleans())
    def patch_objects(self, name, undo):
        self.each(
            lambda scheduler: vars(scheduler).pop(name, None) if undo else setattr(scheduler, name, PATCHES[name])
        )

    @precondition(lambda self: not self.inverse)
    @rule(name=st.sampled_from(list(PATCHES)), base=st.booleans())
    def patch_classes(self, name, base):
        # torch.compile does not notice what becomes of a class.
        self.compiled = None
        for kind in [diffusers.DDIMScheduler] if base else map(type, self.pair):
            self.patched.append((kind, name, vars(kind).get(name)))
            setattr(kind, name, staticmethod(PATCHES[name]))

    @rule()
    def undo_patches_of_classes(self):
        self.compiled = None
        while self.patched:
            kind, name, before = self.patched.pop()
            if before is None:
                delattr(kind, name)
            else:
                setattr(kind, name, before)

    teardown = undo_patches_of_classes

    @rule(copied=st.sampled_from(COPIES))
    def copy(self, copied):
        made = self.each(copied)
        if not isinstance(made[0], Exception):
            self.pair, self.compiled = made, None
            if made[1].num_inference_steps is None:
                self.each(lambda scheduler: scheduler.set_timesteps(10))

    @precondition(lambda self: self.compiles and self.compiled is None)
    @rule()
    def compile(self):
        torch._dynamo.reset()
        self.compiled = [torch.compile(scheduler.step, backend="eager") for scheduler in self.pair]

    @rule(dtype=st.sampled_from([SINGLE, WIDE]))
    def add_noise(self, dtype):
        x, noise, timesteps = (
            torch.linspace(-1, 1, 12, dtype=dtype).reshape(2, 6),
            torch.ones(2, 6),
            torch.tensor([3, 400]),
        )
        results = self.each(lambda scheduler: scheduler.add_noise(x, noise, timesteps))
        if not self.inverse and not isinstance(results[1], Exception):
            assert_same(results[:1], results[1:], 2e-6)

    @rule(
        t=st.sampled_from([999, 981, 500, 333, 10, 0]),
        timestep=st.sampled_from(TIMESTEPS),
        dtypes=st.sampled_from([(SINGLE, SINGLE), (WIDE, WIDE), (SINGLE, WIDE), (WIDE, SINGLE)]),
        shapes=st.sampled_from([((2, 3, 4, 4),) * 2, ((2, 3, 4),) * 2, ((2, 3, 4), (1, 3, 4)), ((3,), (3,))]),
        eta=st.sampled_from([0, 0.0, 0.4, 0.9, np.float32(0.5), torch.tensor(0.6)]),
        noise=st.sampled_from(list(NOISES)),
        rederive=st.booleans(),
        device=st.sampled_from(["cpu"] * 7 + ["meta"]),
        default_device=st.sampled_from([None] * 5 + ["meta"]),
    )
    def step(self, t, timestep, dtypes, shapes, eta, noise, rederive, device, default_device):
        self.compare(t, timestep, dtypes, shapes, eta, noise, rederive, device, default_device)

    @invariant()
    def a_step_is_diffusers(self):
        if hasattr(self, "pair"):
            for t in (500, 10):
                self.compare(t, int, (SINGLE, SINGLE), ((2, 3, 4, 4),) * 2, 0.4, "tensor", False, "cpu", None)

    def compare(self, t, timestep, dtypes, shapes, eta, noise, rederive, device, default_device):
        generator = torch.Generator().manual_seed(t)
        sample, output, drawn = (
            torch.randn(shape, generator=generator, dtype=dtype).to(device)
            for shape, dtype in zip((*shapes, shapes[0]), (*dtypes, dtypes[0]), strict=True)
        )
        options = {} if self.inverse else {"eta": eta, "use_clipped_model_output": rederive}
        if options and bool(eta > 0):
            options |= NOISES[noise](drawn)

        def take(step):
            # Both draw the same.
            given = {name: value.clone_state() if name == "generator" else value for name, value in options.items()}
            with torch.device(default_device or "cpu"):
                return step(output, timestep(t), sample, **given, return_dict=False)

        expected = attempt(take, self.pair[1].step)
        if isinstance(expected, Exception):
            return
        results = attempt(take, (self.compiled or [self.pair[0].step])[0])
        if self.compiled and isinstance(results, Exception) and isinstance(attempt(take, self.compiled[1]), Exception):
            return
        assert not isinstance(results, Exception), results
        if self.compiled and not all(bool(wanted.isfinite().all()) for wanted in expected if not wanted.is_meta):
            return  # A trace does not see that diffusers divides by 0.
        alpha_bar = torch.as_tensor(self.pair[1].alphas_cumprod).detach()
        # Of two dtypes diffusers rounds to the narrower one first.
        tolerance = 8e-6 if SINGLE in dtypes else 4e-9
        if not alpha_bar.is_meta:
            # x0 and epsilon are divided by these, and so are their rounding errors.
            at = float(alpha_bar[int(t if timestep is not TIMESTEPS[-1] else t - 1000)])
            tolerance /= max(min(abs(at), abs(1 - at), 0.1), 1e-6) ** 0.5
        assert_same(results, expected, tolerance)


class CompiledSchedulers(Schedulers):
    compiles = True


def run(machine, examples, steps):
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=checks
        ),
    )


def test_any_actions_leave_the_numbers_diffusers():
    run(Schedulers, 40, 15)


def test_any_actions_between_compiled_steps_leave_the_numbers_diffusers():
    run(CompiledSchedulers, 2, 6)


@pytest.mark.slow
def test_many_actions_leave_the_numbers_diffusers():
    run(Schedulers, 2000, 30)


@pytest.mark.slow
def test_many_actions_between_compiled_steps_leave_the_numbers_diffusers():
    run(CompiledSchedulers, 50, 20)
