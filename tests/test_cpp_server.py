"""cpp/examples/server.cpp under sanitizers: every answer against Python's `OrtSampler`, and every way to misuse it."""

import http.client
import io
import json
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL.Image
import pytest
import torch
from cpp_driver import build

import fastddim
from fastddim import DDIMConfig
from fastddim.export import ExportOptions, OrtSampler, export_onnx
from flow import export_class_flow
from unets import small_unet

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

# Only ends a test that hangs.
WAIT_S = 240
# Steps of a run that outlasts what the tests do meanwhile: seconds on an idle machine.
LONG = 10_000


@pytest.fixture(scope="session")
def program():
    return build("checked", "server") / "server"


class Shaded(torch.nn.Module):
    """Fast to export, with a number as its condition."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x, t, shade):
        return torch.tanh(self.conv(x)) + (torch.cos(t.to(x.dtype) / 200) - shade)[:, None, None, None]


def export_tiny(path):
    torch.manual_seed(0)
    unet = small_unet(sample_size=(8, 12), in_channels=3, out_channels=3, add_attention=False, num_class_embeds=5)
    options = ExportOptions(num_inference_steps=3)
    return export_onnx(unet, DDIMConfig(num_train_timesteps=LONG), path, options, parity_steps=()).path


def export_shaded(path):
    options = ExportOptions(num_inference_steps=3, kind="step", stochastic=True)
    return export_onnx(
        Shaded(), DDIMConfig(clip_sample_range=1.5), path, options, sample_shape=(1, 5, 9),
        example_kwargs={"shade": torch.zeros(3)}, parity_steps=(),
    ).path  # fmt: skip


def export_digits(path):
    pipe = fastddim.load_pipeline()
    return export_onnx(
        pipe.unet,
        pipe.scheduler,
        path,
        ExportOptions(guided=True, guidance_rescale=True, stochastic=True),
        parity_steps=(),
    ).path


@pytest.fixture(scope="session")
def bundles(tmp_path_factory):
    """Bundles by name, each exported at its first use."""
    folder = tmp_path_factory.mktemp("bundles")
    recipes = {
        "tiny": export_tiny,
        "shaded": export_shaded,
        "digits": export_digits,
        "flow": lambda path: export_class_flow(path).path,
    }

    def get(name):
        path = folder / name
        return path if path.exists() else recipes[name](path)

    return get


class Server:
    """A running server."""

    def __init__(self, program, bundle, folder, *options):
        self.log = folder / "log"
        command = [program, bundle, "--port", "0", "--threads", "1", "--timeout", str(WAIT_S), *map(str, options)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        line = self.process.stdout.readline()
        assert line.startswith("listening on http://127.0.0.1:"), (line, self.log.read_text())
        self.port = int(line.rsplit(":", 1)[1])

    def connect(self):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT_S)

    def open_socket(self, *sent):
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=WAIT_S)
        for data in sent:
            connection.sendall(data)
        return connection

    def ask(self, method, path, body=None, headers=None):
        """On a connection of its own: status, headers, body."""
        connection = self.connect()
        try:
            return exchange(connection, method, path, body, headers)
        finally:
            connection.close()

    def sample(self, fields, connection=None):
        connection = connection or self.connect()
        return exchange(connection, "POST", "/v1/sample", json.dumps(fields), {"Content-Type": "application/json"})

    def metrics(self):
        status, headers, body = self.ask("GET", "/metrics")
        assert status == 200 and headers["Content-Type"] == "text/plain; version=0.0.4"
        return parse_metrics(body.decode())

    def occupy(self):
        """A connection whose long run a worker is at."""
        connection = self.open_socket(request_of({"seed": 1, "class_labels": 0, "num_inference_steps": LONG}))
        self.wait_for(in_flight=1)
        return connection

    def wait_for(self, **wanted):
        """Until gauges or counters have these values."""
        self.wait_until(lambda: all(self.metrics()[f"fastddim_{name}"] == value for name, value in wanted.items()))

    def wait_until(self, done):
        """Ask until the answer is yes, as long as the server runs."""
        while not done():
            assert self.process.poll() is None
            time.sleep(0.02)

    def count_log(self, text):
        """How often the log says it."""
        return self.log.read_text().count(text)

    def stop(self, which=signal.SIGTERM):
        """The exit status, which a sanitizer would change."""
        self.process.send_signal(which)
        return self.process.wait(WAIT_S)


def exchange(connection, method, path, body=None, headers=None):
    connection.request(method, path, body, headers or {})
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read()


def request_of(fields):
    body = json.dumps(fields).encode()
    head = (
        f"POST /v1/sample HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def parse_metrics(text):
    """Samples by name and labels; every line must be of Prometheus' format."""
    name, number = r"[a-zA-Z_:][a-zA-Z0-9_:]*", r"(?:[0-9.e+-]+|\+Inf)"
    values, typed = {}, {}
    assert text.endswith("\n")
    for line in text.splitlines():
        if line.startswith("#"):
            kind, metric, rest = re.fullmatch(rf"# (HELP|TYPE) ({name}) (.+)", line).groups()
            if kind == "TYPE":
                assert metric not in typed and rest in ("counter", "gauge", "histogram")
                typed[metric] = rest
            continue
        pattern = rf'({name})(\{{{name}="[^"\n]*"(?:,{name}="[^"\n]*")*\}})? ({number})'
        metric, labels, value = re.fullmatch(pattern, line).groups()
        assert metric in typed or re.sub("_(bucket|sum|count)$", "", metric) in typed
        key = metric + (labels or "")
        assert key not in values
        values[key] = float(value)
    return values


@pytest.fixture
def serve(program, bundles, tmp_path):
    """Starts servers of bundles; those that run at the end must stop well."""
    servers = []

    def start(name, *options):
        folder = tmp_path / str(len(servers))
        folder.mkdir()
        servers.append(Server(program, bundles(name), folder, *options))
        return servers[-1]

    yield start
    for server in servers:
        if server.process.poll() is None:
            assert server.stop() == 0, server.log.read_text()[-4000:]
        server.process.stdout.close()


def pixels(png):
    with PIL.Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        return np.asarray(image)


def expected_pixels(sampler, requests, low=-1.0, high=1.0):
    """The pictures of a list of requests, sampled in batches by their steps and eta."""
    groups = {}
    for k, request in enumerate(requests):
        groups.setdefault((request.get("num_inference_steps"), request.get("eta")), []).append(k)
    result = [None] * len(requests)
    for (steps, eta), group in groups.items():
        columns = {}
        for k in group:
            for name, value in requests[k].items():
                if name not in ("num_inference_steps", "eta", "seed"):
                    columns.setdefault(name, []).append(value)
        seeds = [int(requests[k]["seed"]) for k in group]
        arrays = {
            name: np.array(values, dtype=np.int64 if name == "class_labels" else np.float32)
            for name, values in columns.items()
        }
        samples = sampler(len(group), seeds=seeds, num_inference_steps=steps, eta=eta, **arrays)
        levels = ((samples - low) * (255 / (high - low))).clip(0, 255)
        for k, picture in zip(group, levels, strict=True):
            result[k] = picture[0] if picture.shape[0] == 1 else picture.transpose(1, 2, 0)
    return result


def assert_pictures(pictures, expected):
    for picture, levels in zip(pictures, expected, strict=True):
        assert picture.shape == levels.shape
        assert np.abs(picture.astype(np.float64) - levels).max() <= 1


def drive(server, requests, threads=16, stop=None):
    """All requests from as many clients as there are threads: index -> (status, headers, body).

    A client keeps its connection as long as the server does. With `stop`, nothing new is asked once it is set.
    """
    answers = {}
    todo = iter(enumerate(requests))
    lock = threading.Lock()

    def client():
        connection = server.connect()
        while True:
            with lock:
                k, fields = next(todo, (None, None))
            if k is None or (stop is not None and stop.is_set()):
                break
            answers[k] = server.sample(fields, connection)
            if answers[k][1]["Connection"] == "close":
                break
            if answers[k][0] == 503:
                time.sleep(0.02)
        connection.close()

    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(client) for _ in range(threads)]:
            done.result()
    return answers


def draw_requests(count, seed=0):
    draw = random.Random(seed)
    return [
        {"seed": draw.choice((k, str(draw.getrandbits(64)))), "class_labels": draw.randrange(5),
         **({"num_inference_steps": steps} if (steps := draw.choice((None, 2, 3, 5))) else {})}
        for k in range(count)
    ]  # fmt: skip


def check_answers(answers, requests, bundle):
    """That pictures are their own requests', and all else a refusal; how many there are of each status."""
    good = [k for k, (status, _, _) in answers.items() if status == 200]
    expected = expected_pixels(OrtSampler(bundle), [requests[k] for k in good])
    assert_pictures([pixels(answers[k][2]) for k in good], expected)
    for k, (status, headers, _) in answers.items():
        assert status in (200, 503)
        if status == 503:
            assert int(headers["Retry-After"]) >= 1
        else:
            assert headers["Content-Type"] == "image/png", requests[k]
    return Counter(status for status, _, _ in answers.values())


def test_pictures_of_other_requests_would_be_noticed(bundles):
    expected = expected_pixels(OrtSampler(bundles("tiny")), draw_requests(200))
    nearest = min(np.abs(a - b).max() for k, a in enumerate(expected) for b in expected[:k])
    assert nearest > 3


def test_a_thousand_requests_by_sixteen_clients(serve, bundles):
    server = serve("tiny", "--workers", 2)
    requests = draw_requests(1000)
    answers = drive(server, requests)
    assert check_answers(answers, requests, bundles("tiny")) == {200: 1000}
    server.wait_for(in_flight=0, connections=1)
    values = server.metrics()
    assert values['fastddim_requests_total{path="/v1/sample",status="200"}'] == 1000
    assert values["fastddim_latency_seconds_count"] == 1000
    assert values["fastddim_queue_length"] == values["fastddim_abandoned_total"] == 0
    assert server.stop() == 0
    assert server.count_log(" 200 POST /v1/sample ") == 1000


def test_a_small_queue_refuses_and_loses_nothing(serve, bundles):
    server = serve("tiny", "--queue", 2, "--max-batch", 2)
    requests = draw_requests(300, seed=1)
    counts = check_answers(drive(server, requests), requests, bundles("tiny"))
    assert counts[200] > 20 and counts[503] > 20 and counts.total() == 300
    values = server.metrics()
    for status in (200, 503):
        assert values[f'fastddim_requests_total{{path="/v1/sample",status="{status}"}}'] == counts[status]


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_what_was_accepted_end(serve, bundles, which):
    server = serve("tiny", "--workers", 2)
    requests = draw_requests(5000, seed=2)

    def interrupt():
        server.wait_until(lambda: server.count_log(" 200 POST /v1/sample ") > 50)
        server.process.send_signal(which)

    with ThreadPoolExecutor(1) as pool:
        interrupted = pool.submit(interrupt)
        # An answer that does not come, or half of one, is an exception.
        answers = drive(server, requests)
        interrupted.result()
    assert server.process.wait(WAIT_S) == 0
    counts = check_answers(answers, requests, bundles("tiny"))
    assert counts[200] > 50 and counts.total() < 5000
    # Each client's last answer, and no other, came with the end of its connection.
    assert sum(headers["Connection"] == "close" for _, headers, _ in answers.values()) == 16
    assert server.count_log(" 200 POST /v1/sample ") == counts[200]
    with pytest.raises(ConnectionRefusedError):
        server.ask("GET", "/healthz")


def test_a_stopping_server_says_so_and_a_second_signal_ends_it(serve):
    server = serve("tiny", "--max-steps", LONG)
    idle = server.connect()
    assert exchange(idle, "GET", "/healthz")[0] == 200
    busy = server.occupy()
    server.process.send_signal(signal.SIGTERM)
    server.wait_until(lambda: server.count_log("stopping: 1 requests"))
    status, headers, _ = exchange(idle, "GET", "/healthz")
    assert (status, headers["Connection"]) == (503, "close")
    assert server.stop() == 128 + signal.SIGTERM
    busy.close()


@pytest.mark.slow
def test_digits_with_guidance_noise_and_rescale(serve, bundles):
    server = serve("digits")
    requests = [
        {"seed": 2**64 - 1 - k, "class_labels": k, "guidance_scale": 1.5 + k / 2, "guidance_rescale": 0.1 * (k % 3),
         "num_inference_steps": 10, "eta": 0.5 * (k % 2)}
        for k in range(11)
    ]  # fmt: skip
    with ThreadPoolExecutor(11) as pool:
        answers = list(pool.map(server.sample, requests))
    assert {status for status, _, _ in answers} == {200}
    pictures = [pixels(body) for _, _, body in answers]
    assert pictures[0].shape == (16, 16)
    assert_pictures(pictures, expected_pixels(OrtSampler(bundles("digits")), requests))
    # Without a rescale it is 0, and without steps the bundle's own 50.
    plain = {"seed": 5, "class_labels": 3, "guidance_scale": 2}
    (levels,) = expected_pixels(OrtSampler(bundles("digits")), [plain])
    assert_pictures([pixels(server.sample(plain)[2])], [levels])


def test_a_class_that_the_model_lacks_spoils_no_other_request(serve, bundles):
    server = serve("tiny", "--max-batch", 8, "--max-steps", LONG)
    busy = server.occupy()
    requests = [{"seed": k, "class_labels": k} for k in range(6)]
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(server.sample, requests))
    status, _, body = answers.pop()
    assert status == 400
    assert json.loads(body)["error"].startswith("class_labels: 5; the model does not take them (indices element out of")
    assert {status for status, _, _ in answers} == {200}
    assert_pictures(
        [pixels(body) for _, _, body in answers], expected_pixels(OrtSampler(bundles("tiny")), requests[:5])
    )
    busy.close()


def test_a_graph_of_one_step_its_range_and_a_number_as_condition(serve, bundles):
    server = serve("shaded", "--max-steps", 7)
    requests = [{"seed": k, "shade": -1.5 + k / 2, "eta": 0.5 * (k % 2), "num_inference_steps": 7} for k in range(8)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(server.sample, requests))
    pictures = [pixels(body) for _, _, body in answers]
    assert pictures[0].shape == (5, 9)
    assert_pictures(pictures, expected_pixels(OrtSampler(bundles("shaded")), requests, -1.5, 1.5))
    status, _, body = server.ask("GET", "/v1/model")
    model = json.loads(body)
    assert status == 200
    assert model["kind"] == "step" and model["sample"] == {"shape": [1, 5, 9], "layout": "NCHW", "range": [-1.5, 1.5]}
    assert sorted(model["request"]) == ["eta", "num_inference_steps", "seed", "shade"]
    assert model["request"]["num_inference_steps"] == {
        "type": "integer", "minimum": 1, "maximum": 7, "default": 3, "required": False
    }  # fmt: skip


def test_a_bundle_made_from_a_table_runs_its_own_steps(serve, bundles, program):
    server = serve("flow", "--max-steps", 3)
    requests = [{"seed": k, "class_labels": k % 4, "guidance_scale": 1 + k / 2} for k in range(4)]
    answers = [server.sample(request) for request in requests]
    assert_pictures([pixels(body) for _, _, body in answers], expected_pixels(OrtSampler(bundles("flow")), requests))
    model = json.loads(server.ask("GET", "/v1/model")[2])
    assert sorted(model["request"]) == ["class_labels", "guidance_scale", "seed"]
    assert model["sampling"]["limit"] == {"kind": "clip", "bound": 1.0, "ratio": 1.0}
    status, _, body = server.sample({**requests[0], "num_inference_steps": 3})
    assert status == 400 and b"num_inference_steps" in body
    command = [program, bundles("flow"), "--port", "0", "--max-steps", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 2
    assert "was made from a table of 3 steps, and 2 are allowed; pass a larger --max-steps" in done.stderr


GOOD = b'"seed": 1, "class_labels": 2'
SEED = r"; pass an integer in \[0, 2\*\*64\), or a string of one"
STEPS = r"; pass an integer in \[1, 1000\]"
BAD_BODIES = {
    b"": "body: parse error.*unexpected end of input",
    b"{": "body: parse error",
    b"{" + GOOD: "body: parse error",
    b"{" + GOOD + b"} x": "body: parse error",
    b"{" + GOOD + b",}": "body: parse error",
    b"{" + GOOD + b"}\0": "body: a NUL byte; pass a JSON object",
    b"\xef\xbb\xbf": "body: parse error",
    b"null": "body: null; pass a JSON object",
    b"3": "body: 3; pass a JSON object",
    b"[]": r"body: \[\]; pass a JSON object",
    b'"seed"': 'body: "seed"; pass a JSON object',
    b"{}": "class_labels: missing; pass it",
    b'{"class_labels": 1}': "seed: missing; pass it",
    b'{"seed": 1}': "class_labels: missing; pass it",
    b"{" + GOOD + b', "seed": 1}': "seed: given twice; pass it once",
    b"{" + GOOD + b', "steps": 1}': '"steps": no such field; this bundle has class_labels, num_inference_steps, seed',
    b"{" + GOOD + b', "eta": 0}': '"eta": no such field',
    b"{" + GOOD + b', "guidance_scale": 2}': '"guidance_scale": no such field',
    b'{"\\u0000": 1}': r'"\\u0000": no such field',
    b'{"%b": 1}' % (b"x" * 9000): r'"x{56}\.\.\.: no such field',
    b'{"seed": -1}': "seed: -1" + SEED,
    b'{"seed": 1.0}': "seed: 1.0" + SEED,
    b'{"seed": true}': "seed: true" + SEED,
    b'{"seed": null}': "seed: null" + SEED,
    b'{"seed": 18446744073709551616}': "seed: 1.8446744073709552e[+]19" + SEED,
    b'{"seed": "18446744073709551616"}': 'seed: "18446744073709551616"' + SEED,
    b'{"seed": "-1"}': 'seed: "-1"' + SEED,
    b'{"seed": " 1"}': 'seed: " 1"' + SEED,
    b'{"seed": ""}': 'seed: ""' + SEED,
    b'{"seed": "1\\u0000"}': r'seed: "1\\u0000"' + SEED,
    b'{"seed": "\\ud83d"}': "body: parse error.*surrogate",
    b'{"seed": "%b"}' % (b"9" * 16000): r'seed: "9{56}\.\.\.' + SEED,
    b'{"seed": %b}' % (b"9" * 16000): "body: number overflow",
    b'{"seed": NaN}': "body: parse error.*invalid literal",
    b'{"seed": Infinity}': "body: parse error",
    b'{"seed": 1e999}': "body: number overflow",
    b'{"seed": 0x1}': "body: parse error",
    b'{"seed": 01}': "body: parse error",
    b'{"seed": "\xff"}': "body: parse error.*UTF-8",
    b'{"\xc0\xaf": 1}': "body: parse error.*UTF-8",
    b'{"seed": {"seed": 1}}': "seed: an object or array; pass one value",
    b'{"seed": [1]}': "seed: an object or array; pass one value",
    b"[" * 16000: "body: an object or array; pass one value",
    b'{"seed":' * 2000: "seed: an object or array; pass one value",
    b'{"class_labels": -1, "seed": 1}': r"class_labels: -1; pass an integer in \[0, 2147483647\]",
    b'{"class_labels": 2147483648, "seed": 1}': "class_labels: 2147483648; pass",
    b'{"class_labels": "2", "seed": 1}': 'class_labels: "2"; pass',
    b'{"class_labels": 5, "seed": 1}': "class_labels: 5; the model does not take them",
    b"{" + GOOD + b', "num_inference_steps": 0}': "num_inference_steps: 0" + STEPS,
    b"{" + GOOD + b', "num_inference_steps": 1001}': "num_inference_steps: 1001" + STEPS,
    b"{" + GOOD + b', "num_inference_steps": 18446744073709551615}': "num_inference_steps: 18446744073709551615"
    + STEPS,
    b"{" + GOOD + b', "num_inference_steps": -9223372036854775808}': "num_inference_steps: -9223372036854775808"
    + STEPS,
    b"{" + GOOD + b', "num_inference_steps": 2.5}': "num_inference_steps: 2.5" + STEPS,
    b"{" + GOOD + b', "num_inference_steps": "2"}': 'num_inference_steps: "2"' + STEPS,
}


def test_bad_bodies_are_named(serve):
    server = serve("tiny")
    connection = server.connect()
    for body, message in BAD_BODIES.items():
        status, headers, answer = exchange(connection, "POST", "/v1/sample", body, {"Content-Type": "application/json"})
        assert status == 400 and headers["Content-Type"] == "application/json" and len(answer) < 500, (body, answer)
        assert re.match(message, json.loads(answer)["error"]), (body[:80], answer)
    assert (
        exchange(connection, "POST", "/v1/sample", b"{" + GOOD + b"}", {"Content-Type": "application/json"})[0] == 200
    )
    connection.close()


def test_bad_numbers_of_other_bundles_are_named(serve):
    server = serve("shaded", "--max-steps", 7)
    for fields, message in {
        '"shade": 1e300': "shade: 1e[+]300; pass a number in",
        '"shade": "1"': 'shade: "1"; pass a number in',
        '"shade": 1, "eta": 1.5': r"eta: 1.5; pass a number in \[0, 1\]",
        '"shade": 1, "eta": -1e-9': "eta: -1e-09; pass a number in",
        '"shade": 1, "num_inference_steps": 8': r"num_inference_steps: 8; pass an integer in \[1, 7\]",
    }.items():
        body = f'{{"seed": 1, {fields}}}'
        status, _, answer = server.ask("POST", "/v1/sample", body, {"Content-Type": "application/json"})
        assert status == 400 and re.match(message, json.loads(answer)["error"]), answer


def test_the_bundles_own_run_may_be_too_long(serve):
    server = serve("shaded", "--max-steps", 2)
    status, _, body = server.sample({"seed": 1, "shade": 0})
    assert status == 400 and b"num_inference_steps: missing; pass it" in body
    assert server.sample({"seed": 1, "shade": 0, "num_inference_steps": 2})[0] == 200


def test_made_up_bodies_are_answered(serve):
    server = serve("tiny", "--max-steps", 3)
    draw = random.Random(3)
    seeds = [
        b"{" + GOOD + b', "num_inference_steps": 2}',
        b'{"class_labels": 1e0, "seed": "12"}',
        b'{"seed": [{}, "a"]}',
    ]
    connection, statuses = server.connect(), Counter()
    for _ in range(500):
        body = bytearray(draw.choice(seeds))
        for _ in range(draw.randint(0, 4)):
            where = draw.randrange(len(body))
            body[where : where + draw.choice((0, 1, 5))] = draw.choice(
                (
                    draw.randbytes(1),
                    draw.randbytes(3),
                    b'"',
                    b"{",
                    b"9" * 20,
                    b"\\u",
                    b",",
                    b"-",
                    b"e9",
                    bytes(body[:where]),
                )
            )
        status, _, _ = exchange(connection, "POST", "/v1/sample", bytes(body), {"Content-Type": "application/json"})
        statuses[status] += 1
    connection.close()
    assert set(statuses) == {200, 400} and statuses[400] > 200


def test_methods_paths_and_types(serve):
    server = serve("tiny")
    good, kind = b"{" + GOOD + b"}", {"Content-Type": "application/json"}
    for method, path, headers, expected in (
        ("POST", "/v1/sample?x=1", {"Content-Type": "Application/JSON; charset=utf-8"}, 200),
        ("POST", "/v1/sample", {}, 415),
        ("POST", "/v1/sample", {"Content-Type": "text/plain"}, 415),
        ("POST", "/v1/sample", {"Content-Type": "application/jsonx"}, 415),
        ("POST", "/v1/sample", {**kind, "Content-Encoding": "gzip"}, 415),
        ("POST", "/v1/sample/", kind, 404),
        ("POST", "/", kind, 404),
        ("POST", "/healthz", kind, 405),
    ):
        assert server.ask(method, path, good, headers)[0] == expected, (method, path, headers)
    for path, allowed in (("/v1/sample", "POST, OPTIONS"), ("/healthz", "GET, HEAD, OPTIONS")):
        for method, expected in (("PUT", 405), ("DELETE", 405), ("PATCH", 405), ("TRACE", 405), ("OPTIONS", 200)):
            status, headers, _ = server.ask(method, path)
            assert (status, headers["Allow"]) == (expected, allowed)
    assert server.ask("GET", "/v1/sample")[0] == server.ask("HEAD", "/v1/sample")[0] == 405
    for path in ("/healthz", "/v1/model", "/metrics", "/nothing"):
        connection = server.connect()
        status, headers, body = exchange(connection, "HEAD", path)
        assert body == b"" and int(headers["Content-Length"]) > 10
        again, _, body = exchange(connection, "GET", path)
        assert again == status == (404 if path == "/nothing" else 200) and len(body) > 10
        connection.close()


def read_to_end(connection):
    data = b""
    while part := connection.recv(65536):
        data += part
    return data


def test_what_is_too_long_or_no_http_ends_the_connection(serve):
    server = serve("tiny", "--max-body", 100)
    head = b"POST /v1/sample HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    for sent, status in (
        (head + b"Content-Length: 101\r\n\r\n", 413),
        (head + b"Content-Length: 999999999999\r\n\r\n" + b" " * 300_000, 413),
        (head + b"Transfer-Encoding: chunked\r\n\r\n" + b"32\r\n" + b" " * 50 + b"\r\n33\r\n" + b" " * 51, 413),
        (head + b"X: " + b"x" * 9000 + b"\r\n\r\n", 431),
        (head + b"x: 1\r\n" * 2000, 431),
        (head + b"Content-Length: -1\r\n\r\n", 400),
        (head + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n", 400),
        (b"no request\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 50, 400),
        (b"GET /\x01 HTTP/1.1\r\n\r\n", 400),
    ):
        connection = server.open_socket(sent)
        answer = read_to_end(connection)
        connection.close()
        assert answer.startswith(b"HTTP/1.1 %d " % status) and b"\r\nConnection: close\r\n" in answer, (
            sent[:99],
            answer,
        )
        assert json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]
    for endless in (b"1;" + b"x" * 300_000, b"0\r\n" + b"x: 1\r\n" * 50_000):
        connection = server.open_socket(head + b"Transfer-Encoding: chunked\r\n\r\n" + endless)
        answer = read_to_end(connection)
        connection.close()
        assert answer.startswith(b"HTTP/1.1 431 ") and b"chunk extensions, trailers: more than 65536" in answer
    body = b'{"seed": 1, "class_labels": 1}'
    chunks = b"5\r\n" + body[:5] + b"\r\n%x\r\n" % (len(body) - 5) + body[5:] + b"\r\n0\r\n\r\n"
    chunked = server.open_socket(head + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks)
    assert read_to_end(chunked).startswith(b"HTTP/1.1 200 OK\r\n")
    chunked.close()


def test_connections_are_kept_and_answer_in_order(serve, bundles):
    server = serve("tiny", "--workers", 2)
    requests = draw_requests(5, seed=4)
    pipelined = b"".join(map(request_of, requests)).replace(b"Host: x", b"Host: x\r\nConnection: close")
    pipelined = pipelined.replace(b"\r\nConnection: close", b"", 4)
    connection = server.open_socket(pipelined)
    answers = read_to_end(connection).split(b"HTTP/1.1 200 OK\r\n")[1:]
    connection.close()
    pictures = [pixels(answer.split(b"\r\n\r\n", 1)[1]) for answer in answers]
    assert_pictures(pictures, expected_pixels(OrtSampler(bundles("tiny")), requests))
    for head, ends in ((b"GET /healthz HTTP/1.0\r\n", True), (b"GET /healthz HTTP/1.0\r\nConnection: keep-alive\r\n", False),
                       (b"GET /healthz HTTP/1.1\r\nConnection: close\r\n", True)):  # fmt: skip
        connection = server.open_socket(head + b"\r\n")
        if ends:
            assert b" 200 OK\r\n" in read_to_end(connection)
        else:
            assert b" 200 OK\r\n" in connection.recv(65536)
            connection.sendall(head + b"\r\n")
            assert b" 200 OK\r\n" in connection.recv(65536)
        connection.close()
    request = request_of(requests[0]).replace(b"Host: x", b"Host: x\r\nExpect: 100-continue\r\nConnection: close")
    head, body = request.split(b"\r\n\r\n")
    connection = server.open_socket(head + b"\r\n\r\n")
    assert connection.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
    connection.sendall(body)
    assert read_to_end(connection).startswith(b"HTTP/1.1 200 OK\r\n")
    connection.close()


def test_slow_and_silent_clients_block_nobody_and_are_closed(serve):
    patient = serve("tiny", "--read-timeout", 600, "--idle-timeout", 600)
    held = [patient.open_socket(b"P" * (k % 2)) for k in range(120)]
    patient.wait_for(connections=121)
    for k in range(20):
        assert patient.sample({"seed": k, "class_labels": 0})[0] == 200
    # All of them still hang there.
    patient.wait_for(connections=121)
    for connection in held:
        connection.close()

    server = serve("tiny", "--read-timeout", 1, "--idle-timeout", 1.5)
    started = time.monotonic()
    slow = [server.open_socket(b"P") for _ in range(100)]
    silent = [server.open_socket() for _ in range(20)]
    ended = threading.Event()

    def drip():
        for letter in b"OST /v1/sample HTTP/1.1\r\nHost: x\r\n" * 100:
            for connection in slow:
                try:
                    connection.sendall(bytes([letter]))
                except OSError:
                    continue
            if ended.wait(0.1):
                return

    dripping = threading.Thread(target=drip)
    dripping.start()
    for connection in (*slow, *silent):
        try:
            assert connection.recv(100) == b""
        except ConnectionResetError:
            continue
    assert time.monotonic() - started > 0.9
    ended.set()
    dripping.join()
    for connection in (*slow, *silent):
        connection.close()
    server.wait_for(connections=1)


def test_clients_that_leave_are_not_sampled_for(serve):
    server = serve("tiny", "--max-batch", 1, "--max-steps", LONG)
    reset = struct.pack("ii", 1, 0)
    whole = request_of({"seed": 1, "class_labels": 1})
    for sent in (b"", b"POST", whole[:50], whole[:-1]):
        for abrupt in (False, True):
            connection = server.open_socket(sent)
            if abrupt:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
            connection.close()
    server.wait_for(connections=1)
    busy = server.occupy()
    leavers = [server.open_socket(whole) for _ in range(10)]
    server.wait_for(queue_length=10)
    for k, connection in enumerate(leavers):
        if k % 2:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
        connection.close()
    server.wait_for(queue_length=0, abandoned_total=10, in_flight=1)
    # One that leaves while it is sampled.
    busy.close()
    server.wait_for(abandoned_total=11, in_flight=0, connections=1)
    values = server.metrics()
    assert values["fastddim_latency_seconds_count"] == 0
    assert not any("/v1/sample" in key for key in values)
    assert server.sample({"seed": 1, "class_labels": 1})[0] == 200


def test_a_full_queue(serve):
    server = serve("tiny", "--queue", 2, "--max-batch", 1, "--max-steps", LONG)
    busy = server.occupy()
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(server.sample, {"seed": k, "class_labels": 0}) for k in range(2)]
        server.wait_for(queue_length=2)
        status, headers, body = server.sample({"seed": 9, "class_labels": 0})
        assert (status, headers["Retry-After"]) == (503, "1") and b"the queue is full; try again later" in body
        assert server.metrics()["fastddim_queue_length"] == 2
        assert {one.result()[0] for one in waiting} == {200}
    busy.close()


def test_time_outs(serve):
    server = serve("tiny", "--max-batch", 1, "--timeout", 1, "--max-steps", LONG)
    with ThreadPoolExecutor(2) as pool:
        sampled = pool.submit(server.sample, {"seed": 1, "class_labels": 0, "num_inference_steps": LONG})
        server.wait_for(in_flight=1)
        waiting = pool.submit(server.sample, {"seed": 2, "class_labels": 0})
        status, _, body = sampled.result()
        assert status == 504 and b"sampling took too long; pass fewer num_inference_steps" in body
        status, headers, body = waiting.result()
        assert (status, headers["Retry-After"]) == (503, "1") and b"waited too long for its turn" in body
    # The late run ends, its result is nobody's, and the next ones are served.
    server.wait_for(in_flight=0, queue_length=0)
    assert server.sample({"seed": 1, "class_labels": 1})[0] == 200
    assert server.metrics()["fastddim_latency_seconds_count"] == 1


def test_connections_past_the_limit_are_refused(serve):
    server = serve("tiny", "--max-connections", 3)
    held = [server.connect() for _ in range(3)]
    for connection in held:
        assert exchange(connection, "GET", "/healthz")[0] == 200
    one_more = server.open_socket()
    answer = read_to_end(one_more)
    one_more.close()
    assert answer.startswith(b"HTTP/1.1 503 ") and b"\r\nRetry-After: 1\r\n" in answer
    values = parse_metrics(exchange(held[0], "GET", "/metrics")[2].decode())
    assert values["fastddim_connections"] == 3 and values["fastddim_connections_refused_total"] == 1
    for connection in held:
        connection.close()


def test_metrics_add_up(serve):
    server = serve("tiny")
    for k in range(7):
        assert server.sample({"seed": k, "class_labels": 0, "num_inference_steps": 1 + 20 * k})[0] == 200
    for _ in range(3):
        assert server.sample({})[0] == 400
    server.ask("GET", "/nothing")
    values = server.metrics()
    assert values['fastddim_requests_total{path="/v1/sample",status="200"}'] == 7
    assert values['fastddim_requests_total{path="/v1/sample",status="400"}'] == 3
    assert values['fastddim_requests_total{path="other",status="404"}'] == 1
    buckets = [value for key, value in values.items() if key.startswith("fastddim_latency_seconds_bucket")]
    assert buckets == sorted(buckets) and buckets[-1] == values["fastddim_latency_seconds_count"] == 7
    assert 0 < values["fastddim_sampling_seconds_total"] < values["fastddim_latency_seconds_sum"]
    (build,) = [key for key in values if key.startswith("fastddim_build_info")]
    assert 'kind="loop"' in build and "onnxruntime=" in build
    assert server.metrics()['fastddim_requests_total{path="/metrics",status="200"}'] == 1


def test_the_command_line(program, bundles, tmp_path, serve):
    helped = subprocess.run([program, "--help"], capture_output=True, text=True)
    assert helped.returncode == 0 and "--max-batch N" in helped.stdout and helped.stderr == ""
    tiny = bundles("tiny")
    taken = serve("tiny").port
    for message, arguments in {
        "BUNDLE: missing": [],
        "'b': a second bundle": ["a", "b"],
        "--nope: no such option": [tiny, "--nope"],
        "--port: no value": [tiny, "--port"],
        r"--port: '65536'; pass an integer in \[0, 65535\]": [tiny, "--port", "65536"],
        r"--port: '-1'; pass an integer": [tiny, "--port", "-1"],
        r"--workers: '0'; pass an integer in \[1, 256\]": [tiny, "--workers", "0"],
        r"--queue: '1x'; pass an integer": [tiny, "--queue", "1x"],
        r"--timeout: 'nan'; pass seconds": [tiny, "--timeout", "nan"],
        r"--timeout: '0'; pass seconds": [tiny, "--timeout", "0"],
        "--host: 'localhost' is no address; pass one such as 127.0.0.1": [tiny, "--host", "localhost"],
        f"--host, --port: 127.0.0.1 port {taken} cannot be listened on .*pass another": [tiny, "--port", taken],
        "manifest.json' is missing; pass a folder": [tmp_path],
    }.items():
        done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, timeout=WAIT_S)
        assert done.returncode == 2 and done.stdout == "", done
        assert re.match("error: .*" + message, done.stderr), (message, done.stderr)


def add_guidance(manifest):
    shade = next(info for info in manifest["inputs"] if info["name"] == "shade")
    manifest["inputs"] += [shade | {"name": "guidance_scale"}, shade | {"name": "uncond_shade"}]
    manifest["sampling"]["guided"] = True


def add_channel(manifest):
    for info in manifest["inputs"]:
        if info["name"] == "sample":
            info["shape"][1] = 2
    manifest["sample"]["shape"][0] = 2


def lengthen_shade(manifest):
    for info in manifest["inputs"]:
        if info["name"] == "shade":
            info["shape"].append(4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (add_channel, r"makes samples \[2, 5, 9\] \(NCHW\), which are no pictures; pass one with 1 or 3 channels"),
        (
            lengthen_shade,
            r"'shade', float32 of shape \[batch, 4\]; this server takes models that are conditioned on one",
        ),
        (add_guidance, "'shade', and no value for its unconditional half; this server takes bundles that have one"),
        (lambda manifest: manifest["sample"].update(range=[1, 1]), "has an empty range; export it again"),
    ],
)
def test_bundles_that_cannot_be_served_are_named(program, bundles, tmp_path, change, message):
    folder = shutil.copytree(bundles("shaded"), tmp_path / "bundle")
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    done = subprocess.run([program, folder, "--port", "0"], capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 2 and re.match(f"error: bundle: '{folder}' .*{message}", done.stderr), done
