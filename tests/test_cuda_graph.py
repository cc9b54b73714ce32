"""Graphs and their cache: without a device the body is called; the capture itself runs over stand-ins for CUDA."""

import contextlib
import inspect
import threading
from unittest import mock

import pytest
import torch

from fastddim import cuda_graph
from fastddim.cuda_graph import CaptureError, Graph, GraphCache

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


class Entry:
    def __init__(self, nbytes=1):
        self.nbytes = nbytes


def test_without_a_device_the_body_is_called_once_before_and_at_every_replay():
    calls = []
    graph = Graph(lambda: calls.append(1), CPU)
    assert len(calls) == 1 and graph.nbytes == 0
    graph.replay()
    assert len(calls) == 2


@pytest.fixture
def stand_ins(monkeypatch):
    """torch.cuda's names with their real signatures, so that a call they would refuse fails."""
    log = []
    stream = mock.create_autospec(torch.cuda.Stream, instance=True)
    stream.wait_stream.side_effect = lambda other: log.append("wait")
    graph = mock.create_autospec(torch.cuda.CUDAGraph, instance=True)
    graph.replay.side_effect = lambda: log.append("replay")

    @contextlib.contextmanager
    def capture(cuda_graph, pool=None, stream=None, capture_error_mode="global"):
        log.append(f"capture {pool} {capture_error_mode}")
        yield
        log.append("captured")

    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    reserved = iter([100, 164])
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: next(reserved))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
    for name in ("_cuda_clearCublasWorkspaces", "_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, lambda *given, name=name: log.append((name, *given)), raising=False)
    return log


CLEARED = ("_cuda_clearCublasWorkspaces",)


def test_a_capture_follows_the_warm_up_and_replays_do_not_call_the_body(stand_ins):
    graph = Graph(lambda: stand_ins.append("body"), CUDA)
    captured = [CLEARED, "capture (0, 7) thread_local", "body", "captured", CLEARED]
    assert stand_ins == ["wait", "body", "body", *captured, "wait"]
    assert graph.nbytes == 64
    graph.replay()
    assert stand_ins[-1] == "replay" and stand_ins.count("body") == 3


def test_torchs_own_capture_takes_these_arguments():
    given = {"cuda_graph", "pool", "stream", "capture_error_mode"}
    assert given <= inspect.signature(torch.cuda.graph).parameters.keys()


def test_what_fails_in_the_capture_is_a_capture_error_with_the_reason(stand_ins):
    calls = []

    def body():
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines")

    with pytest.raises(
        CaptureError, match=r"^RuntimeError: operation not permitted when stream is capturing$"
    ) as raised:
        Graph(body, CUDA)
    assert isinstance(raised.value.__cause__, RuntimeError)
    assert stand_ins[-1] == "wait"


def test_running_out_of_memory_before_the_capture_is_a_capture_error(stand_ins):
    def body():
        raise torch.cuda.OutOfMemoryError("no 2 GiB left")

    with pytest.raises(CaptureError, match="no 2 GiB left") as raised:
        Graph(body, CUDA)
    assert isinstance(raised.value.__cause__, torch.cuda.OutOfMemoryError)


def test_the_models_own_error_in_the_warm_up_stays_its_own(stand_ins):
    def body():
        raise KeyError("encoder_hidden_states")

    with pytest.raises(KeyError):
        Graph(body, CUDA)


def test_the_least_recently_used_is_dropped():
    cache = GraphCache(max_entries=3)
    built = []

    def get(key):
        def build():
            built.append(key)
            return Entry(10 * key)

        return cache.get(key, build)

    first = get(1)
    get(2), get(3)
    assert get(1) is first
    get(4)
    assert cache.keys() == [3, 1, 4] and len(cache) == 3
    assert cache.nbytes == 80
    get(2)
    assert built == [1, 2, 3, 4, 2]
    cache.clear()
    assert len(cache) == 0 and cache.nbytes == 0


def test_a_build_that_fails_leaves_nothing_behind():
    cache = GraphCache()
    with pytest.raises(CaptureError):
        cache.get(1, mock.Mock(side_effect=CaptureError("no")))
    assert len(cache) == 0


def test_turns_exclude_each_other():
    cache, inside, most = GraphCache(), [0], [0]

    def run():
        for _ in range(50):
            with cache.turn(CPU):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                inside[0] -= 1

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


def test_a_turn_waits_for_the_one_before_it_on_any_stream(monkeypatch):
    stream = mock.create_autospec(torch.cuda.Stream, instance=True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    cache = GraphCache(max_entries=1)
    with cache.turn(CUDA):
        cache.get(1, Entry)
    stream.wait_event.assert_not_called()
    done = stream.record_event.return_value
    with pytest.raises(ZeroDivisionError), cache.turn(CUDA):
        raise ZeroDivisionError
    stream.wait_event.assert_called_once_with(done)
    assert stream.record_event.call_count == 2
    with cache.turn(CUDA):
        cache.get(2, Entry)
    # What is dropped may still be in use on another stream.
    done.synchronize.assert_called_once_with()


@pytest.mark.gpu
def test_a_capture_on_a_gpu_replays_over_new_inputs():
    x = torch.ones(4, device="cuda")
    y = torch.zeros(4, device="cuda")
    graph = Graph(lambda: y.copy_(x * 2), torch.device("cuda", torch.cuda.current_device()))
    x.fill_(3)
    graph.replay()
    assert y.tolist() == [6.0] * 4


@pytest.mark.gpu
def test_a_body_that_waits_for_the_device_cannot_be_captured():
    x = torch.ones(4, device="cuda")
    with pytest.raises(CaptureError):
        Graph(lambda: x.sum().item(), torch.device("cuda", torch.cuda.current_device()))
    assert cuda_graph._CAPTURING.acquire(blocking=False)
    cuda_graph._CAPTURING.release()
    assert Graph(lambda: x.add_(1), torch.device("cuda", torch.cuda.current_device())).nbytes >= 0
