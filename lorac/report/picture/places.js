// Boxes, and where they lie once some are opened, closed or unfolded. Stands before page.js, in one function with it.
const data = JSON.parse(document.getElementById("data").textContent);
const unfolded = new Set();
const pictures = document.getElementById("pictures");
let scale = 0;

// ── Boxes: a box is [graph, number]; an element is one drawing of it, a copy's or its own ──────────────────────────
const idOf = (g, n) => `g${g}b${n}`;
const own = (g, n) => document.getElementById(idOf(g, n));
const drawings = (g, n) => [own(g, n), ...document.querySelectorAll(`[data-of="${idOf(g, n)}"]`)];
const boxOf = element => (element.id || element.dataset.of).slice(1).split("b").map(Number);
const told = (g, n) => data.graphs[g].boxes[n];
const direct = (element, name) => element.querySelector(`:scope > ${name}`);
const isOpen = (g, n) => own(g, n).classList.contains("open");
const around = element => element.parentElement.closest(".box");

// The path of the module that an element shows: a box's own, told as that of the copy it is drawn in.
function pathOf(element) {
  const [g, n] = boxOf(element);
  let path = told(g, n).call;
  for (let outer = element; outer; outer = around(outer)) {
    if (outer.dataset.copy === undefined) continue;
    const folded = told(...boxOf(outer));
    path = moved(path, folded.call, folded.copies[outer.dataset.copy]);
  }
  return path;
}
const plain = call => call.split("@")[0];
const holds = (call, path) => !call || plain(path) === plain(call) || plain(path).startsWith(plain(call) + ".");
const moved = (path, from, to) => holds(from, path) ? plain(to) + path.slice(plain(from).length) : path;

// ── Places: what is opened moves what lies below by the rule of geometry.py, and makes room beside it ──────────────
const placesOf = (g, n) => data.graphs[g].places[n];
const behind = (g, n) => told(g, n).copies.length && !unfolded.has(idOf(g, n)) ? 2 * data.look.behind : 0;
const height = (g, n) => isOpen(g, n) ? tops(g, n).at(-1) : placesOf(g, n).heading[1];
function room(g, n) {
  const count = unfolded.has(idOf(g, n)) ? told(g, n).copies.length + 1 : 1;
  return count * height(g, n) + (count - 1) * data.look.gap + behind(g, n);
}
const tall = (g, layer) => Math.max(...layer.map(n => room(g, n)));
function tops(g, n) {
  const {heading, layers} = placesOf(g, n), found = [heading[1] + data.look.gap];
  for (const layer of layers) found.push(found.at(-1) + tall(g, layer) + data.look.gap);
  return found;
}
// Where a place within a box is now: right of what takes more room than it was given, or that far within it.
function across(g, n, x) {
  let moved_ = x;
  for (const child of placesOf(g, n).layers.flat()) {
    const {x: left, slot} = placesOf(g, child), more = width(g, child) - slot;
    if (more > 0) moved_ += more * Math.min(1, Math.max(0, (x - left) / slot));
  }
  return moved_;
}
function width(g, n) {
  const {slot, full} = placesOf(g, n);
  return isOpen(g, n) ? across(g, n, full) : slot;
}
const leftOf = (g, around_, n) => {
  const {x, slot} = placesOf(g, n);
  return across(g, around_, x + slot / 2) - width(g, n) / 2;
};
function door(g, n, value, side) {
  const {slot, full} = placesOf(g, n), place_ = placesOf(g, n)[side][value];
  if (place_ === undefined) return width(g, n) / 2;
  return isOpen(g, n) ? across(g, n, place_) : slot / 2 + data.look.near * slot * (place_ / full - 0.5);
}
function place(g, n) {
  const element = own(g, n), {heading, layers, wires} = placesOf(g, n);
  const full = height(g, n), wide = width(g, n), open = isOpen(g, n), sign = direct(element, ".toggle");
  for (const frame of element.querySelectorAll(":scope > .frame, :scope > .card")) {
    frame.setAttribute("height", full.toFixed(1));
    frame.setAttribute("width", wide.toFixed(1));
  }
  for (const card of element.querySelectorAll(":scope > .card")) card.classList.toggle("hidden", unfolded.has(idOf(g, n)));
  if (sign) sign.textContent = open ? "▾" : "▸";
  const count = direct(element, ".count"), inside = direct(element, ".inside");
  if (count) count.setAttribute("x", (wide - 8).toFixed(0));
  if (!inside) return;
  inside.classList.toggle("hidden", !open);
  for (const copy of inside.querySelectorAll(":scope > [data-copy]")) copy.remove();
  const top = tops(g, n), corner = {};
  layers.forEach((layer, row) => layer.forEach(child => {
    const x = leftOf(g, n, child), y = top[row] + (tall(g, layer) - room(g, child)) / 2;
    corner[child] = [x, y];
    place(g, child);
    own(g, child).setAttribute("transform", `translate(${x.toFixed(1)},${y.toFixed(1)})`);
    if (unfolded.has(idOf(g, child))) copies(g, child, x, y);
  }));
  const lines = inside.querySelectorAll(":scope > .wire");
  const begins = wires.map((wire, i) => draw(lines[i], wire, g, n, top, corner));
  for (const shape of inside.querySelectorAll(":scope > .shape")) {
    const [x, y] = begins[shape.dataset.wire];
    shape.setAttribute("x", (x + 5).toFixed(1));
    shape.setAttribute("y", (y + 12).toFixed(1));
  }
}
function draw(line, [source, target, value, places, rows], g, n, top, corner) {
  const {layers, heading} = placesOf(g, n), full = height(g, n), last = rows.length - 1;
  const xs = places.map((x, i) => {
    if (!i && source >= 0) return corner[source][0] + door(g, source, value, "out");
    if (i === last && target >= 0) return corner[target][0] + door(g, target, value, "into");
    return across(g, n, x);
  });
  const spans = rows.map((row, i) => {
    if (row < 0) return [heading[1], heading[1]];
    if (row === layers.length) return [full, full];
    let above = top[row], below = top[row] + tall(g, layers[row]);
    if (!i && source >= 0) above = corner[source][1] + room(g, source);
    if (i === last && target >= 0) below = corner[target][1];
    return [above, below];
  });
  const at_ = (x, y) => `${x.toFixed(1)},${y.toFixed(1)}`;
  let path = `M${at_(xs[0], spans[0][0])}V${spans[0][1].toFixed(1)}`;
  for (let i = 1; i <= last; i++) {
    const middle = (spans[i - 1][1] + spans[i][0]) / 2;
    path += `C${at_(xs[i - 1], middle)} ${at_(xs[i], middle)} ${at_(xs[i], spans[i][0])}V${spans[i][1].toFixed(1)}`;
  }
  line.setAttribute("d", path);
  return [xs[0], spans[0][0]];
}
function copies(g, n, x, y) {
  const first = own(g, n), box = told(g, n), step = height(g, n) + data.look.gap;
  let last = first;
  box.copies.forEach((call, k) => {
    const copy = first.cloneNode(true);
    for (const element of [copy, ...copy.querySelectorAll("[id]")]) {
      element.dataset.of = element.id;
      element.removeAttribute("id");
      element.classList.remove("chosen");
    }
    copy.dataset.copy = k;
    const start = plain(box.call).length - box.title.length;
    direct(copy, ".title").textContent = plain(call).slice(Math.max(start, 0));
    direct(copy, ".count").textContent = "";
    copy.setAttribute("transform", `translate(${x.toFixed(1)},${(y + (k + 1) * step).toFixed(1)})`);
    last.after(copy);
    last = copy;
  });
}
function redraw(g) {
  place(g, 0);
  const svg = own(g, 0).ownerSVGElement, full = height(g, 0) + 2;
  const wide = width(g, 0) + 2;
  svg.setAttribute("viewBox", `-1 -1 ${wide.toFixed(0)} ${full.toFixed(0)}`);
  svg.setAttribute("width", wide.toFixed(0));
  svg.setAttribute("height", full.toFixed(0));
  zoom();
}
function setOpen(g, n, open) {
  const element = own(g, n);
  if (!direct(element, ".inside")) return false;
  element.classList.toggle("open", open);
  element.classList.toggle("closed", !open);
  return true;
}
function toggle(g, n) { if (n && setOpen(g, n, !isOpen(g, n))) redraw(g); }
function fold(g, n) {
  const id = idOf(g, n);
  if (!told(g, n).copies.length) return;
  unfolded.has(id) ? unfolded.delete(id) : unfolded.add(id);
  redraw(g);
}
function all(open) {
  data.graphs.forEach((graph, g) => {
    graph.boxes.forEach((_, n) => n && setOpen(g, n, open));
    redraw(g);
  });
}
function zoom() {
  for (const svg of pictures.querySelectorAll("svg.graph")) {
    const wide = Number(svg.getAttribute("width")), free = pictures.clientWidth - 50;
    const factor = scale || Math.min(1, Math.max(free / wide, 0.6));
    svg.style.width = `${wide * factor}px`;
    svg.style.height = "auto";
  }
}
