// lorac-web: runs language models with adapters, exported by `lorac export-web`, in browsers and Node.js.
import { Template } from "@huggingface/jinja";
import { Tokenizer } from "@huggingface/tokenizers";

const FORMAT = 1;
const LARGEST_FLOATS = 2.5e9; // bytes of weights that leave room for calls in WebAssembly's 4 GiB
const FLOATS = { F32: ["float32", Float32Array], F16: ["float16", globalThis.Float16Array ?? Uint16Array] };
const TYPES = { ...FLOATS, I64: ["int64", BigInt64Array], I32: ["int32", Int32Array] };
const NUMBERS = { 1: "F32", 6: "I32", 7: "I64", 10: "F16" }; // ONNX's codes of dtypes in .onnx_adapter files
const OPTIONS = ["maxNewTokens", "temperature", "topK", "topP", "repetitionPenalty", "eos", "seed", "signal"];
const ROUNDED = 0.2; // tolerance of logits against Python's, whose products may round operands to int8

/** An error with a message for users. */
export class LoracWebError extends Error {
  name = "LoracWebError";
}

const fail = (message) => {
  throw new LoracWebError(message);
};
const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);
const multiply = (numbers) => numbers.reduce((product, number) => product * number, 1);
const equal = (one, other) => JSON.stringify(one) === JSON.stringify(other);

// --- Files -----------------------------------------------------------------------------------------------------------
async function get(address) {
  const refuse = (why) => fail(`'${address}' cannot be fetched: ${why}`);
  const asked = address.pathname.endsWith(".json") ? { cache: "no-cache" } : {};
  const response = await fetch(address, asked).catch((error) => refuse(error.message));
  return response.ok ? response : refuse(`the server answers ${response.status}`);
}

async function fetchParts(base, parts, progress) {
  const whole = new Uint8Array(sum(parts.map((part) => part.bytes)));
  let offset = 0;
  for (const { sha256, bytes } of parts) {
    const content = await (await get(new URL(`files/${sha256}`, base))).arrayBuffer();
    if (content.byteLength !== bytes)
      fail(`'files/${sha256}' has ${content.byteLength} bytes instead of ${bytes}: copy the folder again`);
    // Without https the browser cannot compute hashes; parts are still named by the hash of their content.
    const hash = globalThis.crypto?.subtle && (await crypto.subtle.digest("SHA-256", content));
    if (hash && Array.from(new Uint8Array(hash), (byte) => byte.toString(16).padStart(2, "0")).join("") !== sha256)
      fail(`'files/${sha256}' was changed or damaged: copy the folder again`);
    whole.set(new Uint8Array(content), offset);
    offset += bytes;
    progress(bytes);
  }
  return whole;
}

const tensor = (kind, shape, bytes) => {
  const [type, Values] = TYPES[kind] ?? fail(`tensors of type ${kind} are none that browsers compute with`);
  if (multiply(shape) * Values.BYTES_PER_ELEMENT !== bytes.byteLength)
    fail(`a tensor of shape [${shape}] has ${bytes.byteLength} bytes`);
  return { type, dims: shape, data: new Values(bytes.slice().buffer) };
};

function readSafetensors(bytes) {
  const begin = 8 + Number(new DataView(bytes.buffer, bytes.byteOffset).getBigUint64(0, true));
  const { __metadata__, ...entries } = JSON.parse(new TextDecoder().decode(bytes.subarray(8, begin)));
  const read = ({ dtype, shape, data_offsets: [from, to] }) =>
    tensor(dtype, shape, bytes.subarray(begin + from, begin + to));
  return Object.fromEntries(Object.entries(entries).map(([name, entry]) => [name, read(entry)]));
}

// Reads the flat buffer of https://github.com/microsoft/onnxruntime/tree/main/onnxruntime/lora/adapter_format.
function readOnnxAdapter(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const follow = (at) => at + view.getUint32(at, true);
  const field = (table, number) => {
    const fields = table - view.getInt32(table, true);
    const place = 4 + 2 * number < view.getUint16(fields, true) ? view.getUint16(fields + 4 + 2 * number, true) : 0;
    return place && table + place;
  };
  const vector = (table, number) => {
    const at = field(table, number) || fail("the file lacks a field");
    return [follow(at) + 4, view.getUint32(follow(at), true)];
  };
  const [first, count] = vector(follow(0), 3);
  const read = (_, index) => {
    const table = follow(first + 4 * index);
    const [[name, letters], [dims, axes], [data, size]] = [0, 1, 3].map((number) => vector(table, number));
    const shape = Array.from({ length: axes }, (_, axis) => Number(view.getBigInt64(dims + 8 * axis, true)));
    const kind = view.getInt32(field(table, 2), true);
    const values = tensor(NUMBERS[kind] ?? kind, shape, bytes.subarray(data, data + size));
    return [new TextDecoder().decode(bytes.subarray(name, name + letters)), values];
  };
  return Object.fromEntries(Array.from({ length: count }, read));
}

function readTensors(name, bytes) {
  try {
    const isAdapter = new TextDecoder().decode(bytes.subarray(4, 8)) === "TORT";
    return bytes.length ? (isAdapter ? readOnnxAdapter : readSafetensors)(bytes) : {};
  } catch (error) {
    return fail(`'${name}' is not a file of slots (${error.message}): lorac swap FOLDER NAME --out FILE writes one`);
  }
}

// --- Adapters --------------------------------------------------------------------------------------------------------
function checkSlots(name, own, { slots, neutral }) {
  const all = { ...neutral, ...own };
  const ranks = {};
  for (const [slot, { type, dims }] of Object.entries(own)) {
    const expected = neutral[slot] ?? fail(`'${name}' is for another program: this one has no slot '${slot}'`);
    const fits = dims.every((size, axis) => axis === slots[slot].rank || size === expected.dims[axis]);
    if (type !== expected.type || dims.length !== expected.dims.length || !fits)
      fail(`'${name}' is for another program: '${slot}' is ${type} [${dims}], not ${expected.type} [${expected.dims}]`);
  }
  for (const [slot, { rank, sites }] of Object.entries(slots))
    if (rank >= 0 && (ranks[sites[0]] ??= all[slot].dims[rank]) !== all[slot].dims[rank])
      fail(`'${name}' has slots of several ranks at '${sites[0]}': copy the file again`);
  return own;
}

function concatenate(tensors, axis) {
  const dims = tensors[0].dims.with(axis, sum(tensors.map((each) => each.dims[axis])));
  const data = new tensors[0].data.constructor(multiply(dims));
  const rows = multiply(dims.slice(0, axis));
  for (let row = 0, at = 0; row < rows; row++)
    for (const each of tensors) {
      const width = each.data.length / rows;
      data.set(each.data.subarray(row * width, (row + 1) * width), at);
      at += width;
    }
  return { ...tensors[0], dims, data };
}

// W + Σ tᵢ·(W'ᵢ − W), as lorac mixes: concatenate pairs along the rank, and add up scales and weights.
function mixSlots(terms, { slots, neutral }) {
  const mixed = { ...neutral };
  const users = (slot) => terms.filter(({ own }) => own[slot]);
  const refuse = (why) => fail(`this mixture ${why}: lorac swap FOLDER A=0.7,B=0.3 --out FILE writes it as one file`);
  const scaling = {};
  for (const [slot, { role, sites, rank }] of Object.entries(slots)) {
    const used = users(slot);
    if (!used.length) continue;
    const start = neutral[slot];
    if (!["float32", "float16"].includes(start.type) || start.data instanceof Uint16Array)
      refuse(`needs arithmetic in ${start.type}`);
    const [, branch, part] = /^(branch\d+)\.(.+)$/.exec(role) ?? [];
    if (branch && used.length > 1) refuse("has one branch of several adapters");
    if (["c", "d", "t", "weight"].includes(role))
      for (const site of sites)
        if ((scaling[site] ??= role) !== role) refuse(`scales '${site}' in two ways`);
    if (["c", "d", "t", "weight", "bias"].includes(role) || part === "t") {
      const data = start.data.slice();
      for (const { strength, own } of used)
        own[slot].data.forEach((x, i) => (data[i] += x === start.data[i] ? 0 : strength * (x - start.data[i])));
      mixed[slot] = { ...start, data };
    } else if (branch) mixed[slot] = used[0].own[slot];
    else if (["a", "g"].includes(role) && rank >= 0) mixed[slot] = concatenate(used.map(({ own }) => own[slot]), rank);
    else if (role === "b" && rank >= 0) {
      const scaled = ({ strength, own }) => {
        const after = own[slot.replace(/b$/, "h")]?.data ?? [1]; // it acts only after this adapter's pair
        return { ...own[slot], data: own[slot].data.map((x, i) => x * strength * after[i % after.length]) };
      };
      mixed[slot] = concatenate(used.map(scaled), rank);
    } else if (role !== "h") refuse(`has slots '${role}', which are no sums`);
  }
  return mixed;
}

// --- Text ------------------------------------------------------------------------------------------------------------
const decodeIds = (tokenizer, ids) => (ids.length ? tokenizer.decode(ids, { skip_special_tokens: true }) : "");

function checkTexts(tokenizer, template, { samples, tokens, chat }) {
  for (const { text, ids, decoded } of samples) {
    const found = tokenizer.encode(text).ids;
    if (!equal(found, ids) || decodeIds(tokenizer, ids) !== decoded)
      fail(`the tokenizer reads ${JSON.stringify(text)} as ${found} here and as ${ids} in Python: give generate() ids`);
  }
  if (chat?.text && template.render({ messages: chat.turns, add_generation_prompt: true, ...tokens }) !== chat.text)
    fail("the chat template writes another text here than in Python: give generate() a text");
}

const uniform = (seed) => () => {
  seed = (seed + 0x6d2b79f5) | 0;
  const mixed = Math.imul(seed ^ (seed >>> 15), 1 | seed);
  const bits = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
  return ((bits ^ (bits >>> 14)) >>> 0) / 2 ** 32;
};

function chooseToken(logits, seen, { temperature, topK, topP, repetitionPenalty }, random) {
  if (repetitionPenalty !== 1)
    for (const id of new Set(seen)) logits[id] *= logits[id] < 0 ? repetitionPenalty : 1 / repetitionPenalty;
  let best = 0;
  for (let id = 1; id < logits.length; id++) if (logits[id] > logits[best]) best = id;
  if (!temperature) return best;
  let ranked = Array.from(logits.keys()).sort((one, other) => logits[other] - logits[one]);
  if (topK) ranked = ranked.slice(0, topK);
  const weights = ranked.map((id) => Math.exp((logits[id] - logits[best]) / temperature));
  const total = sum(weights);
  let [kept, count] = [0, 0];
  while (count < weights.length && (count === 0 || kept < topP * total)) kept += weights[count++];
  let left = random() * kept;
  for (let place = 0; place < count; place++) if ((left -= weights[place]) < 0) return ranked[place];
  return ranked[0];
}

// --- The model -------------------------------------------------------------------------------------------------------
class Model {
  #contents; #base; #ort; #session; #tokenizer; #template; #adapters; #slots;
  #choice = {}; #cache = null; #turn = Promise.resolve();

  constructor(contents, base, ort, session, tokenizer, template, backend) {
    [this.#contents, this.#base, this.#ort, this.#session] = [contents, base, ort, session];
    [this.#tokenizer, this.#template, this.backend] = [tokenizer, template, backend];
    const size = (parts) => sum(parts.map((part) => part.bytes));
    const entry = ([name, { method, content }]) => [name, { method, bytes: size(content) }];
    this.#adapters = new Map(Object.entries(contents.adapters).map(entry));
    this.#slots = contents.neutral;
  }

  get chats() { return this.#template !== null; }
  get choice() { return { ...this.#choice }; }
  encode(text) { return this.#tokenizer.encode(text).ids; }
  decode(ids) { return decodeIds(this.#tokenizer, ids); }
  mix(strengths) { return this.swap(strengths); }

  listAdapters() {
    return [...this.#adapters].map(([name, { method, bytes, own }]) => ({ name, method, bytes, loaded: Boolean(own) }));
  }

  addAdapter(name, file) {
    if (!name || this.#adapters.has(name)) fail(`there is an adapter '${name}' already: give another name`);
    const bytes = Uint8Array.from(new Uint8Array(file));
    const own = checkSlots(name, readTensors(name, bytes), this.#contents);
    this.#adapters.set(name, { method: "file", bytes: bytes.length, own });
  }

  async swap(choice) {
    const given = choice === null ? {} : typeof choice === "string" ? { [choice]: 1 } : { ...choice };
    for (const [name, strength] of Object.entries(given)) {
      if (!this.#adapters.has(name)) fail(`there is no adapter '${name}'; there are: ${[...this.#adapters.keys()]}`);
      if (!Number.isFinite(strength)) fail(`the strength of '${name}' is ${strength}: give a number`);
    }
    const names = Object.keys(given).filter((name) => given[name]).sort();
    for (const name of names) {
      const entry = this.#adapters.get(name);
      if (entry.own) continue;
      const bytes = await fetchParts(this.#base, this.#contents.adapters[name].content, () => {});
      entry.own = checkSlots(name, readTensors(name, bytes), this.#contents);
    }
    const terms = names.map((name) => ({ strength: given[name], own: this.#adapters.get(name).own }));
    const alone = terms.length === 1 && terms[0].strength === 1;
    this.#slots = alone ? { ...this.#contents.neutral, ...terms[0].own } : mixSlots(terms, this.#contents);
    this.#choice = Object.fromEntries(names.map((name) => [name, given[name]]));
  }

  encodeTurns(turns) {
    if (!this.#template) fail("the model has no chat template: give generate() a text");
    const given = { messages: turns, add_generation_prompt: true, ...this.#contents.tokenizer.tokens };
    return this.#tokenizer.encode(this.#template.render(given), { add_special_tokens: false }).ids;
  }

  async *generate(prompt, options = {}) {
    for (const name of Object.keys(options))
      if (!OPTIONS.includes(name)) fail(`generate() has no option '${name}'; it has ${OPTIONS.join(", ")}`);
    const { generation, limit } = this.#contents;
    const settings = {
      temperature: options.temperature ?? (generation.do_sample ? (generation.temperature ?? 1) : 0),
      topK: options.topK ?? generation.top_k ?? 50,
      topP: options.topP ?? generation.top_p ?? 1,
      repetitionPenalty: options.repetitionPenalty ?? generation.repetition_penalty ?? 1,
    };
    const { eos, signal, ...numbers } = { ...options, ...settings };
    for (const [name, value] of Object.entries(numbers))
      if (value !== undefined && !(value >= 0)) fail(`${name} is ${value}: give a number of at least 0`);
    const ends = [eos ?? generation.eos_token_id ?? []].flat();
    const random = options.seed === undefined ? Math.random : uniform(options.seed);
    const read = typeof prompt === "string" ? "encode" : typeof prompt[0] === "object" ? "encodeTurns" : "from";
    const ids = read === "from" ? Array.from(prompt) : this[read](prompt);
    const begun = ids.length;
    if (!begun) fail("the prompt has no token: give a text");
    if (limit && begun >= limit) fail(`the text has ${begun} tokens, and the model positions for ${limit}: begin anew`);
    const [slots, key] = [this.#slots, JSON.stringify(this.#choice)]; // a swap takes effect in the next call
    const cache = this.#cache?.key === key ? this.#cache : { key, ids: [], buffers: null };
    this.#cache = null;
    let text = "";
    try {
      for (let count = options.maxNewTokens ?? 256; count > 0 && !(limit && ids.length >= limit); count--) {
        if (signal?.aborted) return;
        const token = chooseToken(await this.#decode(slots, cache, ids), ids, settings, random);
        ids.push(token);
        const isLast = ends.includes(token) || count === 1 || ids.length === limit;
        const whole = this.decode(ids.slice(begun));
        const shown = whole.endsWith("\ufffd") && !isLast ? text : whole; // hold back an incomplete character
        yield { token, text: shown.slice(text.length) };
        text = shown;
        if (ends.includes(token)) return;
        await new Promise((resume) => setTimeout(resume)); // let the page paint, or stop this call
      }
    } finally {
      this.#cache = cache;
    }
  }

  /** Return the logits after ids; compute only ids that are not in the cache, and cache them. */
  async #decode(slots, cache, ids) {
    let known = 0;
    while (known < Math.min(cache.ids.length, ids.length - 1) && cache.ids[known] === ids[known]) known++;
    const fresh = ids.slice(known);
    this.#reserve(cache, ids.length);
    const { Tensor } = this.#ort;
    const int64 = (values) => new Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
    const inputs = {
      input_ids: int64(fresh),
      logits_to_keep: int64([fresh.length - 1]),
      past_lengths: new Tensor("int32", Int32Array.of(known), [1]),
      new_lengths: new Tensor("int32", Int32Array.of(fresh.length), [1]),
    };
    if (!this.#session.inputNames.includes("logits_to_keep")) delete inputs.logits_to_keep;
    const values = Object.entries({ ...slots, ...cache.buffers });
    for (const [name, { type, data, dims }] of values) inputs[name] = new Tensor(type, data, dims);
    const call = this.#turn.then(() => this.#session.run(inputs)); // one call at a time
    this.#turn = call.catch(() => {});
    const outputs = await call.catch((error) => fail(`the program fails: ${error.message}`));
    for (const name of Object.keys(cache.buffers)) {
      const { type, data, dims } = outputs[name.replace("past_key_values", "present")];
      cache.buffers[name] = { type, data, dims };
    }
    cache.ids = ids.slice();
    const name = this.#session.outputNames.find((each) => !each.startsWith("present."));
    const { data, dims } = outputs[name];
    return Float32Array.from(data instanceof Uint16Array ? Array.from(data, fromHalf) : data).subarray(-dims.at(-1));
  }

  #reserve(cache, length) {
    const before = cache.buffers ? Object.values(cache.buffers)[0].dims[2] : 0;
    if (length <= before) return;
    const capacity = Math.max(64, 2 ** Math.ceil(Math.log2(length)));
    const larger = {};
    for (const { name, type, shape } of this.#session.inputMetadata) {
      if (!name.startsWith("past_key_values.")) continue;
      const [, heads, , size] = shape;
      const data = new (Object.values(FLOATS).find(([known]) => known === type)[1])(heads * capacity * size);
      const old = before * size;
      for (let head = 0; old && head < heads; head++)
        data.set(cache.buffers[name].data.subarray(head * old, (head + 1) * old), head * capacity * size);
      larger[name] = { type, data, dims: [1, heads, capacity, size] };
    }
    cache.buffers = larger;
  }

  /** Return whether the base's logits agree with those that Python computed. */
  async check({ ids, stride, logits }) {
    const found = await this.#decode(this.#contents.neutral, { ids: [], buffers: null }, ids);
    const norm = (values) => Math.sqrt(sum(values.map((value) => value * value)));
    return norm(logits.map((value, place) => value - found[place * stride])) <= ROUNDED * norm(logits);
  }

  dispose() { return this.#turn.then(() => this.#session.release()); }
}

function fromHalf(bits) {
  const [sign, exponent, fraction] = [bits & 0x8000 ? -1 : 1, (bits >> 10) & 31, bits & 1023];
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024));
}

async function findBackend(asked = "auto") {
  if (!["auto", "wasm", "webgpu"].includes(asked)) fail(`there is no backend '${asked}': give auto, wasm or webgpu`);
  const adapter = asked !== "wasm" && (await globalThis.navigator?.gpu?.requestAdapter().catch(() => null));
  if (asked === "webgpu" && !adapter) fail("this browser has no WebGPU: give backend 'wasm'");
  return adapter ? "webgpu" : "wasm";
}

/** Load the folder that `lorac export-web` wrote. */
export async function load(folder, options = {}) {
  for (const name of Object.keys(options))
    if (!["backend", "onProgress"].includes(name)) fail(`load() has no option '${name}'; it has backend, onProgress`);
  const base = new URL(String(folder).replace(/\/?$/, "/"), globalThis.location?.href);
  const damaged = (error) => fail(`'web.json' is damaged: ${error.message}`);
  const contents = await (await get(new URL("web.json", base))).json().catch(damaged);
  if (contents.lorac_web !== FORMAT)
    fail(`'${base}' is version ${contents.lorac_web} of the format, this lorac-web reads ${FORMAT}: export it again`);
  const backend = await findBackend(options.backend);
  const isLarge = contents.float_bytes > LARGEST_FLOATS;
  const graph = (backend === "webgpu" || isLarge ? contents.graphs.codes : null) ?? contents.graphs.float;
  const files = [graph, contents.neutral, contents.tokenizer.json, ...Object.values(contents.weights)];
  const total = sum(files.flat().map((part) => part.bytes));
  let loaded = 0;
  const progress = (bytes) => options.onProgress?.({ loaded: (loaded += bytes), total });
  const fetched = (parts) => fetchParts(base, parts, progress);
  const { config, chat } = contents.tokenizer;
  const described = JSON.parse(new TextDecoder().decode(await fetched(contents.tokenizer.json)));
  const tokenizer = new Tokenizer(described, config);
  const template = chat ? new Template(chat.template) : null;
  checkTexts(tokenizer, template, contents.tokenizer);
  contents.neutral = readTensors("neutral", await fetched(contents.neutral));
  const model = await fetched(graph);
  const externalData = [];
  for (const [path, parts] of Object.entries(contents.weights)) externalData.push({ path, data: await fetched(parts) });
  const ort = await (backend === "webgpu" ? import("onnxruntime-web/webgpu") : import("onnxruntime-web/wasm"));
  ort.env.wasm.numThreads = globalThis.crossOriginIsolated ? Math.min(8, navigator.hardwareConcurrency) : 1;
  // Fold dequantised weights into constants, instead of quantising them again.
  const extra = { session: { disable_quant_qdq: graph === contents.graphs.float ? "1" : "0" } };
  const settings = { externalData, extra, executionProviders: [backend], logSeverityLevel: 3 };
  const unloaded = (error) => fail(`the program does not load: ${error.message}`);
  const session = await ort.InferenceSession.create(model, settings).catch(unloaded);
  const made = new Model(contents, base, ort, session, tokenizer, template, backend);
  if (!(await made.check(contents.check))) {
    await made.dispose();
    if (backend === options.backend || backend === "wasm") fail(`${backend} computes other numbers than Python does`);
    console.warn("lorac-web: WebGPU computes other numbers than lorac does in Python; WebAssembly computes instead");
    return load(folder, { ...options, backend: "wasm" });
  }
  await made.swap(contents.active);
  return made;
}
