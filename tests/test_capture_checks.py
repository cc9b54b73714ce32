"""What no capture can hold, and what makes one stale."""

import pytest
import torch

from fastddim.capture_checks import ModelState, Probe


@pytest.mark.parametrize(
    "body",
    [
        lambda: torch.ones(3, device="meta").copy_(torch.ones(3)),
        lambda: torch.ones(3).to("meta"),
        lambda: torch.ones(()).to("meta"),
        # What is left to see of `torch.tensor([1.0], device=...)`.
        lambda: torch.ops.aten.lift_fresh(torch.ones(1, device="meta")),
        lambda: torch.ops.aten.index.Tensor(torch.ones(3, device="meta"), [torch.tensor([0])]),
    ],
)
def test_the_probe_notices_copies_between_host_and_device(body):
    with Probe(torch.device("meta")) as probe:
        body()
    assert "copies between the host and the device" in probe.refusal()
    assert probe.refusal().startswith(f"test_capture_checks.py:{body.__code__.co_firstlineno} ")


def test_the_probe_lets_work_on_the_host_and_numbers_from_there_pass():
    x = torch.ones(3, device="meta")
    with Probe(torch.device("meta")) as probe:
        n = int(torch.ones(3).sum().item()) + len(torch.ones(3).nonzero())
        (x * torch.tensor(2.0) + n).add_(x)
    assert probe.refusal() is None


def test_the_probe_notices_memory_that_only_the_call_held():
    x = [torch.ones(3)]
    with Probe(torch.device("cpu")) as probe:
        x[0] = x[0] * 2
    assert "test_capture_checks.py" in probe.refusal() and "memory that is freed" in probe.refusal()
    with Probe(torch.device("cpu")) as probe:
        x[0].mul_(2).add_(x[0].clone().abs())
    assert probe.refusal() is None


def make_module():
    return torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 3, bias=False))


def replace_parameter(module):
    module[0].weight = torch.nn.Parameter(torch.zeros(3, 3))


def move_parameter(module):
    module[0].weight.data = module[0].weight.data.clone()


def replace_buffer(module):
    module[1].running_mean = torch.zeros(3)


def replace_submodule(module):
    module[2] = torch.nn.Linear(3, 3)


def add_submodule(module):
    module.append(torch.nn.ReLU())


def add_parameter(module):
    module[2].bias = torch.nn.Parameter(torch.zeros(3))


def remove_submodule(module):
    del module[2]


def switch_mode(module):
    module[1].eval()


def set_up_otherwise(module):
    module[0].processor = object()


def cast(module):
    module.half()


def hook(module):
    module[0].register_forward_pre_hook(lambda module, given: None)


def replace_number(module):
    module[1].eps = 0.5


def replace_plain_tensor(module):
    module.condition = torch.ones(1)


def tensor_for_a_number(module):
    module[1].eps = torch.ones(2)


@pytest.mark.parametrize(
    "change",
    [
        replace_parameter,
        move_parameter,
        replace_buffer,
        replace_submodule,
        add_submodule,
        add_parameter,
        remove_submodule,
        switch_mode,
        set_up_otherwise,
        cast,
        hook,
        replace_number,
        replace_plain_tensor,
        tensor_for_a_number,
    ],
)
def test_what_makes_a_capture_stale(change):
    module = make_module()
    module.condition = torch.ones(1)
    state = ModelState(module)
    assert state.difference() is None
    change(module)
    assert state.difference() is not None


def test_a_setting_that_is_replaced_makes_a_capture_stale():
    module = make_module()
    module[0].processor = object()
    state = ModelState(module)
    assert state.difference() is None
    module[0].processor = object()
    assert state.difference() is not None


def test_weights_that_change_in_place_keep_a_capture():
    module = make_module()
    state = ModelState(module)
    with torch.no_grad():
        module[0].weight.mul_(2)
    module.load_state_dict(make_module().state_dict())
    assert state.difference() is None
