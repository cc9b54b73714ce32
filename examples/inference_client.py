"""A client of a fastddim model that NVIDIA's inference server serves: seeds in, a picture out.

    fastddim export onnx --guidance --bake-schedule --per-sample-steps --seeded --out digits
    fastddim export repository digits --out models
    python examples/inference_client.py --model digits --seeds 1,2,3 --steps 5,20,50 --set class_labels=3,1,4 \
        --set uncond_class_labels=10 --set guidance_scale=2 --out digits.png

Each picture is a request of its own, all sent at once, so that the server's dynamic batching joins them. The protocol is
KServe's v2 over HTTP with binary tensors, and the standard library speaks it.
"""

from __future__ import annotations

import argparse
import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastddim.noise import STREAM_INITIAL, normal_numpy
from fastddim.pictures import make_grid, save_picture

DTYPES = {"FP32": np.float32, "FP16": np.float16, "INT64": np.int64, "INT32": np.int32}
HEADER_LENGTH = "Inference-Header-Content-Length"

Array = npt.NDArray[Any]


def call(url: str, body: bytes | None = None, headers: Mapping[str, str] | None = None) -> tuple[bytes, Any]:
    """The answer's body and headers; the server's own message where it refuses."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, dict(headers or {}))) as answer:
            return answer.read(), answer.headers
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{url}: {error.code} {error.read().decode(errors='replace')}") from error


def infer(url: str, inputs: Mapping[str, tuple[str, Array]], output: str) -> Array:
    """One request of a model: `(datatype, array)` by name to the output's array."""
    raw = {name: array.astype(DTYPES[datatype]).tobytes() for name, (datatype, array) in inputs.items()}
    header = json.dumps(
        {
            "inputs": [
                {
                    "name": name,
                    "shape": list(array.shape),
                    "datatype": datatype,
                    "parameters": {"binary_data_size": len(raw[name])},
                }
                for name, (datatype, array) in inputs.items()
            ],
            "outputs": [{"name": output, "parameters": {"binary_data": True}}],
        }
    ).encode()
    headers = {HEADER_LENGTH: str(len(header)), "Content-Type": "application/octet-stream"}
    body, answered = call(f"{url}/infer", b"".join([header, *raw.values()]), headers)
    length = int(answered[HEADER_LENGTH])
    (described,) = json.loads(body[:length])["outputs"]
    array = np.frombuffer(body[length:], DTYPES[described["datatype"]])
    return array.reshape(described["shape"])


def draw(server: str, model: str, seeds: Sequence[int], values: Mapping[str, Sequence[float]]) -> Array:
    """A sample for each seed, each a request.

    Args:
        server: its HTTP address.
        model: its name.
        seeds: in [0, 2**64).
        values: the values of the other inputs, in turn for the samples.

    Raises:
        ValueError: an input without a value; RuntimeError: what the server answers.
    """
    url = f"http://{server}/v2/models/{model}"
    metadata = json.loads(call(url)[0])

    def request(k: int) -> Array:
        inputs = {}
        for item in metadata["inputs"]:
            name, shape = item["name"], [1, *item["shape"][1:]]
            if name == "seed":
                value = np.full(shape, np.array(seeds[k], dtype=np.uint64).view(np.int64))
            elif name == "sample":
                value = normal_numpy([seeds[k]], 0, shape[1:], STREAM_INITIAL)
            elif name in values:
                value = np.full(shape, values[name][k % len(values[name])])
            else:
                raise ValueError(f"{name}: has no value; pass --set {name}=NUMBER")
            inputs[name] = (item["datatype"], value)
        return infer(url, inputs, metadata["outputs"][0]["name"])

    with ThreadPoolExecutor(len(seeds)) as pool:
        return np.concatenate(list(pool.map(request, range(len(seeds)))))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="localhost:8000", help="the server's HTTP address")
    parser.add_argument("--model", required=True)
    parser.add_argument("--seeds", default="0", help="integers with commas, a picture each")
    parser.add_argument("--steps", default="20", help="integers with commas, in turn for the pictures")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=NUMBERS", help="another input's values")
    parser.add_argument("--out", type=Path, default=Path("samples.png"))
    given = parser.parse_args(arguments)
    values: dict[str, list[float]] = {"num_inference_steps": [int(count) for count in given.steps.split(",")]}
    for text in given.set:
        name, _, numbers = text.partition("=")
        values[name] = [float(number) for number in numbers.split(",")]
    samples = draw(given.server, given.model, [int(seed) for seed in given.seeds.split(",")], values)
    save_picture(make_grid(samples), given.out)
    print(f"{str(given.out)!r}: {len(samples)} pictures")


if __name__ == "__main__":
    main()
