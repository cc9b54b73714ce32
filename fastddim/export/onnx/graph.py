"""ONNX graphs put together: a step's graph becomes the body of a `Loop`, which graphs of the schedule and the noise feed; or
its step becomes one node."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, compose, helper, numpy_helper

# What the loop takes one row of for each step.
LOOP_ROWS = {
    "timestep": "timesteps", "coefficients": "coefficients", "noise": "noise", "step_values": "step_values",
    "both_values": "both_values",
}  # fmt: skip


def strip(model: onnx.ModelProto) -> onnx.ModelProto:
    """Drop stack traces, comments and intermediate types, which are most of an exported file and differ between runs."""

    def strip_graph(graph: onnx.GraphProto) -> None:
        del graph.metadata_props[:]
        del graph.value_info[:]
        graph.doc_string = ""
        for item in (*graph.node, *graph.input, *graph.output, *graph.initializer):
            item.doc_string = ""
            del item.metadata_props[:]
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    strip_graph(attribute.g)

    del model.metadata_props[:]
    model.doc_string = ""
    strip_graph(model.graph)
    return model


def name_dims(graph: onnx.GraphProto, dims: Mapping[str, Sequence[str | int]]) -> None:
    """Set inputs' and outputs' shapes, by name."""
    for value in (*graph.input, *graph.output):
        if value.name in dims:
            shape = helper.make_tensor_type_proto(value.type.tensor_type.elem_type, dims[value.name])
            value.type.CopyFrom(shape)


def symbolic_dims(graph: onnx.GraphProto) -> dict[str, list[str | int]]:
    """Each input's and output's dimensions: a name where it is symbolic."""
    return {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }


def as_loop(step: onnx.ModelProto, per_sample: bool = False) -> onnx.ModelProto:
    """A `Loop` of steps: trip count `len(coefficients)`, a row of the table for each iteration.

    Args:
        step: with inputs `sample`, maybe `timestep` `[B]`, `coefficients` `[B, columns]`, maybe `previous_x0`, maybe
            `noise`, maybe `step_values` `[B, T]`, maybe `both_values` `[copies, B, F]`, maybe `step_index` `[]`, and
            others, which stay what they are for all steps, their first symbolic dimension the batch; the first output is
            the next sample, the second x0.
        per_sample: the table has rows for each sample, and says how long each goes on.

    Returns:
        Inputs `sample`, the others, and those of the rows for each step, `timesteps` `[steps]`, `coefficients`
        `[steps, columns]`, `noise` `[steps, B, ...]`, `step_values` `[steps, T]`, `both_values` `[steps, copies, B, F]`;
        output `samples`. `per_sample`: `timesteps` `[steps, B]`, `coefficients` `[steps, B, columns]`, and `going` bool
        `[steps, B]`, at least one in each row; the other samples take no part in the step.
    """
    graph = step.graph
    given = {value.name: value for value in graph.input}
    rows = {name: outer for name, outer in LOOP_ROWS.items() if name in given}
    # What each step hands on to the next one: an input, its name in the body, and the output that becomes it.
    carried = {"sample": "state", **({"previous_x0": "previous_state"} if "previous_x0" in given else {})}
    results = [output.name for output in graph.output][: len(carried)]
    others = [name for name in given if name not in rows and name not in carried and name != "step_index"]
    renamed = {**carried, "step_index": "iteration", **{name: f"step_{name}" for name in rows}}
    # Rows that all samples share, and the shape of a batch of them.
    shared = {} if per_sample else {"timestep": "batch_shape"}
    if not per_sample:
        shared |= {name: f"{name}_shape" for name in ("coefficients", "step_values") if name in given}
    before = []
    for name, outer in rows.items():
        row = renamed[name] if name not in shared and not per_sample else f"{name}_row"
        before.append(helper.make_node("Gather", [outer, "iteration"], [row], name=f"gather_{name}", axis=0))
        if name in shared:
            before.append(helper.make_node("Expand", [row, shared[name]], [renamed[name]], name=f"expand_{name}"))
    sample, own_dims = given["sample"].type, symbolic_dims(graph)
    after = [helper.make_node("Identity", ["go_on"], ["go_on_out"], name="go_on_again")]
    if per_sample:
        axes = {name: _find_symbolic(own_dims[name]) for name in others}
        chosen = [name for name, axis in axes.items() if axis is not None]
        renamed |= {name: f"active_{name}" for name in (*carried, *chosen)}
        whole = {state: renamed[name] for name, state in carried.items()} | {name: renamed[name] for name in chosen}
        whole |= {f"{name}_row": renamed[name] for name in rows}
        before += [
            helper.make_node("Gather", ["going", "iteration"], ["going_row"], name="gather_going", axis=0),
            helper.make_node("NonZero", ["going_row"], ["going_columns"], name="find_active"),
            helper.make_node("Squeeze", ["going_columns", "zero"], ["active"], name="list_active"),
            *(
                helper.make_node("Gather", [name, "active"], [part], name=f"select_{part}", axis=axes.get(name, 0))
                for name, part in whole.items()
            ),
        ]
        after += [
            helper.make_node("Transpose", ["going_columns"], ["active_rows"], name="place_active", perm=[1, 0]),
            *(
                helper.make_node("ScatterND", [state, "active_rows", result], [f"next_{state}"], name=f"keep_{state}")
                for state, result in zip(carried.values(), results, strict=True)
            ),
        ]
        results = [f"next_{state}" for state in carried.values()]
    nodes = []
    for node in graph.node:
        copied = copy.deepcopy(node)
        copied.input[:] = [renamed.get(name, name) for name in node.input]
        nodes.append(copied)
    body = helper.make_graph(
        [*before, *nodes, *after],
        "step",
        [
            helper.make_tensor_value_info("iteration", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            *(helper.make_value_info(state, sample) for state in carried.values()),
        ],
        [
            helper.make_tensor_value_info("go_on_out", TensorProto.BOOL, []),
            *(helper.make_value_info(result, sample) for result in results),
        ],
        # Within the body: ONNX Runtime is a fifth slower where it has to fetch them from outside.
        initializer=list(graph.initializer),
    )
    inputs = [given[name] for name in ("sample", *others)]
    for name, outer in rows.items():
        dims = ["steps", *own_dims[name][name in shared :]]
        inputs.append(helper.make_tensor_value_info(outer, given[name].type.tensor_type.elem_type, dims))
    constants = {"true": np.array(True), "zero": np.array([0])}
    outside = [
        helper.make_node("Shape", ["coefficients"], ["steps_shape"], name="count_steps", start=0, end=1),
        helper.make_node("Squeeze", ["steps_shape", "zero"], ["steps_count"], name="steps_count"),
    ]
    if per_sample:
        inputs.append(helper.make_tensor_value_info("going", TensorProto.BOOL, ["steps", "batch"]))
    else:
        outside.append(helper.make_node("Shape", ["sample"], ["batch_shape"], name="count_samples", start=0, end=1))
        for name in shared.keys() - {"timestep"}:
            constants[f"{name}_width"] = np.array(own_dims[name][-1:])
            parts = ["batch_shape", f"{name}_width"]
            outside.append(helper.make_node("Concat", parts, [shared[name]], name=f"shape_{name}", axis=0))
    starts, finals = ["sample"], ["samples"]
    if "previous_x0" in carried:
        # The first step does not read it; zeros are of the state's shape.
        outside += [
            helper.make_node("Shape", ["sample"], ["state_shape"], name="shape_state"),
            helper.make_node("Expand", ["silence", "state_shape"], ["no_x0"], name="fill_state"),
        ]
        constants["silence"] = np.zeros((), np.float32)
        starts, finals = [*starts, "no_x0"], [*finals, "last_x0"]
    outside.append(helper.make_node("Loop", ["steps_count", "true", *starts], finals, name="steps", body=body))
    outer_graph = helper.make_graph(
        outside,
        "loop",
        inputs,
        [helper.make_value_info("samples", sample)],
        initializer=[numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(outer_graph, opset_imports=list(step.opset_import), ir_version=step.ir_version)


def _find_symbolic(dims: Sequence[str | int]) -> int | None:
    """The first symbolic dimension: the batch."""
    return next((index for index, dim in enumerate(dims) if isinstance(dim, str)), None)


def fed_by(model: onnx.ModelProto, producer: onnx.ModelProto, prefix: str) -> onnx.ModelProto:
    """A model some of whose inputs come from another graph.

    Args:
        model: takes them.
        producer: its outputs have these inputs' names; inputs of the same name as the model's are the same inputs.
        prefix: for the names inside `producer`.

    Returns:
        The model with the producer's inputs in place of its outputs.
    """
    source = compose.add_prefix_graph(producer.graph, prefix, rename_inputs=False, rename_outputs=False)
    made = {value.name for value in source.output}
    inputs = {value.name: value for value in (*source.input, *model.graph.input) if value.name not in made}
    graph = helper.make_graph(
        [*source.node, *model.graph.node],
        model.graph.name,
        list(inputs.values()),
        list(model.graph.output),
        initializer=[*source.initializer, *model.graph.initializer],
    )
    return helper.make_model(graph, opset_imports=list(model.opset_import), ir_version=model.ir_version)


def followed_by(
    model: onnx.ModelProto, consumer: onnx.ModelProto, handed: Mapping[str, str], prefix: str
) -> onnx.ModelProto:
    """A model whose outputs go through another graph.

    Args:
        model: its inputs of the same name as the consumer's are the same inputs.
        consumer: its outputs are the result's, and may have the names of the model's.
        handed: for each of the model's outputs the consumer's input that it becomes.
        prefix: for the names inside `consumer`.
    """
    source = copy.deepcopy(model)
    for node in source.graph.node:
        node.output[:] = [handed.get(name, name) for name in node.output]
    target = compose.add_prefix_graph(consumer.graph, prefix, rename_inputs=False, rename_outputs=False)
    there = {*handed.values(), *(value.name for value in source.graph.input)}
    graph = helper.make_graph(
        [*source.graph.node, *target.node],
        source.graph.name,
        [*source.graph.input, *(value for value in target.input if value.name not in there)],
        list(target.output),
        initializer=[*source.graph.initializer, *target.initializer],
    )
    return helper.make_model(graph, opset_imports=list(model.opset_import), ir_version=model.ir_version)


def sized_noise(
    groups: onnx.ModelProto, shape: Sequence[int], name: str, fixed: Mapping[str, int], scale: float = 1.0
) -> onnx.ModelProto:
    """Noise of a shape.

    Args:
        groups: from `seed`, `group` `[groups]` and numbers to `values` `[B, 4 * groups]`.
        shape: the shape of one sample.
        name: the name of the output `[B, *shape]`.
        fixed: the numbers that are known.
        scale: a factor of the noise, rounded to float32.

    Returns:
        Inputs `seed` `[B]` and the other numbers.
    """
    size = math.prod(shape)

    def graph(nodes: list[onnx.NodeProto], outputs: Sequence[onnx.ValueInfoProto], **numbers: Any) -> onnx.ModelProto:
        weights = [numpy_helper.from_array(np.asarray(value), key) for key, value in numbers.items()]
        inputs = [] if outputs[0].name != name else [values]
        built = helper.make_graph(nodes, name, inputs, outputs, initializer=weights)
        return helper.make_model(built, opset_imports=list(groups.opset_import), ir_version=groups.ir_version)

    (values,) = groups.graph.output
    given = {value.name: value for value in groups.graph.input}
    numbers = graph(
        [
            helper.make_node("Range", ["first", "count", "stride"], ["group"], name="number_groups"),
            *(helper.make_node("Identity", [f"{key}_number"], [key], name=f"fix_{key}") for key in fixed),
        ],
        [given["group"], *(given[key] for key in fixed)],
        first=0, count=(size + 3) // 4, stride=1, **{f"{key}_number": value for key, value in fixed.items()},
    )  # fmt: skip
    shaped = graph(
        [
            helper.make_node("Slice", ["values", "start", "end", "axis"], ["elements"], name="drop_rest"),
            helper.make_node("Mul", ["elements", "scale"], ["scaled"], name="scale_noise"),
            helper.make_node("Reshape", ["scaled", "whole"], [name], name="shape_noise"),
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape])],
        start=[0], end=[size], axis=[1], whole=[-1, *shape], scale=np.float32(scale),
    )  # fmt: skip
    return fed_by(shaped, fed_by(groups, numbers, "number_"), "draw_")


def find_model_output(graph: onnx.GraphProto, step_inputs: Collection[str]) -> str | None:
    """The tensor that has the model's output in a step's graph, before it is widened to float32.

    All that only the model takes reaches the results through this tensor, and it is the last such one in which none of the
    step's own inputs has a part.

    Args:
        step_inputs: the graph's inputs that the step takes beside the model's output, the state among them.

    Returns:
        None for another graph.
    """
    needed = {value.name for value in graph.output}
    used = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            names = _names_read(node)
            needed |= names
            used.append((node, names))
    used.reverse()
    # A shape is the same whatever the values are.
    used = [(node, names) for node, names in used if node.op_type != "Shape"]
    last_use = {name: index for index, (_, names) in enumerate(used) for name in names}
    of_model = {value.name for value in graph.input if value.name not in step_inputs}
    # `sample` is the model's too, so that it cannot tell the two apart.
    of_step = {name for name in step_inputs if name != "sample"}
    live = {name for name in of_model if name in last_use}
    found = None
    for index, (node, names) in enumerate(used):
        if names & of_step:
            of_step.update(node.output)
        if names & of_model:
            of_model.update(node.output)
            live.update(name for name in node.output if name in needed)
            live = {name for name in live if last_use.get(name, len(used)) > index}
            if len(live) == 1 and not live & of_step:
                (found,) = live
    made_by = next((node for node, _ in used if found in node.output), None)
    if made_by is None:
        return None
    widened = made_by.op_type == "Cast" and any(a.name == "to" and a.i == TensorProto.FLOAT for a in made_by.attribute)
    return str(made_by.input[0]) if widened else found


def _names_read(node: onnx.NodeProto) -> set[str]:
    """What a node reads, its subgraphs included."""
    names = {name for name in node.input if name}
    for attribute in node.attribute:
        if attribute.HasField("g"):
            names.update(*(_names_read(inner) for inner in attribute.g.node))
            names.update(value.name for value in attribute.g.output)
    return names


def with_fused_step(model: onnx.ModelProto, step: onnx.NodeProto) -> onnx.ModelProto:
    """A step's graph whose step is one node, after those that its inputs need; in place.

    Args:
        step: takes tensors of the graph, the model's output among them, and gives the graph's results.
    """
    graph = model.graph
    needed = set(step.input)
    for index in reversed(range(len(graph.node))):
        if needed.intersection(graph.node[index].output):
            needed |= _names_read(graph.node[index])
        else:
            del graph.node[index]
    for index in reversed(range(len(graph.initializer))):
        if graph.initializer[index].name not in needed:
            del graph.initializer[index]
    graph.node.append(step)
    model.opset_import.append(helper.make_opsetid(step.domain, 1))
    return model


def widen(model: onnx.ModelProto) -> onnx.ModelProto:
    """A graph whose bfloat16 tensors are float32, its weights still the bfloat16 ones; in place."""

    def widen_graph(graph: onnx.GraphProto) -> None:
        casts = []
        for weight in graph.initializer:
            if weight.data_type == TensorProto.BFLOAT16:
                # Cast where it is used, so that weights beside the graph stay where they are.
                name, weight.name = weight.name, f"{weight.name}.bfloat16"
                casts.append(helper.make_node("Cast", [weight.name], [name], to=TensorProto.FLOAT))
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    widen_graph(attribute.g)
                elif node.op_type == "Cast" and attribute.i == TensorProto.BFLOAT16:
                    attribute.i = TensorProto.FLOAT
                elif attribute.HasField("t") and attribute.t.data_type == TensorProto.BFLOAT16:
                    values = numpy_helper.to_array(attribute.t).astype(np.float32)
                    attribute.t.CopyFrom(numpy_helper.from_array(values, attribute.t.name))
        nodes = [*casts, *graph.node]
        del graph.node[:]
        graph.node.extend(nodes)

    widen_graph(model.graph)
    return model
