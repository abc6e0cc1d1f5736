// The page: a conversation, and the adapters that answer.
import { load } from "./lorac-web.js";

const find = (id) => document.getElementById(id);
const make = (parent, tag, attributes) => parent.appendChild(Object.assign(document.createElement(tag), attributes));
const show = (error) => (find("failure").textContent = error ? error.message : "");
const guarded = (work) => async (event) => {
  event?.preventDefault?.();
  show(null);
  await work(event).catch(show);
};

let turns = [];
let stopping = null;
const megabytes = (bytes) => (bytes / 1e6).toFixed(1);
const onProgress = ({ loaded, total }) =>
  (find("state").textContent = `loading: ${megabytes(loaded)} of ${megabytes(total)} MB`);

function addTurn(role, content) {
  const turn = make(find("turns"), "div", { className: "turn" });
  make(turn, "b", { textContent: role });
  return make(turn, "span", { textContent: content });
}

function listAdapters(model) {
  find("adapters").replaceChildren();
  for (const { name, method } of model.listAdapters()) {
    const row = make(find("adapters"), "label", { className: "adapter" });
    const box = make(row, "input", { type: "checkbox", name, checked: name in model.choice });
    make(row, "span", { textContent: name });
    const value = model.choice[name] ?? 1;
    const strength = make(row, "input", { type: "number", step: 0.1, value, ariaLabel: `Strength of ${name}` });
    make(row, "span", { className: "method", textContent: method });
    box.onchange = strength.onchange = guarded(async () => {
      const boxes = [...find("adapters").querySelectorAll("input[type=checkbox]:checked")];
      const strengths = boxes.map((one) => [one.name, Number(one.parentElement.querySelector("[type=number]").value)]);
      await model.swap(Object.fromEntries(strengths)).catch((error) => {
        listAdapters(model);
        throw error;
      });
    });
  }
}

async function answer(model) {
  const asked = { role: "user", content: find("text").value };
  const prompt = model.chats ? [...turns, asked] : [...turns, asked].map((turn) => turn.content).join("");
  const active = Object.entries(model.choice).map(([name, value]) => (value === 1 ? name : `${value} × ${name}`));
  stopping = new AbortController();
  [find("send").disabled, find("stop").disabled] = [true, false];
  addTurn("you", asked.content);
  const shown = addTurn(active.join(" + ") || "no adapter", "");
  const [begun, before] = [performance.now(), find("state").textContent];
  let count = 0;
  try {
    for await (const { text } of model.generate(prompt, { signal: stopping.signal })) {
      shown.textContent += text;
      find("turns").scrollTop = find("turns").scrollHeight;
      const speed = (1e3 * ++count) / (performance.now() - begun);
      find("state").textContent = `${count} tokens, ${speed.toFixed(1)} a second`;
    }
    find("text").value = "";
    turns = [...turns, asked, { role: "assistant", content: shown.textContent }];
  } catch (error) {
    find("state").textContent = before;
    for (const turn of count ? [] : [...find("turns").children].slice(-2)) turn.remove();
    throw error;
  } finally {
    [find("send").disabled, find("stop").disabled] = [false, true];
  }
}

guarded(async () => {
  const model = await load(new URL(".", location.href), { onProgress });
  globalThis.model = model; // for the console
  find("state").textContent = model.backend === "webgpu" ? "ready, by WebGPU" : "ready, by WebAssembly";
  listAdapters(model);
  for (const id of ["send", "new", "file"]) find(id).disabled = false;
  find("composer").onsubmit = guarded(() => answer(model));
  find("text").onkeydown = (event) =>
    event.key === "Enter" && !event.shiftKey && (event.preventDefault(), find("send").click());
  find("stop").onclick = () => stopping?.abort();
  find("new").onclick = () => ((turns = []), find("turns").replaceChildren(), show(null));
  find("file").onchange = guarded(async ({ target: { files } }) => {
    const name = files[0].name.replace(/(\.slots\.safetensors|\.[^.]*)$/, "");
    model.addAdapter(name, await files[0].arrayBuffer());
    listAdapters(model);
  });
})();
