// Look up words that people type, as the search of the built site does: node docs/search_words.mjs build/site
// Prints the first page of each, and fails where fewer than 38 of the 40 are the page that answers.
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
  const first = data.items[0]?.[0].location.replace(/\.html.*/, "") ?? "nothing";
  right += pages.split(" ").includes(first);
  console.log(`${pages.split(" ").includes(first) ? "right" : "WRONG"}  ${words.padEnd(18)} ${first}`);
}
console.log(`${right} of ${Object.keys(ASKED).length}`);
process.exitCode = right >= 38 ? 0 : 1;
