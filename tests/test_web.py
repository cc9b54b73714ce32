"""The page of `examples/web` in node and in a headless Chromium, against Python's noise and ONNX Runtime in Python."""

import functools
import http.server
import json
import os
import queue
import shutil
import signal
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest

import fastddim
from fastddim.export import Bundle, BundleError, ExportOptions, OrtSampler, export_onnx, open_bundle
from fastddim.noise import STREAM_INITIAL, normal_numpy
from flow import export_class_flow

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

WEB = Path(__file__).parents[1] / "examples" / "web"
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
RUNS = (
    {"steps": 1, "guidance": 2.0, "seed": 7, "label": 3},
    {"steps": 10, "guidance": 0.5, "seed": 2**53 + 1, "label": 0},
    {"steps": 23, "guidance": 6.0, "seed": 2**64 - 1, "label": 9},
)


def run_node(code, *arguments):
    """What `code` printed, as bytes, with the page's module at hand; `arguments` are its process.argv from 2 on."""
    module = f'import {{ Sampler, normal, parseSeed }} from "{WEB.as_uri()}/fastddim.js";\n{code}'
    done = subprocess.run(
        ["node", "--input-type=module", "-", *arguments], input=module.encode(), capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def expected_sample(bundle, run):
    sampler = OrtSampler(bundle, providers="cpu")
    return sampler(
        1,
        seeds=run["seed"],
        num_inference_steps=run.get("steps"),
        guidance_scale=run["guidance"],
        class_labels=np.array([run["label"]]),
    ).ravel()


# Of bundles made from a table, of earlier formats, which have four labels, and of a method that looks back.
OTHER_RUNS = (
    ("flow", {"guidance": 1.5, "seed": 2**64 - 1, "label": 2}),
    ("loop-1", {"steps": 5, "guidance": 2.0, "seed": 8, "label": 1}),
    ("digits-2", {"steps": 5, "guidance": 2.0, "seed": 8, "label": 1}),
    ("dpm-step", {"guidance": 2.0, "seed": 8, "label": 1}),
    ("dpm-baked", {"steps": 9, "guidance": 2.0, "seed": 8, "label": 1}),
    ("dpm-two", {"guidance": 2.0, "seed": 8, "label": 1}),
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The page as a user has it, with the digits and bundles that it refuses; in `bare`, without its runtime."""
    folder = tmp_path_factory.mktemp("web")
    (folder / "bare").mkdir()
    for name in ("index.html", "fastddim.js"):
        shutil.copy(WEB / name, folder)
        shutil.copy(WEB / name, folder / "bare")
    (folder / "node_modules").symlink_to(WEB / "node_modules")
    pipe = fastddim.load_pipeline()
    options = ExportOptions(guided=True, bake_schedule=True)
    export_onnx(pipe.unet, pipe.scheduler, folder / "digits", options, parity_steps=())
    export_class_flow(folder / "flow")
    shutil.copytree(Path(__file__).parent / "bundles" / "loop-1", folder / "loop-1")
    manifest = json.loads((folder / "digits" / "manifest.json").read_text())
    shutil.copytree(folder / "digits", folder / "digits-2")
    second = {name: value for name, value in manifest.items() if name not in ("schedule_type", "method")}
    second["sampling"] = {**second["sampling"], "eta": 0.0, **manifest["method"]["options"]}
    (folder / "digits-2" / "manifest.json").write_text(json.dumps({**second, "format_version": 2}))
    noise = {"name": "noise", "dtype": "float32", "shape": ["steps", "batch", 1, 16, 16], "meaning": "of each step"}
    manifests = {
        "broken": "{",
        "foreign": "[]",
        "newer": json.dumps({**manifest, "format_version": 4}),
        "older": json.dumps({**manifest, "format_version": 0}),
        "endless": json.dumps({**manifest, "table": {**manifest["table"], "timesteps": [7] * 49 + [1e300]}}).replace(
            "1e+300", "1e999"
        ),
        "compiled": json.dumps({**manifest, "runtime": "aoti"}),
        "step": json.dumps({**manifest, "kind": "step"}),
        "noisy": json.dumps({**manifest, "inputs": [*manifest["inputs"], noise]}),
        "colour": json.dumps({**manifest, "sample": {**manifest["sample"], "shape": [3, 16, 16]}}),
    }
    for name, text in manifests.items():
        (folder / name).mkdir()
        (folder / name / "manifest.json").write_text(text)
    model = bytearray((folder / "digits" / "model.onnx").read_bytes())
    # Inside a weight, so that the graph still opens.
    model[len(model) // 2] ^= 1
    for name, content in {"cut": b"\x08", "damaged": model}.items():
        shutil.copytree(folder / "digits", folder / name)
        (folder / name / "model.onnx").write_bytes(content)
    return folder


def pythons_message(bundle):
    """What Python tells of a bundle, with the names of its files as the page knows them."""
    with pytest.raises(BundleError) as caught:
        open_bundle(bundle)
    return str(caught.value).replace(f"{bundle}/", "")


def test_the_noise_is_pythons_bit_for_bit():
    code = """
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
    code = """
const read = (text) => { try { return String(parseSeed(text)); } catch (error) { return error.message; } };
console.log(JSON.stringify(JSON.parse(process.argv[2]).map(read)));
"""
    good = ["0", "9007199254740993", str(2**64 - 1)]
    bad = ["", "-1", "1.5", "1e3", "0x10", str(2**64), "seven"]
    told = json.loads(run_node(code, json.dumps(good + bad)))
    assert told == good + [f"seed: {text}; pass an integer in [0, 2**64)" for text in bad]


OPEN_IN_NODE = f"""
import {{ readFile }} from "node:fs/promises";
import * as ort from "{WEB.as_uri()}/node_modules/onnxruntime-web/dist/ort.wasm.min.mjs";
ort.env.wasm.numThreads = 1;
const site = process.argv[2];
const open = (bundle) => Sampler.open(ort, (name) => readFile(`${{site}}/${{bundle}}/${{name}}`));
const told = (promise) => promise.then(() => "nothing", (error) => error.message);
"""


def test_the_module_in_node_samples_as_python_does(site):
    code = """
const sampler = await open("digits");
const drawn = [];
for (const { steps, guidance, seed, label } of JSON.parse(process.argv[3])) {
  const settings = { numInferenceSteps: steps, guidanceScale: guidance, seed: BigInt(seed), label };
  drawn.push([...await sampler.sample(settings)]);
}
const good = { numInferenceSteps: 1, guidanceScale: 1, seed: 0n, label: 0 };
const bad = [
  { numInferenceSteps: 0 }, { numInferenceSteps: 1.5 }, { guidanceScale: NaN },
  { seed: 7 }, { seed: -1n }, { label: 10 },
];
const errors = [];
for (const changed of bad) errors.push(await told(sampler.sample({ ...good, ...changed })));
console.log(JSON.stringify({ drawn, errors }));
"""
    runs = json.dumps([{**run, "seed": str(run["seed"])} for run in RUNS])
    report = json.loads(run_node(OPEN_IN_NODE + code, str(site), runs))
    for actual, run in zip(report["drawn"], RUNS, strict=True):
        np.testing.assert_allclose(actual, expected_sample(site / "digits", run), atol=1e-5)
    assert report["errors"] == [
        "numInferenceSteps: 0; pass an integer in [1, 1000]",
        "numInferenceSteps: 1.5; pass an integer in [1, 1000]",
        "guidanceScale: NaN; pass a finite number",
        "seed: 7; pass a BigInt in [0, 2**64)",
        "seed: -1; pass a BigInt in [0, 2**64)",
        "label: 10; pass an integer in [0, 9]",
    ]


@pytest.mark.slow
def test_the_module_runs_tables_earlier_formats_and_other_methods(site):
    pipe = fastddim.load_pipeline()
    step = {"kind": "step", "num_inference_steps": 6}
    for name, chosen in {"step": step, "two": {**step, "hoist": True}, "baked": {"bake_schedule": True}}.items():
        options = ExportOptions(method="dpmsolver++", guided=True, **chosen)
        export_onnx(pipe.unet, pipe.scheduler, site / f"dpm-{name}", options, parity_steps=())
    code = """
const drawn = [];
for (const [bundle, { steps, guidance, seed, label }] of JSON.parse(process.argv[3])) {
  const sampler = await open(bundle);
  const settings = { guidanceScale: guidance, seed: BigInt(seed), label, numInferenceSteps: steps };
  drawn.push([...await sampler.sample(settings)]);
}
const errors = [];
for (const [bundle, numInferenceSteps] of [["flow", 3], ["dpm-step", 3], ["dpm-baked", Number(process.argv[4])]]) {
  const sampler = await open(bundle);
  errors.push(await told(sampler.sample({ numInferenceSteps, guidanceScale: 1, seed: 0n, label: 0 })));
}
const { ownSteps } = await open("flow");
console.log(JSON.stringify({ drawn, errors, ownSteps }));
"""
    runs = json.dumps([(bundle, {**run, "seed": str(run["seed"])}) for bundle, run in OTHER_RUNS])
    most = open_bundle(site / "dpm-baked").scheduling.most_baked
    report = json.loads(run_node(OPEN_IN_NODE + code, str(site), runs, str(most + 1)))
    for actual, (bundle, run) in zip(report["drawn"], OTHER_RUNS, strict=True):
        np.testing.assert_allclose(actual, expected_sample(site / bundle, run), atol=1e-5)
    assert report["ownSteps"] == 3
    assert report["errors"] == [
        "numInferenceSteps: 3; pass nothing, as this bundle was made from a table",
        "numInferenceSteps: 3; pass nothing, as this bundle takes the 6 steps of its table; export it with --bake-schedule for"
        " any number",
        f"numInferenceSteps: {most + 1}; pass an integer in [1, {most}]",
    ]
    (_, run), *_ = OTHER_RUNS
    opened = open_bundle(site / "flow")
    cut = {**opened.manifest["table"], "timesteps": [float(int(t)) for t in opened.table.timesteps]}
    whole = expected_sample(opened, run)
    assert np.abs(expected_sample(Bundle(opened.path, {**opened.manifest, "table": cut}), run) - whole).max() > 1e-3


def test_the_hash_is_checked_where_there_is_web_crypto(site):
    code = """
import { webcrypto } from "node:crypto";
const errors = [];
for (const value of [webcrypto, undefined]) {
  Object.defineProperty(globalThis, "crypto", { value, configurable: true });
  for (const bundle of ["damaged", "cut"]) errors.push(await told(open(bundle)));
}
console.log(JSON.stringify(errors));
"""
    damaged, cut = (pythons_message(site / name) for name in ("damaged", "cut"))
    assert "SHA-256" in damaged and "bytes" in cut
    assert json.loads(run_node(OPEN_IN_NODE + code, str(site))) == [damaged, cut, "nothing", cut]


# Works the page's own controls in a frame, and posts what it drew and what it told.
CHECK = """<!doctype html><script type="module">
const runs = RUNS;
const post = (body) => fetch("/report", { method: "POST", body: JSON.stringify(body) });
async function open(address) {
  const frame = document.createElement("iframe");
  frame.src = address;
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
  for (const name of BUNDLES) report.errors[name] = await untilTold(await open(`index.html?bundle=${name}`), /bundle:/);
  report.errors.bare = await untilTold(await open("bare/index.html"), /runtime:/);
  const page = await open("index.html");
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
  // The sliders' own seed and label, on a page that takes as many steps as the table has.
  const flow = await open("index.html?bundle=flow");
  const [sampled] = await new Promise((done) => {
    flow.addEventListener("sampled", (event) => done([event.detail]), { once: true });
    flow.forms[0].guidance.dispatchEvent(new Event("input", { bubbles: true }));
  });
  report.flow = { samples: [...sampled.samples], steps: flow.forms[0].steps.nextElementSibling.value };
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
            command = [browser, *flags, "--remote-debugging-port=0", url]
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
            try:
                return reports.get(timeout=300)
            except queue.Empty:
                pytest.fail(f"the page reported nothing: {(profile / 'log').read_text()[-2000:]}")
            finally:
                # The whole group: a browser that hangs would leave its children.
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                server.shutdown()


def test_the_page_in_a_browser(site, tmp_path):
    """Every control, the picture and each error, as a user meets them."""
    runs = [{**run, "seed": str(run["seed"])} for run in RUNS]
    bundles = [
        "missing",
        "broken",
        "foreign",
        "newer",
        "older",
        "endless",
        "compiled",
        "step",
        "noisy",
        "colour",
        "cut",
        "damaged",
    ]
    (site / "check.html").write_text(CHECK.replace("RUNS", json.dumps(runs)).replace("BUNDLES", json.dumps(bundles)))
    report = report_from_browser(site, tmp_path)
    assert "failure" not in report, report["failure"]
    for actual, run in zip(report["runs"], RUNS, strict=True):
        assert actual["seed"] == str(run["seed"]) and not actual["told"]["failed"]
        expected = expected_sample(site / "digits", run)
        np.testing.assert_allclose(actual["samples"], expected, atol=1e-5)
        pixels = np.array(actual["pixels"]).reshape(256, 4)
        np.testing.assert_allclose(pixels[:, :3], np.repeat((expected[:, None] + 1) * 127.5, 3, axis=1), atol=1)
        assert (pixels[:, 3] == 255).all()
    inputs = "num_inference_steps, sample, guidance_scale, class_labels, uncond_class_labels"
    fix = "export a model of one label with --guidance alone, or with --bake-schedule for any number of steps"
    messages = {
        "missing": "bundle: 'missing/manifest.json' is missing; run fastddim export onnx --guidance --bake-schedule",
        "compiled": "bundle: it is of runtime 'aoti', not 'onnx'; export it as onnx",
        "step": f"bundle: a step graph of {inputs}; {fix}",
        "noisy": f"bundle: a loop graph of {inputs}, noise; {fix}",
        "colour": "bundle: NCHW samples of [3,16,16]; export a model of grey pictures",
        "bare": "runtime: onnxruntime-web is missing; run npm ci in the page's folder",
        "seed": "seed: -1; pass an integer in [0, 2**64)",
        **{name: pythons_message(site / name) for name in ("foreign", "newer", "older", "cut", "damaged")},
        "endless": f"bundle: a table of timesteps [{'7,' * 49}Infinity], 50 rows and start_scale 1; export it again",
    }
    assert report["flow"]["steps"] == "3"
    drawn = expected_sample(site / "flow", {"guidance": 2.0, "seed": 7, "label": 3})
    np.testing.assert_allclose(report["flow"]["samples"], drawn, atol=1e-5)
    # The reason is the parser's own.
    broken = report["errors"].pop("broken")
    assert broken["failed"] and broken["text"].startswith("bundle: 'manifest.json' cannot be read: ")
    assert report["errors"] == {name: {"text": text, "failed": True} for name, text in messages.items()}
