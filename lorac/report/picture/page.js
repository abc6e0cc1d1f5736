// The page around the picture: details of a box, search, keys. Follows picture.js, in one function with it.
const MAX_ROWS = 400;  // of a column
const find = document.getElementById("find"), found = document.getElementById("found");
const overview = document.getElementById("overview"), details = document.getElementById("details"), levels = document.getElementById("levels");
let chosen = null, hits = [], at = -1;  // chosen: the graph, the number and the path of a box

// ── Details of a box ───────────────────────────────────────────────────────────────────────────────────────────────
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
function describe({g, n, path}) {
  const box = boxAt(g, n), redescribe = act => () => { act(g, n); describe({g, n, path}); };
  details.replaceChildren(make("h2", box.kind === "ops" ? `${path || data.graphs[g].name}: ${box.title}` : path || box.title));
  const about = box.kind === "ops" ? box.about : box.class || box.type || box.about;
  if (about) details.append(make("p", about, "soft"));
  if (box.copies.length) {
    const others = box.copies.length > 1 ? ` … ${box.copies.at(-1)}` : "";
    details.append(make("p", `${box.copies.length} more are identical: ${box.copies[0]}${others}`));
    details.append(button(isUnfolded(g, n) ? "Fold" : `Show all ${box.copies.length + 1}`, redescribe(fold)), " ");
  }
  if (n && box.parts.length) details.append(button(isOpen(g, n) ? "Close" : "Open", redescribe(toggle)));
  for (const site of box.sites) details.append(...describeSite(moved(site, box.call, path), site, path));
  const links = boxAt(g, box.parent ?? 0).links, types = data.graphs[g].types;
  const reads = links.filter(([, , target]) => target === n).map(([value, source]) => source < 0 ? types[value] : `${types[value]}  from ${boxAt(g, source).title}`);
  const gives = links.filter(([, source]) => source === n).map(([value]) => types[value]);
  if (n) details.append(...list("Reads", reads, "mono"), ...list("Gives", [...new Set(gives)], "mono"));
  details.append(...list("Written at", box.sources, "mono"));
  if (box.ops.length) details.append(make("h3", "Operations"), make("p", box.ops.join(" · "), "mono"));
  details.hidden = false;
  overview.hidden = true;
  columns(g, box, path);
}
function describeSite(name, site, path) {
  const known = data.sites[site], called = name === path ? "Site" : `Site ${name}`;
  if (!known) return [make("h3", `${called}: without adapter, runs as in the model`)];
  const facts = [known.kind, known.shape, known.note].filter(Boolean).join(" · ");
  return [make("h3", called), make("p", facts, "soft"), ...known.terms.map(describeTerm)];
}
function describeTerm(term) {
  const made = make("div", undefined, `term c${term.color}`), rows = make("dl");
  made.append(make("b", term.adapter), make("span", `  ${term.method}`, "soft"), rows);
  const row = (name, text) => { if (text) rows.append(make("dt", name), make("dd", text)); };
  row("form", term.form);
  row("runs", `${term.state}: ${term.means}`);
  row("strength", term.strength ? String(term.strength) : "off");
  row("why", term.why.join("; ") || "no form or place is cheaper");
  row("but", term.unfusable);
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
  for (const [left, type, note, role] of lines.slice(0, MAX_ROWS)) {
    const row = make("div", left, `row-${role}`);
    row.append(make("span", `  ${type}`, "t"), make("span", `  ${note}`, "s"));
    text.append(row);
  }
  if (lines.length > MAX_ROWS) text.append(`… and ${lines.length - MAX_ROWS} more: select a module inside`);
  return made;
}
function linesOf(level, box, path) {
  const {modules, groups, lines} = data.texts, loose = box.kind === "ops", sources = new Set(box.sources), out = [];
  for (let i = 0; i < level.pairs.length; i += 2) {
    const call = modules[level.pairs[i]];
    if (loose ? plain(call) !== plain(path) : !isCallInside(call, path)) continue;
    for (const line of groups[level.pairs[i + 1]]) {
      if (!loose || sources.has(lines[line][2])) out.push(lines[line]);
    }
  }
  return out;
}
function isCallInside(call, path) {
  const [, again] = path.split("@"), [, other] = call.split("@");
  return holds(path, call) && (again === undefined || other === undefined || again === other);
}

// ── Choosing, by mouse, key and address ────────────────────────────────────────────────────────────────────────────
const drawingOf = ({g, n, path}) => {
  const all = drawings(g, n);
  return all.find(element => element.dataset.path === path) || all.find(element => holds(element.dataset.path, path)) || all[0];
};
function choose(g, n, path, reveal) {
  chosen = {g, n, path};
  highlight();
  describe(chosen);
  writeAddress();
  if (reveal && drawingOf(chosen)) scrollTo_(drawingOf(chosen));
}
// Scroll the picture, and the page only where the picture is out of sight.
function scrollTo_(element) {
  const box = element.getBoundingClientRect(), pane = pictures.getBoundingClientRect();
  pictures.scrollBy(box.left + box.width / 2 - pane.left - pane.width / 2, box.top + Math.min(box.height, pane.height) / 2 - pane.top - pane.height / 2);
  const there = element.getBoundingClientRect();
  if (there.top < 0 || there.top > innerHeight) document.querySelector("main").scrollIntoView();
}
function writeAddress() {
  const address = new URLSearchParams();
  if (find.value) address.set("find", find.value);
  if (chosen) {
    const {g, n, path} = chosen;
    if (data.graphs.length > 1) address.set("graph", data.graphs[g].name);
    address.set("at", CENTERED.includes(boxAt(g, n).kind) ? `${path}~${n}` : path);
  }
  history.replaceState(null, "", `#${address}`);
}
// The box for a path, and the boxes to unfold on the way to it.
function resolve(g, path) {
  const numbered = path.match(/~(\d+)$/);
  if (numbered) return [Number(numbered[1]), []];
  const boxes = data.graphs[g].boxes, through = [];
  boxes.forEach((box, n) => {
    const k = holds(box.call, path) ? -1 : box.copies.findIndex(call => holds(call, path));
    if (k >= 0) { through.push(n); path = moved(path, box.copies[k], box.call); }
  });
  const exact = boxes.findIndex(box => plain(box.call) === path && ["module", "site"].includes(box.kind));
  return [exact >= 0 ? exact : boxes.findIndex(box => box.sites.includes(path)), through];
}
function reveal(g, path) {
  const [n, through] = resolve(g, path);
  if (n < 0 || !boxAt(g, n)) return false;
  for (const around of outer(g, n)) setOpen(g, around, true);
  for (const folded of through) unfolded.add(idOf(g, folded));
  redraw(g);
  const element = drawingOf({g, n, path});
  choose(g, n, element.dataset.path, true);
  return true;
}
function readAddress() {
  const address = new URLSearchParams(location.hash.slice(1));
  if (address.get("find")) { find.value = address.get("find"); search(); }
  const g = Math.max(0, data.graphs.findIndex(graph => graph.name === address.get("graph")));
  if (address.has("at")) reveal(g, address.get("at"));
}

// ── Search ─────────────────────────────────────────────────────────────────────────────────────────────────────────
const wordsOf = box => [
  box.call, box.title, box.class, box.about, ...box.ops, ...box.copies, ...box.sites,
  ...box.sites.flatMap(site => termsAt(site).flatMap(t => [t.adapter, t.method, t.form, t.state])),
].join("\n").toLowerCase();
const words = data.graphs.map(graph => graph.boxes.map(wordsOf));
function search() {
  const wanted = find.value.trim().toLowerCase();
  pictures.classList.toggle("searching", Boolean(wanted));
  hits = [];
  at = -1;
  if (wanted) data.graphs.forEach((graph, g) => graph.boxes.forEach((_, n) => {
    if (n && words[g][n].includes(wanted) && matchesItself(g, n, wanted)) hits.push([g, n]);
  }));
  highlight();
  const isPath = wanted && data.graphs.some((_, g) => resolve(g, find.value.trim())[0] >= 0);
  found.textContent = hits.length ? `${hits.length} found; Enter goes to the next` : isPath ? "1 found; Enter goes there" : wanted ? "nothing found" : "";
  writeAddress();
}
// A module is not a hit for a word that only boxes inside it contain.
function matchesItself(g, n, wanted) {
  const box = boxAt(g, n), own = [box.title, box.class, ...box.copies, ...box.sites, ...box.sites.flatMap(site => termsAt(site).map(t => t.adapter))];
  return !box.parts.length || own.some(text => text.toLowerCase().includes(wanted));
}
// Mark the hits, or the closed boxes around them, and the chosen box.
function highlight() {
  for (const element of pictures.querySelectorAll(".hit, .around, .chosen")) element.classList.remove("hit", "around", "chosen");
  for (const [g, n] of hits) {
    for (const element of drawings(g, n)) element.classList.add("hit");
    for (const m of outer(g, n)) for (const element of drawings(g, m)) element.classList.add(isOpen(g, m) ? "around" : "hit");
  }
  if (chosen) drawingOf(chosen)?.classList.add("chosen");
}
function next(step) {
  if (!hits.length) {
    data.graphs.some((_, g) => reveal(g, find.value.trim()));
    return;
  }
  at = (at + step + hits.length) % hits.length;
  const [g, n] = hits[at];
  for (const around of outer(g, n)) setOpen(g, around, true);
  redraw(g);
  choose(g, n, drawings(g, n)[0].dataset.path, true);
  found.textContent = `${at + 1} of ${hits.length}`;
}

// ── Mouse and keys ─────────────────────────────────────────────────────────────────────────────────────────────────
pictures.addEventListener("click", event => {
  const element = event.target.closest(".box");
  if (!element || !boxOf(element)[1]) return;
  if (event.target.matches(".toggle")) toggle(...boxOf(element));
  else if (event.target.matches(".count")) fold(...boxOf(element));
  else choose(...boxOf(element), element.dataset.path);
});
pictures.addEventListener("dblclick", event => {
  const element = event.target.closest(".box");
  if (element) toggle(...boxOf(element));
});
pictures.addEventListener("keydown", event => {
  const element = event.target.closest(".box");
  if (!element) return;
  const [g, n] = boxOf(element), open = isOpen(g, n);
  if (event.key === "Enter" || event.key === " ") choose(g, n, element.dataset.path);
  else if ((event.key === "ArrowRight" && !open) || (event.key === "ArrowLeft" && open)) toggle(g, n);
  else if (event.key === "x") fold(g, n);
  else return;
  event.preventDefault();
});
document.addEventListener("keydown", event => {
  if (event.key === "/" && event.target !== find) { event.preventDefault(); find.focus(); }
  if (event.key === "Escape") { find.value = ""; search(); levels.hidden = true; showOverview(); }
});
find.addEventListener("input", search);
find.addEventListener("keydown", event => { if (event.key === "Enter") next(event.shiftKey ? -1 : 1); });
for (const link of document.querySelectorAll("[data-find]")) {
  link.addEventListener("click", () => { find.value = link.dataset.find; search(); pictures.scrollIntoView({block: "nearest"}); });
}
function showOverview() {
  details.hidden = true;
  overview.hidden = false;
}
const zoomTo = factor => () => {
  const canvas = pictures.querySelector("svg.graph");
  scale = factor && Math.min(3, Math.max(0.2, canvas.clientWidth / Number(canvas.getAttribute("width")) * factor));
  zoom();
};
const acts = {
  overview: showOverview, "open-all": () => openAll(true), "close-all": () => openAll(false),
  fit: zoomTo(0), larger: zoomTo(1.25), smaller: zoomTo(0.8),
};
for (const [id, act] of Object.entries(acts)) document.getElementById(`do-${id}`).addEventListener("click", act);
addEventListener("resize", zoom);
addEventListener("hashchange", readAddress);
data.graphs.forEach((_, g) => { openAsFits(g); redraw(g); });
readAddress();
document.documentElement.dataset.ready = "";
