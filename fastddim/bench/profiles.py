"""What profilers say of a call: its operations, the costliest first."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple


@dataclass(frozen=True, slots=True)
class Operation:
    """An operation of a call.

    Attributes:
        name: torch's or the kernel's name; of ONNX Runtime the operator and the node's name.
        calls: how often it ran.
        self_s: seconds in it, without those in the operations that it calls.
    """

    name: str
    calls: int
    self_s: float


def torch_operations(call: Callable[[], Any], device: str) -> list[Operation]:
    """The operations of a warm call on a CPU, or its kernels on a GPU, by torch's profiler."""
    if device == "cuda":
        from fastddim.bench.gpu import device_operations

        return device_operations(call)
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
    return in_order(
        Operation(event.key, event.count, 1e-6 * event.self_cpu_time_total) for event in profiler.key_averages()
    )


def in_order(operations: Iterable[Operation]) -> list[Operation]:
    """The costliest first."""
    return sorted(operations, key=lambda each: each.self_s, reverse=True)


class Node(NamedTuple):
    """A node that ONNX Runtime ran: its operator, its name, its seconds, and whether that was in the loop's body."""

    operator: str
    name: str
    seconds: float
    in_loop: bool


def read_onnxruntime(path: Path) -> list[Node]:
    """The nodes of the last run in a file of ONNX Runtime's profiler, without the loop, which is the sum of its body's."""
    events = json.loads(path.read_text("utf-8"))
    last = [event for event in events if event["name"] == "model_run"][-1]
    nodes = [event for event in events if event["cat"] == "Node" and _within(event, last)]
    loops = [event for event in nodes if event["args"].get("op_name") == "Loop"]
    return [
        Node(
            node["args"]["op_name"],
            node["name"].removesuffix("_kernel_time"),
            1e-6 * node["dur"],
            any(_within(node, loop) for loop in loops),
        )
        for node in nodes
        if node not in loops
    ]


def _within(event: dict[str, Any], whole: dict[str, Any]) -> bool:
    start: int = event["ts"]
    inside: bool = whole["ts"] <= start and start + event["dur"] <= whole["ts"] + whole["dur"]
    return inside


def node_operations(nodes: Iterable[Node]) -> list[Operation]:
    """Operations by operator and name of the node."""
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    for node in nodes:
        seconds[f"{node.operator} {node.name}"].append(node.seconds)
    return in_order(Operation(name, len(each), sum(each)) for name, each in seconds.items())


def node_parts(nodes: Iterable[Node], of_step: Collection[str]) -> dict[str, float]:
    """Seconds in the model, in what is computed before the loop, and in the step, whose nodes have these names."""
    parts: defaultdict[str, float] = defaultdict(float)
    for node in nodes:
        parts["hoisted" if not node.in_loop else "step" if node.name in of_step else "model"] += node.seconds
    return dict(parts)


def find_step_nodes(path: Path) -> set[str]:
    """The nodes of a loop's body in an ONNX file that read a step's coefficients, or what comes of them."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    bodies = [attribute.g for node in graph.node for attribute in node.attribute if node.op_type == "Loop"]
    names = set()
    for body in bodies:
        read = {"coefficients", "noise"}
        for node in body.node:
            if read.intersection(node.input):
                names.add(node.name)
                read.update(node.output)
    return names
