"""The page of `examples/web` in node and in a headless Chromium, against Python's noise and ONNX Runtime in Python."""

import functools
import http.server
import json
import queue
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest

import fastddim
from fastddim.export import ExportOptions, OrtSampler, export_onnx
from fastddim.noise import STREAM_INITIAL, normal_numpy

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

WEB = Path(__file__).parents[1] / "examples" / "web"
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
RUNS = (
    {"steps": 1, "guidance": 2.0, "seed": 7, "label": 3},
    {"steps": 10, "guidance": 0.5, "seed": 2**53 + 1, "label": 0},
    {"steps": 23, "guidance": 6.0, "seed": 2**64 - 1, "label": 9},
)


def run_node(code, *arguments):
    """What a module printed, as bytes; `arguments` are its process.argv from 2 on."""
    done = subprocess.run(
        ["node", "--input-type=module", "-", *arguments], input=code.encode(), capture_output=True, timeout=120, cwd=WEB
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def expected_sample(bundle, run):
    sampler = OrtSampler(bundle, providers="cpu")
    return sampler(
        1,
        seeds=run["seed"],
        num_inference_steps=run["steps"],
        guidance_scale=run["guidance"],
        class_labels=np.array([run["label"]]),
    ).ravel()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The page as a user has it, with the digits and two bundles that it cannot open."""
    folder = tmp_path_factory.mktemp("web")
    for name in ("index.html", "fastddim.js"):
        shutil.copy(WEB / name, folder)
    (folder / "node_modules").symlink_to(WEB / "node_modules")
    pipe = fastddim.load_pipeline()
    options = ExportOptions(guided=True, bake_schedule=True)
    export_onnx(pipe.unet, pipe.scheduler, folder / "digits", options, parity_steps=())
    manifest = json.loads((folder / "digits" / "manifest.json").read_text())
    for name, changed in {"newer": {"format_version": 2}, "step": {"graph": "step"}}.items():
        (folder / name).mkdir()
        (folder / name / "manifest.json").write_text(json.dumps({**manifest, **changed}))
    shutil.copytree(folder / "digits", folder / "cut")
    (folder / "cut" / "model.onnx").write_bytes(b"\x08")
    return folder


def test_the_noise_is_pythons_bit_for_bit():
    code = f"""
import {{ normal }} from "{WEB.as_uri()}/fastddim.js";
const parts = JSON.parse(process.argv[2]).map(([seed, step, length, stream]) =>
  Buffer.from(normal(BigInt(seed), step, length, stream).slice().buffer));
process.stdout.write(Buffer.concat(parts));
"""
    cases = [
        (seed, step, length, stream)
        for seed in (0, 7, 2**32 - 1, 2**32, 2**53 + 1, 2**64 - 1)
        for step, length, stream in ((0, 256, STREAM_INITIAL), (3, 1, 0), (999, 4099, 0), (2**32 - 1, 30001, 0))
    ]
    drawn = run_node(code, json.dumps([(str(seed), *rest) for seed, *rest in cases]))
    expected = [normal_numpy([seed], step, (length,), stream)[0] for seed, step, length, stream in cases]
    np.testing.assert_array_equal(np.frombuffer(drawn, np.int32), np.concatenate(expected).view(np.int32))


def test_seeds_are_read_exactly_or_refused():
    code = f"""
import {{ parseSeed }} from "{WEB.as_uri()}/fastddim.js";
const read = (text) => {{ try {{ return String(parseSeed(text)); }} catch (error) {{ return error.message; }} }};
console.log(JSON.stringify(JSON.parse(process.argv[2]).map(read)));
"""
    good = ["0", "9007199254740993", str(2**64 - 1)]
    bad = ["", "-1", "1.5", "1e3", "0x10", str(2**64), "seven"]
    told = json.loads(run_node(code, json.dumps(good + bad)))
    assert told == good + [f"seed: {text}; pass an integer in [0, 2**64)" for text in bad]


def test_the_module_in_node_samples_as_python_does(site):
    code = f"""
import {{ readFile }} from "node:fs/promises";
import * as ort from "{WEB.as_uri()}/node_modules/onnxruntime-web/dist/ort.wasm.min.mjs";
import {{ Sampler }} from "{WEB.as_uri()}/fastddim.js";
ort.env.wasm.numThreads = 1;
const sampler = await Sampler.open(ort, (name) => readFile(`${{process.argv[2]}}/${{name}}`));
const drawn = [];
for (const {{ steps, guidance, seed, label }} of JSON.parse(process.argv[3])) {{
  drawn.push([...await sampler.sample({{ steps, guidanceScale: guidance, seed: BigInt(seed), label }})]);
}}
console.log(JSON.stringify(drawn));
"""
    drawn = json.loads(
        run_node(code, str(site / "digits"), json.dumps([{**run, "seed": str(run["seed"])} for run in RUNS]))
    )
    for actual, run in zip(drawn, RUNS, strict=True):
        np.testing.assert_allclose(actual, expected_sample(site / "digits", run), atol=1e-4)


# Works the page's own controls in a frame, and posts what it drew and what it told.
CHECK = """<!doctype html><script type="module">
const runs = RUNS;
const post = (body) => fetch("/report", { method: "POST", body: JSON.stringify(body) });
async function open(query) {
  const frame = document.createElement("iframe");
  frame.src = `index.html${query}`;
  const loaded = new Promise((done) => frame.addEventListener("load", done));
  document.body.append(frame);
  await loaded;
  return frame.contentDocument;
}
async function untilTold(page, pattern) {
  const status = page.querySelector("#status");
  while (!pattern.test(status.textContent)) await new Promise((done) => setTimeout(done, 20));
  return { text: status.textContent, failed: status.className === "error" };
}
try {
  const report = { errors: {}, runs: [] };
  for (const name of ["missing", "newer", "step", "cut"]) {
    report.errors[name] = await untilTold(await open(`?bundle=${name}`), /bundle:/);
  }
  const page = await open("");
  await untilTold(page, / ms /);
  for (const { steps, guidance, seed, label } of runs) {
    const form = page.forms[0];
    form.steps.value = steps;
    form.guidance.value = guidance;
    form.label.value = label;
    form.anySeed.value = seed;
    const sampled = new Promise((done) => page.addEventListener("sampled", done, { once: true }));
    form.steps.dispatchEvent(new Event("input", { bubbles: true }));
    const { settings, samples } = (await sampled).detail;
    const canvas = page.querySelector("canvas");
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    const told = await untilTold(page, / ms /);
    report.runs.push({ seed: String(settings.seed), samples: [...samples], pixels: [...data], told });
  }
  const form = page.forms[0];
  form.anySeed.value = "-1";
  form.anySeed.dispatchEvent(new Event("input", { bubbles: true }));
  report.errors.seed = await untilTold(page, /seed:/);
  await post(report);
} catch (error) {
  await post({ failure: String(error.stack) });
}
</script>"""


def report_from_browser(site, profile):
    """What the check page posted, from a browser that runs it."""
    reports = queue.Queue()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_POST(self):
            reports.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    assert browser, "no Chromium here: sh scripts/make_web.sh installs one"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={profile}"]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        # A debugging port keeps the browser open until it is told to go.
        url = f"http://127.0.0.1:{server.server_port}/check.html"
        with (profile / "log").open("wb") as log:
            process = subprocess.Popen([browser, *flags, "--remote-debugging-port=0", url], stdout=log, stderr=log)
            try:
                return reports.get(timeout=100)
            except queue.Empty:
                pytest.fail(f"the page reported nothing: {(profile / 'log').read_text()[-2000:]}")
            finally:
                process.terminate()
                process.wait(20)
                server.shutdown()


def test_the_page_in_a_browser(site, tmp_path):
    """Every control, the picture and each error, as a user meets them."""
    runs = [{**run, "seed": str(run["seed"])} for run in RUNS]
    (site / "check.html").write_text(CHECK.replace("RUNS", json.dumps(runs)))
    report = report_from_browser(site, tmp_path)
    assert "failure" not in report, report["failure"]
    for actual, run in zip(report["runs"], RUNS, strict=True):
        assert actual["seed"] == str(run["seed"]) and not actual["told"]["failed"]
        expected = expected_sample(site / "digits", run)
        np.testing.assert_allclose(actual["samples"], expected, atol=1e-4)
        pixels = np.array(actual["pixels"]).reshape(256, 4)
        np.testing.assert_allclose(pixels[:, :3], np.repeat((expected[:, None] + 1) * 127.5, 3, axis=1), atol=1)
        assert (pixels[:, 3] == 255).all()
    messages = {
        "missing": "bundle: missing/manifest.json is missing; write it with fastddim export",
        "newer": "bundle: format_version 2, this page reads 1; export it again",
        "step": "bundle: this page needs one exported with --guidance --bake-schedule, and without noise",
        "cut": f"bundle: model.onnx has 1 bytes, the manifest says {(site / 'digits/model.onnx').stat().st_size}"
        "; export it again",
        "seed": "seed: -1; pass an integer in [0, 2**64)",
    }
    assert report["errors"] == {name: {"text": text, "failed": True} for name, text in messages.items()}
