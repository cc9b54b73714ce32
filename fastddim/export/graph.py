"""ONNX graphs put together: a step's graph becomes the body of a `Loop`, and a schedule's graph feeds the loop's table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import TensorProto, compose, helper, numpy_helper

# What the loop takes one row of for each step.
_ROWS = {"timestep": "timesteps", "coefficients": "coefficients", "noise": "noise"}


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


def as_loop(step: onnx.ModelProto) -> onnx.ModelProto:
    """A `Loop` of steps: trip count `len(timesteps)`, a row of the table for each iteration.

    Args:
        step: with inputs `sample`, `timestep` `[B]`, `coefficients` `[B, 6]`, maybe `noise`, and others, which stay what
            they are for all steps; the first output is the next sample.

    Returns:
        Inputs `sample`, `timesteps` `[steps]`, `coefficients` `[steps, 6]`, maybe `noise` `[steps, B, ...]`, the others;
        output `samples`.
    """
    graph = step.graph
    given = {value.name: value for value in graph.input}
    rows = {name: outer for name, outer in _ROWS.items() if name in given}
    renamed = {"sample": "state", **{name: f"step_{name}" for name in rows}}
    body_nodes = []
    for node in graph.node:
        copied = onnx.NodeProto()
        copied.CopyFrom(node)
        copied.input[:] = [renamed.get(name, name) for name in node.input]
        body_nodes.append(copied)
    per_sample = {"timestep": "batch_shape", "coefficients": "coefficients_shape"}
    gathers = []
    for name, outer in rows.items():
        row = f"{name}_row" if name in per_sample else renamed[name]
        gathers.append(helper.make_node("Gather", [outer, "iteration"], [row], name=f"gather_{name}", axis=0))
        if name in per_sample:
            gathers.append(helper.make_node("Expand", [row, per_sample[name]], [renamed[name]], name=f"expand_{name}"))
    go_on = helper.make_node("Identity", ["go_on"], ["go_on_out"], name="go_on_again")
    sample = given["sample"].type
    body = helper.make_graph(
        [*gathers, *body_nodes, go_on],
        "step",
        [
            helper.make_tensor_value_info("iteration", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_value_info("state", sample),
        ],
        [
            helper.make_tensor_value_info("go_on_out", TensorProto.BOOL, []),
            helper.make_value_info(graph.output[0].name, sample),
        ],
        # Within the body: ONNX Runtime is a fifth slower where it has to fetch them from outside.
        initializer=list(graph.initializer),
    )
    inputs = [value for name, value in given.items() if name not in rows]
    for name, outer in rows.items():
        kind = given[name].type.tensor_type
        dims = [dim.dim_param or dim.dim_value for dim in kind.shape.dim]
        inputs.append(
            helper.make_tensor_value_info(outer, kind.elem_type, ["steps", *(dims[1:] if name in per_sample else dims)])
        )
    constants = {"true": np.array(True), "zero": np.array([0]), "columns": np.array([6])}
    nodes = [
        helper.make_node("Shape", ["timesteps"], ["steps_shape"], name="count_steps"),
        helper.make_node("Squeeze", ["steps_shape", "zero"], ["steps_count"], name="steps_count"),
        helper.make_node("Shape", ["sample"], ["batch_shape"], name="count_samples", start=0, end=1),
        helper.make_node("Concat", ["batch_shape", "columns"], ["coefficients_shape"], name="shape_rows", axis=0),
        helper.make_node("Loop", ["steps_count", "true", "sample"], ["samples"], name="steps", body=body),
    ]
    outer_graph = helper.make_graph(
        nodes,
        "loop",
        inputs,
        [helper.make_value_info("samples", sample)],
        initializer=[numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(outer_graph, opset_imports=list(step.opset_import), ir_version=step.ir_version)


def with_schedule(loop: onnx.ModelProto, schedule: onnx.ModelProto) -> onnx.ModelProto:
    """A loop whose table comes from a graph with outputs `timesteps` and `coefficients`."""
    prefixed = compose.add_prefix(schedule, "schedule_", rename_inputs=False)
    merged = compose.merge_models(
        prefixed,
        loop,
        io_map=[("schedule_timesteps", "timesteps"), ("schedule_coefficients", "coefficients")],
    )
    model = helper.make_model(merged.graph, opset_imports=list(loop.opset_import), ir_version=loop.ir_version)
    model.graph.name = "loop"
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
