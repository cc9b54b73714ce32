"""The C++ server against Python's `http.server` over `OrtSampler`: the embedded model, 20 steps, 1 to 16 clients.

    python benchmarks/cpp_server.py [--quick] [--json FILE]

Needs what `make cpp` prepares. Every run is on one thread; the C++ server has as many at a time as there are cores. Each client
asks again when it has its answer. The servers take turns, seconds each, and every picture is compared with `OrtSampler`'s.
`start` is from a process's start to its first picture, and has a bar of its own, `START_S`. The clients share the machine.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from cpp_driver import build
from rich.console import Console
from rich.table import Table

import fastddim
from fastddim.bench import report
from fastddim.export import ExportOptions, OrtSampler, export_onnx

STEPS = 20
CLIENTS = (1, 4, 16)
START_S = 0.5
# Requests repeat after this many.
REQUESTS = 64

PYTHON_SERVER = """
import io
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import numpy as np
import onnxruntime
import PIL.Image
from fastddim.export import OrtSampler

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
sampler = OrtSampler(sys.argv[1], session_options=options)

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self):
        fields = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        samples = sampler(
            1, seeds=fields["seed"], num_inference_steps=fields["num_inference_steps"],
            class_labels=np.array([fields["class_labels"]]),
        )
        levels = ((samples[0, 0] + 1) * 127.5).round().clip(0, 255).astype(np.uint8)
        file = io.BytesIO()
        PIL.Image.fromarray(levels).save(file, "PNG")
        self.send_response(200)
        self.send_header("Content-Type", "image/png")
        self.send_header("Content-Length", str(file.tell()))
        self.end_headers()
        self.wfile.write(file.getvalue())

    def log_message(self, *_):
        pass

class Server(ThreadingHTTPServer):
    request_queue_size = 128

server = Server(("127.0.0.1", 0), Handler)
print(f"listening on http://127.0.0.1:{server.server_port}", flush=True)
server.serve_forever()
"""


@contextmanager
def running(command: Sequence[Any]) -> Iterator[int]:
    """A server that prints where it listens; its port."""
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"{command[0]} ended with status {process.wait()}")
        yield int(line.rsplit(":", 1)[1])
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def fields_of(k: int) -> dict[str, int]:
    return {"seed": k, "class_labels": k % 10, "num_inference_steps": STEPS}


def ask(connection: http.client.HTTPConnection, k: int) -> bytes:
    connection.request("POST", "/v1/sample", json.dumps(fields_of(k)), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    body = answer.read()
    if answer.status != 200:
        raise RuntimeError(f"status {answer.status}: {body[:200]!r}")
    return body


def check(body: bytes, levels: np.ndarray) -> None:
    """That a picture is the expected one, to a grey level."""
    with PIL.Image.open(io.BytesIO(body)) as image:
        error = np.abs(np.asarray(image).astype(np.float64) - levels).max()
    if error > 1:
        raise RuntimeError(f"a picture is off by {error:.1f} grey levels")


def load(port: int, clients: int, seconds: float, expected: np.ndarray) -> tuple[list[float], float]:
    """Latencies of all answers, and answers a second."""
    end = time.perf_counter() + seconds
    answers: list[tuple[int, bytes]] = []
    taken: list[float] = []
    lock = threading.Lock()

    def client(first: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        k = first
        while (start := time.perf_counter()) < end:
            body = ask(connection, k % REQUESTS)
            with lock:
                taken.append(time.perf_counter() - start)
                answers.append((k % REQUESTS, body))
            k += clients
        connection.close()

    begun = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        for done in [pool.submit(client, first) for first in range(clients)]:
            done.result()
    rate = len(taken) / (time.perf_counter() - begun)
    for k, body in answers:
        check(body, expected[k])
    return taken, rate


def start_time(command: Sequence[Any], expected: np.ndarray) -> float:
    begun = time.perf_counter()
    with running(command) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        body = ask(connection, 0)
        taken = time.perf_counter() - begun
        connection.close()
    check(body, expected[0])
    return taken


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds: does everything work?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    arguments = parser.parse_args()
    rounds, seconds, starts = (1, 1.0, 2) if arguments.quick else (5, 4.0, 15)
    program = build("release", "server") / "server"
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        pipe = fastddim.load_pipeline()
        bundle = export_onnx(pipe.unet, pipe.scheduler, f"{folder}/bundle", ExportOptions(), parity_steps=()).path
        samples = OrtSampler(bundle)(
            REQUESTS, seeds=list(range(REQUESTS)), num_inference_steps=STEPS, class_labels=np.arange(REQUESTS) % 10
        )
        expected = ((samples[:, 0] + 1) * 127.5).clip(0, 255)
        cpp = [program, bundle, "--port", 0, "--threads", 1, "--workers", os.cpu_count()]
        commands = {
            "cpp/examples/server": cpp,
            "cpp/examples/server --max-batch 1": [*cpp, "--max-batch", 1],
            "python, http.server": [sys.executable, "-c", PYTHON_SERVER, bundle],
        }
        times: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(starts):
            for name, command in commands.items():
                times[name].append(start_time(command, expected))
        rows += [{"server": name, "start_s": statistics.median(taken)} for name, taken in times.items()]
        measured: dict[tuple[int, str], tuple[list[float], list[float]]] = {}
        for clients in CLIENTS:
            for _ in range(rounds):
                for name, command in commands.items():
                    with running(command) as port:
                        load(port, clients, 0.3, expected)
                        latencies, rate = load(port, clients, seconds, expected)
                    every, rates = measured.setdefault((clients, name), ([], []))
                    every += latencies
                    rates.append(rate)
    for (clients, name), (latencies, rates) in measured.items():
        p50, p99 = np.percentile(latencies, (50, 99))
        rows.append({"server": name, "clients": clients, "p50_s": p50, "p99_s": p99, "per_s": statistics.median(rates)})
    table = Table("server", "clients", "p50", "p99", "pictures/s")
    for row in rows:
        if "clients" in row:
            cells = (f"{1e3 * row['p50_s']:.1f} ms", f"{1e3 * row['p99_s']:.1f} ms", f"{row['per_s']:.1f}")
            table.add_row(row["server"], str(row["clients"]), *cells)
    Console().print(table)
    for name, taken in times.items():
        print(f"{name}: start to first picture: {statistics.median(taken):.3f} s")
    print(f"the bar is {START_S} s")
    if arguments.json:
        created = datetime.now(timezone.utc).isoformat(timespec="seconds")
        result = {"format": 1, "created": created, "suite": "cpp-server", "quick": arguments.quick,
                  "environment": report.environment(), "rows": rows}  # fmt: skip
        report.write_text("--json", arguments.json, report.make_json(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
