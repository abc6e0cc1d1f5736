// Look up words that people type, as the search of the built site does: node docs/search_words.mjs build/site
// Prints the first two pages of each, and fails where the page that answers is not there for more than one in twenty.
import { readFileSync, readdirSync } from "node:fs";
import { join } from "node:path";
import { createRequire } from "node:module";
import vm from "node:vm";

const ASKED = {
  fp16: "modes tensorrt", bf16: "modes openvino", quantize: "modes", quantization: "modes", int8: "modes", int4: "modes",
  GPU: "modes tensorrt install", CUDA: "install modes tensorrt", notebook: "tour", tutorial: "tour", install: "install",
  docker: "without-lorac serving install", k8s: "serving", kubernetes: "serving", OpenAI: "serving", metrics: "serving",
  streaming: "generate serving", "LoRA scale": "mixing diffusion", "weighted adapters": "mixing merging",
  router: "mixing", merge: "merging", TIES: "merging ways", mergekit: "merging", vLLM: "which convert engines serving",
  GGUF: "convert files", Ollama: "which convert", "multi-LoRA": "capacity", "hot swap": "capacity", batch: "capacity images",
  ONNX: "without-lorac", browser: "without-lorac", "dynamic_shapes": "images", DPO: "training", "fine-tune": "training",
  SFT: "training from-peft", safetensors: "files", "Stable Diffusion": "diffusion", "KV cache": "generate",
  "get_peft_model": "from-peft", "custom method": "own-method",
  ollama: "which convert", OOM: "capacity modes troubleshooting", checkpoint: "files training merging",
  QLoRA: "training", bitsandbytes: "modes", Mac: "install", "Apple Silicon": "install", ROCm: "install modes",
  npm: "without-lorac", Rust: "without-lorac", wandb: "training trainers", "multi GPU": "training",
  "resume training": "training", "tool calling": "serving", "structured output": "serving", "api key": "serving",
  "batch size": "capacity training images", DoRA: "methods reference/methods from-peft",
  target_modules: "from-peft own-method reference/adapters peft", modules_to_save: "from-peft peft capacity files",
  Whisper: "generate", ComfyUI: "diffusion files images formats", load_lora_weights: "diffusion images",
  YOLO: "images", classifier: "capacity images training", "speculative decoding": "generate",
  "unload adapter": "from-peft capacity reference/compiled", latency: "benchmarks", "prompt tuning": "generate",
  "push to hub": "files", "beam search": "generate", "rank 64": "capacity methods", AWQ: "modes merging",
  "cpu threads": "capacity modes generate", "vision transformer": "images", "stop string": "generate serving",
  TensorBoard: "training", "llama.cpp": "which convert engines", "image generation": "diffusion",
  "swap adapters": "capacity tour mixing", DDP: "training", proxy: "serving install without-lorac",
  "conv LoRA": "images reference/methods methods experiments", embedding: "serving capacity",
  "error out of room": "troubleshooting capacity", LoHa: "methods reference/methods images",
  "export onnx": "without-lorac convert tour reference/compiled", SVD: "convert merging",
  "upload adapter": "serving files", Triton: "serving which", "resize rank": "convert",
};

const site = process.argv[2];
const workers = join(site, "assets/javascripts/workers");
const worker = readdirSync(workers).find((name) => /^search\..*\.js$/.test(name));
const answers = [];
let handler;
Object.assign(globalThis, {
  self: globalThis,
  addEventListener: (_, listener) => (handler = listener),
  postMessage: (message) => answers.push(message),
  require: createRequire(import.meta.url),
});
vm.runInThisContext(readFileSync(join(workers, worker), "utf8"));

const send = async (message) => {
  handler({ data: message });
  while (!answers.length) await new Promise((done) => setTimeout(done, 1));
  return answers.pop();
};
const index = JSON.parse(readFileSync(join(site, "search/search_index.json"), "utf8"));
await send({ type: 0, data: { ...index, options: { suggest: false } } });
let right = 0;
for (const [words, pages] of Object.entries(ASKED)) {
  const { data } = await send({ type: 2, data: words });
  const found = [...new Set(data.items.map((item) => item[0].location.replace(/\.html.*/, "")))].slice(0, 2);
  const isRight = found.some((page) => pages.split(" ").includes(page));
  right += isRight;
  console.log(`${isRight ? "right" : "WRONG"}  ${words.padEnd(20)} ${found.join(", ") || "nothing"}`);
}
console.log(`${right} of ${Object.keys(ASKED).length}`);
process.exitCode = right >= 0.95 * Object.keys(ASKED).length ? 0 : 1;
