// What the page tells and finds. Stands behind places.js, in one function with it.
const MOST = 400;  // lines of a column
const find = document.getElementById("find"), found = document.getElementById("found");
const details = document.getElementById("details"), levels = document.getElementById("levels");
let chosen = null, hits = [], at = -1;

// ── What is told of a box ──────────────────────────────────────────────────────────────────────────────────────────
function make(name, text, cls) {
  const element = document.createElement(name);
  if (text !== undefined) element.textContent = text;
  if (cls) element.className = cls;
  return element;
}
function list(title, texts, cls) {
  if (!texts.length) return [];
  const items = make("ul");
  for (const text of texts) items.append(make("li", text, cls));
  return [make("h3", title), items];
}
function button(text, act) {
  const made = make("button", text);
  made.type = "button";
  made.addEventListener("click", act);
  return made;
}
function describe(element) {
  const [g, n] = boxOf(element), box = told(g, n), path = pathOf(element);
  const inner = box.kind === "ops" ? `${path || data.graphs[g].name}: ${box.title}` : path || box.title;
  details.replaceChildren(make("h2", inner));
  const about = box.kind === "ops" ? box.about : box.class || box.type || box.about;
  if (about) details.append(make("p", about, "soft"));
  if (box.copies.length) {
    const many = `The same in ${box.copies.length} more: ${box.copies[0]}${box.copies.length > 1 ? " … " + box.copies.at(-1) : ""}`;
    details.append(make("p", many));
    details.append(button(unfolded.has(idOf(g, n)) ? "Fold" : `Show all ${box.copies.length + 1}`, () => { fold(g, n); describe(own(g, n)); }), " ");
  }
  if (n && direct(own(g, n), ".inside")) details.append(button(isOpen(g, n) ? "Close" : "Open", () => { toggle(g, n); describe(own(g, n)); }));
  for (const site of box.sites) details.append(...siteTold(site, element));
  const given = box.reads.map(([kind, from]) => from ? `${kind}  from ${from}` : kind);
  details.append(...list("Reads", given, "mono"), ...list("Gives", box.gives, "mono"));
  details.append(...list("Written at", box.sources, "mono"));
  if (box.ops.length) details.append(make("h3", "Operations"), make("p", box.ops.join(" · "), "mono"));
  columns(g, box, path);
}
function siteTold(path, element) {
  const site = data.sites[path];
  let shown = path;
  for (let outer = element; outer; outer = around(outer)) {
    if (outer.dataset.copy === undefined) continue;
    const folded = told(...boxOf(outer));
    shown = moved(shown, folded.call, folded.copies[outer.dataset.copy]);
  }
  const called = shown === pathOf(element) ? "Site" : `Site ${shown}`;
  const heading = make("h3", site ? called : `${called}: bare, runs as the model has it`);
  if (!site) return [heading];
  const what = [site.kind, site.shape, site.note].filter(Boolean).join(" · ");
  return [heading, make("p", what, "soft"), ...site.terms.map(termTold)];
}
function termTold(term) {
  const made = make("div", undefined, `term c${term.colour}`), rows = make("dl");
  made.append(make("b", term.adapter), make("span", `  ${term.method}`, "soft"), rows);
  const row = (what, text) => { if (text) rows.append(make("dt", what), make("dd", text)); };
  row("form", term.form);
  row("runs", `${term.state}: ${term.means}`);
  row("strength", term.strength ? String(term.strength) : "off");
  row("why", term.why.join("; ") || "there is no cheaper form or place");
  row("but", term.merged);
  row("tensors", term.tensors);
  row("slots", term.slots.join(", "));
  row("size", `${term.size}, computed in ${term.dtype}`);
  row("cost", term.flops && `${term.flops} FLOP per token`);
  row("swap", term.swap);
  return made;
}

// ── The program at each level ──────────────────────────────────────────────────────────────────────────────────────
function columns(g, box, path) {
  levels.hidden = box.kind === "in" || box.kind === "out";
  if (levels.hidden) return;
  const head = make("header"), body = make("div", undefined, "columns");
  head.append(make("b", box.kind === "ops" ? `${path}: ${box.title}` : path || data.graphs[g].name), button("Hide", () => { levels.hidden = true; }));
  for (const level of data.graphs[g].levels) body.append(column(level, box, path));
  levels.replaceChildren(head, body);
}
function column(level, box, path) {
  const made = make("div"), text = make("div", undefined, "rows"), lines = linesOf(level, box, path);
  made.append(make("h3", `${level.title}: ${lines.length} ${lines.length === 1 ? "line" : "lines"}`), text);
  made.tabIndex = 0;
  for (const [left, kind, note, role] of lines.slice(0, MOST)) {
    const row = make("div", left, `row-${role}`);
    row.append(make("span", `  ${kind}`, "t"), make("span", `  ${note}`, "s"));
    text.append(row);
  }
  if (lines.length > MOST) text.append(`… and ${lines.length - MOST} more: select a module inside`);
  return made;
}
function linesOf(level, box, path) {
  const {calls, groups, lines} = data.texts, loose = box.kind === "ops", sources = new Set(box.sources), out = [];
  for (let i = 0; i < level.groups.length; i += 2) {
    const call = calls[level.groups[i]];
    if (loose ? plain(call) !== plain(path) : !inside(call, path)) continue;
    for (const line of groups[level.groups[i + 1]]) {
      if (!loose || sources.has(lines[line][2])) out.push(lines[line]);
    }
  }
  return out;
}
function inside(call, path) {
  const [, again] = path.split("@"), [, other] = call.split("@");
  return holds(path, call) && (again === undefined || other === undefined || again === other);
}

// ── Choosing, by mouse, key and address ────────────────────────────────────────────────────────────────────────────
function choose(element, reveal) {
  for (const other of document.querySelectorAll(".chosen")) other.classList.remove("chosen");
  chosen = element;
  element.classList.add("chosen");
  describe(element);
  note();
  if (reveal) bring(element);
}
// Scroll the picture, and the page only where the picture is out of sight.
function bring(element) {
  const box = element.getBoundingClientRect(), pane = pictures.getBoundingClientRect();
  pictures.scrollBy(box.left + box.width / 2 - pane.left - pane.width / 2, box.top + Math.min(box.height, pane.height) / 2 - pane.top - pane.height / 2);
  const there = element.getBoundingClientRect();
  if (there.top < 0 || there.top > innerHeight) document.querySelector("main").scrollIntoView();
}
function note() {
  const told_ = new URLSearchParams();
  if (find.value) told_.set("find", find.value);
  if (chosen) {
    const [g, n] = boxOf(chosen), path = pathOf(chosen);
    if (data.graphs.length > 1) told_.set("graph", data.graphs[g].name);
    told_.set("at", ["ops", "in", "out"].includes(told(g, n).kind) ? `${path}~${n}` : path);
  }
  history.replaceState(null, "", `#${told_}`);
}
// The box for a path, and the calls of the copies on the way to it.
function resolve(g, path) {
  const numbered = path.match(/~(\d+)$/);
  if (numbered) return [Number(numbered[1]), []];
  const boxes = data.graphs[g].boxes, through = [];
  boxes.forEach((box, n) => {
    const k = holds(box.call, path) ? -1 : box.copies.findIndex(call => holds(call, path));
    if (k >= 0) { through.push([n, k]); path = moved(path, box.copies[k], box.call); }
  });
  const exact = boxes.findIndex(box => plain(box.call) === path && ["module", "site"].includes(box.kind));
  const n = exact >= 0 ? exact : boxes.findIndex(box => box.sites.includes(path));
  return [n, through];
}
function reveal(g, path) {
  const [n, through] = resolve(g, path);
  if (n < 0 || !own(g, n)) return false;
  for (let outer = around(own(g, n)); outer; outer = around(outer)) setOpen(...boxOf(outer), true);
  for (const [folded] of through) unfolded.add(idOf(g, folded));
  redraw(g);
  const drawn = drawings(g, n);
  choose(drawn.find(element => holds(pathOf(element), path) || pathOf(element) === path) || drawn[0], true);
  return true;
}
function fromAddress() {
  const told_ = new URLSearchParams(location.hash.slice(1));
  if (told_.get("find")) { find.value = told_.get("find"); search(); }
  const g = Math.max(0, data.graphs.findIndex(graph => graph.name === told_.get("graph")));
  if (told_.has("at")) reveal(g, told_.get("at"));
}

// ── Search ─────────────────────────────────────────────────────────────────────────────────────────────────────────
const wordsOf = box => [
  box.call, box.title, box.class, box.about, ...box.ops, ...box.copies, ...box.sites,
  ...box.sites.flatMap(site => (data.sites[site]?.terms || []).flatMap(t => [t.adapter, t.method, t.form, t.state])),
].join("\n").toLowerCase();
const words = data.graphs.map(graph => graph.boxes.map(wordsOf));
function search() {
  const wanted = find.value.trim().toLowerCase();
  for (const element of document.querySelectorAll(".hit, .around")) element.classList.remove("hit", "around");
  pictures.classList.toggle("searching", Boolean(wanted));
  hits = [];
  at = -1;
  found.textContent = "";
  if (!wanted) return note();
  data.graphs.forEach((graph, g) => graph.boxes.forEach((box, n) => {
    if (n && own(g, n) && words[g][n].includes(wanted) && !inner(g, n, wanted)) hits.push([g, n]);
  }));
  for (const element of hits.flatMap(hit => drawings(...hit))) {
    element.classList.add("hit");
    for (let outer = around(element); outer; outer = around(outer)) {
      outer.classList.add(isOpen(...boxOf(outer)) ? "around" : "hit");
    }
  }
  found.textContent = hits.length ? `${hits.length} found; Enter goes to the next` : named(wanted) ? "1 found; Enter goes there" : "nothing found";
  note();
}
// A module is no hit for what only boxes inside it are hits for.
const inner = (g, n, wanted) => direct(own(g, n), ".inside") !== null
  && ![told(g, n).title, told(g, n).class, ...told(g, n).copies, ...told(g, n).sites].some(text => text.toLowerCase().includes(wanted))
  && !told(g, n).sites.some(site => (data.sites[site]?.terms || []).some(t => t.adapter.toLowerCase().includes(wanted)));
const named = wanted => data.graphs.findIndex((_, g) => resolve(g, find.value.trim())[0] >= 0) >= 0;
function next(step) {
  if (!hits.length) {
    data.graphs.some((_, g) => reveal(g, find.value.trim()));
    return;
  }
  at = (at + step + hits.length) % hits.length;
  const [g, n] = hits[at];
  for (let outer = around(own(g, n)); outer; outer = around(outer)) setOpen(...boxOf(outer), true);
  redraw(g);
  choose(own(g, n), true);
  found.textContent = `${at + 1} of ${hits.length}`;
}

// ── Hands ──────────────────────────────────────────────────────────────────────────────────────────────────────────
pictures.addEventListener("click", event => {
  const element = event.target.closest(".box");
  if (!element || !boxOf(element)[1]) return;
  if (event.target.matches(".toggle")) toggle(...boxOf(element));
  else if (event.target.matches(".count")) fold(...boxOf(element));
  else choose(element);
});
pictures.addEventListener("dblclick", event => {
  const element = event.target.closest(".box");
  if (element) toggle(...boxOf(element));
});
pictures.addEventListener("keydown", event => {
  const element = event.target.closest(".box");
  if (!element) return;
  const [g, n] = boxOf(element), open = own(g, n).classList.contains("open");
  if (event.key === "Enter" || event.key === " ") choose(element);
  else if ((event.key === "ArrowRight" && !open) || (event.key === "ArrowLeft" && open)) toggle(g, n);
  else if (event.key === "x") fold(g, n);
  else return;
  event.preventDefault();
});
document.addEventListener("keydown", event => {
  if (event.key === "/" && event.target !== find) { event.preventDefault(); find.focus(); }
  if (event.key === "Escape") { find.value = ""; search(); levels.hidden = true; }
});
find.addEventListener("input", search);
find.addEventListener("keydown", event => { if (event.key === "Enter") next(event.shiftKey ? -1 : 1); });
for (const link of document.querySelectorAll("[data-find]")) {
  link.addEventListener("click", () => { find.value = link.dataset.find; search(); pictures.scrollIntoView(); });
}
document.getElementById("open-all").addEventListener("click", () => all(true));
document.getElementById("close-all").addEventListener("click", () => all(false));
document.getElementById("fit").addEventListener("click", () => { scale = 0; zoom(); });
document.getElementById("larger").addEventListener("click", () => { scale = Math.min(3, (scale || current()) * 1.25); zoom(); });
document.getElementById("smaller").addEventListener("click", () => { scale = Math.max(0.2, (scale || current()) / 1.25); zoom(); });
const current = () => {
  const svg = pictures.querySelector("svg.graph");
  return svg.clientWidth / Number(svg.getAttribute("width")) || 1;
};
addEventListener("resize", zoom);
addEventListener("hashchange", fromAddress);
details.append(make("p", "Select a box to see where it comes from, what the adapters there are and why they run as they do. Boxes with ▸ open; “× n” shows all n. The keys: Tab, Enter, ← and →, x, /.", "soft"));
zoom();
fromAddress();
document.documentElement.dataset.ready = "";
