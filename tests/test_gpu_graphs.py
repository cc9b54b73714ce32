"""What breaks captures on a real device alone: the same tests on a GPU and on the tape."""

import threading
import warnings

import pytest
import torch

from fastddim import DynamicThreshold
from tape import Tape
from test_loop import MODES, SHAPE, Denoiser, make

EQUAL = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu), "tape"])
def device(request, monkeypatch):
    if request.param == "tape":
        Tape().install(monkeypatch)
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


class Disturbed(Denoiser):
    """Something happens in the first of its calls that are captured."""

    def __init__(self, disturb):
        super().__init__()
        self.left = [disturb]

    def forward(self, x, t, **kwargs):
        if self.left and torch.cuda.is_current_stream_capturing():
            self.left.pop()(x)
        return super().forward(x, t, **kwargs)


def run_disturbed(device, mode, disturb):
    """Five runs with one disturbed capture, which all are right; the warnings, and whether the capture was made again."""
    expected = make(Denoiser().to(device), graph="off")(2, seeds=0)
    sampler, stream = make(Disturbed(disturb).to(device), graph=mode), torch.cuda.current_stream(device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(5):
            torch.testing.assert_close(sampler(2, seeds=0), expected, **EQUAL)
            assert torch.cuda.current_stream(device) == stream
            assert not torch.equal(torch.randn(99, device=device), torch.randn(99, device=device))
    assert not sampler.model.left and len(sampler.graphs) == 1
    return [str(each.message) for each in caught if "graph:" in str(each.message)]


@pytest.mark.parametrize("mode", MODES)
def test_after_a_failed_capture_random_numbers_and_captures_go_on(device, mode):
    (said,) = run_disturbed(device, mode, lambda x: x.sum().item())
    assert said.endswith("(to be tried again)")


@pytest.mark.parametrize("mode", MODES)
def test_another_thread_that_synchronises_within_a_capture(device, mode):
    def synchronise():
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            refused.append(error)

    def disturb(x):
        thread = threading.Thread(target=synchronise)
        thread.start()
        thread.join(60)
        assert not thread.is_alive()

    refused = []
    # A driver may let it pass.
    said = run_disturbed(device, mode, disturb)
    assert len(said) <= 1 and all(each.endswith("(to be tried again)") for each in said)
    assert refused or not said


def test_forty_shapes_through_two_captures_take_no_more_memory_each_time(device):
    sampler = make(Denoiser().to(device), 2, graph="step", max_graphs=2)
    rounds = []
    for _ in range(3):
        allocated, reserved = [], []
        for batch in range(1, 41):
            sampler.warmup(torch.zeros(batch, *SHAPE))
            assert len(sampler.graphs) <= 2
            allocated.append(torch.cuda.memory_allocated(device))
            reserved.append(torch.cuda.memory_reserved(device))
        sampler.graphs.clear()
        rounds.append((torch.cuda.memory_allocated(device), allocated, max(reserved)))
    # The first one also initialises libraries.
    assert rounds[2] <= rounds[1] and rounds[2][1] == rounds[1][1]
    assert rounds[2][0] < min(rounds[2][1])


@pytest.mark.parametrize("mode", MODES)
def test_a_capture_under_autocast_reads_the_weights_themselves(device, mode):
    model = Denoiser().to(device)
    sampler, eager = (make(model, graph=graph, guidance_scale=2.0) for graph in (mode, "off"))
    labels = torch.arange(2, device=device)
    call = {"class_labels": labels, "uncond_kwargs": {"class_labels": torch.full_like(labels, 10)}}
    for k in range(4):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            assert torch.is_autocast_cache_enabled()
            got, expected = sampler(2, seeds=0, **call), eager(2, seeds=0, **call)
            assert torch.is_autocast_cache_enabled()
        torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)
        # What autocast made is free, and another's.
        torch.full((1 << 20,), float("nan"), device=device)
        with torch.no_grad():
            model.conv.weight.mul_(1 + k)
    assert len(sampler.graphs) == 1


@pytest.mark.parametrize("mode", MODES)
def test_another_default_device_changes_nothing(device, mode):
    model = Denoiser().to(device)

    def results():
        sampler = make(model, graph=mode, eta=1.0, limit=DynamicThreshold(0.9, 1.5), guidance_scale=2.0)
        return [sampler(2, seeds=0, uncond_kwargs={}) for _ in range(3)], len(sampler.graphs)

    (expected, _) = results()
    with torch.device("meta"):
        got, graphs = results()
    assert graphs == 1
    for each in zip(got, expected, strict=True):
        torch.testing.assert_close(*each, rtol=0, atol=0)
