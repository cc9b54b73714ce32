// Samples from a bundle of `fastddim export`, in a browser or in node, with the noise of fastddim/noise.py bit for bit.

const FORMAT = "fastddim-bundle";
const FORMAT_VERSION = 3;
const MANIFEST = "manifest.json";
// A baked schedule of another method than DDIM keeps the tables of so many steps.
const MOST_KEPT = 100;
// What models are distilled for where the method's options do not say.
const DISTILLED = { lcm: 50, tcd: 50 };

const PHILOX_M = [0xd2511f53, 0xcd9e8d57];
const PHILOX_W = [0x9e3779b9, 0xbb67ae85];
const SIN = Float32Array.of(1.57079632, -0.645963479, 0.0796802281, -0.00460217699);
const COS = Float32Array.of(0.999999972, -1.23369701, 0.253598644, -0.0204083525);
const LOG = Float32Array.of(
  0.333338379, -0.25001732, 0.199660708, -0.16566227, 0.148710846, -0.143447577, 0.0892735042);
const SQRT_HALF_BITS = 0x3f3504f3;
const LN2_HIGH = 0.693359375;
const LN2_LOW = Math.fround(-2.1219444e-4);

// A float32 result rounded from the double one: the same bits as float32 arithmetic for +, -, * and the square root.
const { fround, imul, sqrt } = Math;
const float = new Float32Array(1);
const bits = new Int32Array(float.buffer);

/** The upper 32 bits of a product of two 32-bit words, whose 16-bit parts a double holds exactly. */
function multiplyHigh(a, b) {
  const [a0, a1, b0, b1] = [a & 0xffff, a >>> 16, b & 0xffff, b >>> 16];
  const middle = a1 * b0 + ((a0 * b0) >>> 16);
  const other = a0 * b1 + (middle % 0x10000);
  return (a1 * b1 + Math.floor(middle / 0x10000) + Math.floor(other / 0x10000)) >>> 0;
}

/** Philox4x32-10: four counter words and two key words to four words. */
function philox([c0, c1, c2, c3], [k0, k1]) {
  for (let round = 0; round < 10; round++) {
    const high0 = multiplyHigh(c0, PHILOX_M[0]);
    const high1 = multiplyHigh(c2, PHILOX_M[1]);
    const low0 = imul(c0, PHILOX_M[0]);
    const low1 = imul(c2, PHILOX_M[1]);
    [c0, c1, c2, c3] = [high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0];
    k0 += PHILOX_W[0];
    k1 += PHILOX_W[1];
  }
  return [c0 >>> 0, c1 >>> 0, c2 >>> 0, c3 >>> 0];
}

function polynomial(x, coefficients) {
  let total = coefficients.at(-1);
  for (let k = coefficients.length - 2; k >= 0; k--) total = fround(fround(total * x) + coefficients[k]);
  return total;
}

/** Natural logarithm of a float32 in (0, 1]. */
function log(u) {
  float[0] = u;
  const shifted = bits[0] - SQRT_HALF_BITS;
  const exponent = shifted >> 23;
  bits[0] = shifted - (exponent << 23) + SQRT_HALF_BITS;
  const t = fround(float[0] - 1);
  const square = fround(t * t);
  const tail = fround(fround(fround(square * t) * polynomial(t, LOG)) - fround(square * 0.5));
  return fround(fround(exponent * LN2_HIGH) + fround(t + fround(tail + fround(exponent * LN2_LOW))));
}

/** Two independent normals from two 32-bit words. */
function boxMuller(word0, word1) {
  const u = fround(fround(word0) * 2 ** -32 + 2 ** -33);
  const radius = fround(sqrt(fround(log(u) * -2)));
  const f = fround(fround((word1 & 0x3fffffff) - 0x20000000) * 2 ** -30);
  const square = fround(f * f);
  const sine = fround(f * polynomial(square, SIN));
  const cosine = polynomial(square, COS);
  const [x, y] = word1 & 0x40000000 ? [-sine, cosine] : [cosine, sine];
  const sign = word1 & 0x80000000 ? -1 : 1;
  return [fround(radius * x * sign), fround(radius * y * sign)];
}

/** `fastddim.noise.normal_numpy` of one sample: `length` float32 normals of a seed, a BigInt in [0, 2**64). */
export function normal(seed, step, length, stream) {
  const key = [Number(seed & 0xffffffffn), Number(seed >> 32n)];
  const values = new Float32Array(Math.ceil(length / 4) * 4);
  for (let group = 0; 4 * group < length; group++) {
    const words = philox([group, 0, step, stream], key);
    values.set([...boxMuller(words[0], words[1]), ...boxMuller(words[2], words[3])], 4 * group);
  }
  return values.subarray(0, length);
}

function check(fits, name, value, wanted) {
  if (!fits) throw new Error(`${name}: ${value}; pass ${wanted}`);
}

function checkWhole(name, value, low, high) {
  check(Number.isInteger(value) && value >= low && value <= high, name, value, `an integer in [${low}, ${high}]`);
}

const isSeed = (value) => typeof value === "bigint" && value >> 64n === 0n;

/** A seed typed by a user as a BigInt; throws unless it is an integer in [0, 2**64). */
export function parseSeed(text) {
  check(/^\d{1,20}$/.test(text) && isSeed(BigInt(text)), "seed", text, "an integer in [0, 2**64)");
  return BigInt(text);
}

function parseManifest(bytes) {
  let manifest;
  try {
    manifest = JSON.parse(new TextDecoder().decode(bytes));
  } catch (error) {
    throw new Error(`bundle: '${MANIFEST}' cannot be read: ${error.message}; export it again`);
  }
  checkVersion(manifest);
  const upgraded = upgrade(manifest);
  checkManifest(upgraded);
  return upgraded;
}

function checkVersion(manifest) {
  if (manifest?.format !== FORMAT) throw new Error(`bundle: '${MANIFEST}' is no manifest of a fastddim bundle`);
  const version = manifest.format_version;
  if (Number.isInteger(version) && version >= 1 && version <= FORMAT_VERSION) return;
  throw new Error(`bundle: '${MANIFEST}' has format_version ${version}, this fastddim reads ` + (
    version > FORMAT_VERSION ? `up to ${FORMAT_VERSION}; update fastddim`
      : `from 1 up to ${FORMAT_VERSION}; write it anew: \`fastddim export onnx --out ...\``));
}

/** A manifest as version 3 has it, as far as the page reads it. */
function upgrade(manifest) {
  const { format_version: version, graph, schedule, table, ...others } = manifest;
  if (version === FORMAT_VERSION) return manifest;
  const upgraded = { ...others, schedule, table, method: schedule ? { name: "ddim", options: {} } : null };
  return version > 1 ? upgraded : { runtime: "onnx", ...upgraded, kind: graph, table: { ...table, start_scale: 1 } };
}

function checkManifest({ before, kind, inputs, runtime, sample, sampling, table }) {
  if (runtime !== "onnx") throw new Error(`bundle: it is of runtime '${runtime}', not 'onnx'; export it as onnx`);
  const [label] = Object.keys(sampling.null_values);
  const { timesteps, coefficients, start_scale: scale } = table;
  const previous = coefficients[0]?.length === 7 ? ["previous_x0"] : [];
  const steps = kind === "step" ? ["timestep", "coefficients", ...previous]
    : sampling.baked_schedule ? ["num_inference_steps"] : ["timesteps", "coefficients"];
  const wanted = [...steps, "sample", "guidance_scale", label, `uncond_${label}`];
  // Of what a graph before the steps takes and gives, the step takes what it gives.
  const computed = before?.outputs.map(({ name }) => name) ?? [];
  const given = inputs.map(({ name }) => name).filter((name) => !computed.includes(name));
  const taken = new Set([...given, ...(before?.inputs ?? []).map(({ name }) => name.replace("timesteps", "timestep"))]);
  if (taken.size !== wanted.length || !wanted.every((name) => taken.has(name)) || (before && kind !== "step")) {
    throw new Error(`bundle: a ${kind} graph of ${[...taken].join(", ")}; ` +
      "export a model of one label with --guidance alone, or with --bake-schedule for any number of steps");
  }
  if (!timesteps.length || timesteps.length !== coefficients.length || !timesteps.every(Number.isFinite) || !(scale > 0)) {
    throw new Error(`bundle: a table of timesteps [${timesteps}], ${coefficients.length} rows and start_scale ${scale}; ` +
      "export it again");
  }
  if (sample.layout !== "NCHW" || sample.shape[0] !== 1 || !sample.range) {
    throw new Error(`bundle: ${sample.layout} samples of [${sample.shape}]; export a model of grey pictures`);
  }
}

/** Size and, in a secure context (https or localhost), the hash: elsewhere browsers have no `crypto.subtle`. */
async function checkFile(name, content, { bytes, sha256 }) {
  if (content.length !== bytes) {
    throw new Error(`bundle: '${name}' has ${content.length} bytes, the manifest says ${bytes}; export it again`);
  }
  const digest = await globalThis.crypto?.subtle?.digest("SHA-256", content);
  if (digest && toHex(digest) !== sha256) {
    throw new Error(`bundle: '${name}' is not the file that was exported (SHA-256); export it again`);
  }
}

function toHex(buffer) {
  return Array.from(new Uint8Array(buffer), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/**
 * An opened bundle: `manifest`, `labels` (how many there are, from 0), `ownSteps` (how many steps it takes where its
 * schedule is not baked, so that it runs its table; else null), and `sample`.
 */
export class Sampler {
  /**
   * @param ort the module of onnxruntime-web.
   * @param read takes a file's name in the bundle, and returns a promise of its ArrayBuffer or Uint8Array.
   * @throws Error on a bundle that is damaged, or that asks for more than `sample` takes.
   */
  static async open(ort, read) {
    const manifest = parseManifest(await read(MANIFEST));
    const load = async ({ model: name }) => {
      const model = new Uint8Array(await read(name));
      await checkFile(name, model, manifest.files[name]);
      return ort.InferenceSession.create(model);
    };
    return new Sampler(ort, manifest, await load(manifest), manifest.before && await load(manifest.before));
  }

  constructor(ort, manifest, session, sessionBefore) {
    this.ort = ort;
    this.manifest = manifest;
    this.session = session;
    this.sessionBefore = sessionBefore;
    // The unconditional half's label is the one after the last.
    [[this.labelInput, this.labels]] = Object.entries(manifest.sampling.null_values);
    this.ownSteps = manifest.sampling.baked_schedule ? null : manifest.table.timesteps.length;
  }

  /**
   * Float32Array of one sample, in the manifest's shape and range; `seed` is a BigInt, the others are numbers. A bundle with
   * `ownSteps` takes no `numInferenceSteps`.
   */
  async sample({ numInferenceSteps, guidanceScale, seed, label }) {
    const { before, kind, sample, noise, schedule, table } = this.manifest;
    if (this.ownSteps === null) {
      checkWhole("numInferenceSteps", numInferenceSteps, 1, this.#mostSteps());
    } else {
      const own = schedule ? `nothing, as this bundle takes the ${this.ownSteps} steps of its table; export it with ` +
        "--bake-schedule for any number" : "nothing, as this bundle was made from a table";
      check(numInferenceSteps === undefined, "numInferenceSteps", numInferenceSteps, own);
    }
    check(Number.isFinite(guidanceScale), "guidanceScale", guidanceScale, "a finite number");
    check(isSeed(seed), "seed", seed, "a BigInt in [0, 2**64)");
    checkWhole("label", label, 0, this.labels - 1);
    const length = sample.shape.reduce((product, size) => product * size, 1);
    const values = {
      num_inference_steps: [numInferenceSteps],
      timesteps: table.timesteps,
      coefficients: table.coefficients.flat(),
      sample: normal(seed, 0, length, noise.stream_initial).map((value) => value * fround(table.start_scale)),
      guidance_scale: [guidanceScale],
      [this.labelInput]: [label],
      [`uncond_${this.labelInput}`]: [this.labels],
    };
    if (kind === "loop") return (await this.#run(values)).samples.data;
    values.previous_x0 = new Float32Array(length);
    const computed = before ? await this.#run(values, before, this.sessionBefore) : {};
    for (const [step, timestep] of table.timesteps.entries()) {
      const row = { timestep: [timestep], coefficients: table.coefficients[step], ...this.#rows(computed, step) };
      const { next_sample: next, pred_original_sample: x0 } = await this.#run({ ...values, ...row });
      values.sample = next.data;
      values.previous_x0 = x0.data;
    }
    return values.sample;
  }

  /** The most steps that a baked schedule takes. */
  #mostSteps() {
    const { method, schedule } = this.manifest;
    // The first leading step of DPM-Solver++ lies one stride below the end of training.
    const below = method.name === "dpmsolver++" && schedule.timestep_spacing === "leading" ? 1 : 0;
    const trained = Math.max(1, (schedule.num_train_timesteps ?? MOST_KEPT + below) - below);
    if (method.name === "ddim") return trained;
    return Math.min(MOST_KEPT, method.options.original_inference_steps ?? DISTILLED[method.name] ?? trained);
  }

  /** A step's tensors of those computed for all steps, of one sample. */
  #rows(computed, step) {
    const rows = {};
    for (const { name, shape } of this.manifest.before?.outputs ?? []) {
      const { type, data, dims } = computed[name];
      if (shape[0] !== "steps") {
        rows[name] = computed[name];
        continue;
      }
      const size = data.length / dims[0];
      // Without a batch of its own, a step's row is the sample's.
      const own = shape.includes("batch") ? dims.slice(1) : [1, ...dims.slice(1)];
      rows[name] = new this.ort.Tensor(type, data.slice(step * size, (step + 1) * size), own);
    }
    return rows;
  }

  /** A graph's outputs by name, of its inputs' numbers or tensors. */
  async #run(values, { inputs } = this.manifest, session = this.session) {
    const { sample, table } = this.manifest;
    const feeds = {};
    for (const { name, dtype, shape } of inputs) {
      if (values[name] instanceof this.ort.Tensor) {
        feeds[name] = values[name];
        continue;
      }
      // A height or width of any size is named too: the model's own is taken.
      const sizes = { batch: 1, steps: table.timesteps.length };
      const state = name === "sample" || name === "previous_x0";
      const dims = state ? [1, ...sample.shape] : shape.map((dim) => sizes[dim] ?? dim);
      const array = dtype === "int64" ? BigInt64Array.from(values[name], BigInt) : Float32Array.from(values[name]);
      feeds[name] = new this.ort.Tensor(dtype, array, dims);
    }
    return session.run(feeds);
  }
}
