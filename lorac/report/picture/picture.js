// The picture: boxes within boxes, laid out by dagre, drawn as SVG. Precedes page.js, in one function with it.
const data = JSON.parse(document.getElementById("data").textContent);
const pictures = document.getElementById("pictures");
const namespace = pictures.querySelector("svg").namespaceURI;
// Pixels: a character of the fixed-width font, a heading's line, an adapter's mark, a value's label, space around.
const CHARACTER = 7.25, SMALL_CHARACTER = 6.7, HEAD = 26, MARK = 19, LABEL = 13, PAD = 12, GAP = 14, RANK_GAP = 16, CARD = 5;
const MAX_HEIGHT = 3000, SWEEPS = 18, MAX_MARKS = 6, MAX_LABEL = 34, MIN_WIDTH = 72, MIN_SCALE = 0.85;
const CENTERED = ["ops", "in", "out"], ROUND = {site: 6, module: 6, ops: 13, in: 13, out: 13, graph: 8};
const opened = new Set(), unfolded = new Set();  // the ids of boxes
let scale = 0;  // 0: as wide as the window, but legible

// ── Boxes: a box is [graph, number]; an element is one drawing of it, the box's own or one of a copy ────────────────
const idOf = (g, n) => `g${g}b${n}`;
const boxAt = (g, n) => data.graphs[g].boxes[n];
const drawings = (g, n) => [...pictures.querySelectorAll(`[data-box="${g} ${n}"]`)];
const boxOf = element => element.dataset.box.split(" ").map(Number);
const isOpen = (g, n) => opened.has(idOf(g, n));
const isUnfolded = (g, n) => unfolded.has(idOf(g, n));
const plain = call => call.split("@")[0];
const holds = (call, path) => !call || plain(path) === plain(call) || plain(path).startsWith(plain(call) + ".");
const moved = (path, from, to) => holds(from, path) ? plain(to) + path.slice(plain(from).length) : path;
const truncated = text => text.length <= MAX_LABEL ? text : text.slice(0, MAX_LABEL - 1) + "…";
for (const graph of data.graphs) graph.boxes.forEach((box, n) => box.parts.forEach(child => { graph.boxes[child].parent = n; }));
// The boxes around a box, from the innermost to the outermost, the whole graph excluded.
function outer(g, n) {
  const found = [];
  for (let at = boxAt(g, n).parent; at; at = boxAt(g, at).parent) found.push(at);
  return found;
}
const inside = (g, n) => boxAt(g, n).parts.flatMap(child => [child, ...inside(g, child)]);
const termsAt = site => data.sites[site]?.terms || [];
// The adapters marked on a box, the active ones first; at which of its sites, where it has several.
function marksOf(box) {
  const leaf = site => box.sites.length > 1 ? site.slice(holds(box.call, site) ? plain(box.call).length : 0).replace(/^\./, "") : "";
  const marks = box.sites.flatMap(site => termsAt(site).map(term => ({...term, at: leaf(site)})));
  return marks.sort((a, b) => !a.strength - !b.strength).map(mark => ({...mark, form: mark.at ? `${mark.form} at ${mark.at}` : mark.form, how: howItRuns(mark)}));
}
function howItRuns({state, strength}) {
  if (state === "left out" || strength === 1) return state;
  return strength ? `${state} x ${strength}` : `${state}, off`;
}
// The colours of the adapters inside a box, and how many of its sites have one.
function totalsOf(g, n) {
  const sites = inside(g, n).flatMap(child => boxAt(g, child).sites), adapted = sites.filter(site => termsAt(site).length);
  const colors = [...new Set(adapted.flatMap(site => termsAt(site).map(term => term.color)))].sort();
  return {colors, count: adapted.length ? `${adapted.length} of ${sites.length}` : ""};
}

// ── Layout ─────────────────────────────────────────────────────────────────────────────────────────────────────────
function headingSize(g, n) {
  const box = boxAt(g, n), marks = marksOf(box);
  if (box.kind === "graph") return {width: 0, height: 0};
  let heading = truncated(box.title).length + truncated(box.about).length + 3 + (box.copies.length ? 6 : 0);
  if (box.parts.length) {
    const {colors, count} = totalsOf(g, n);
    heading += 4 + count.length + 2 * colors.length;
  }
  const widest = Math.max(heading, ...marks.map(mark => truncated(mark.adapter).length + mark.form.length + mark.how.length + 6));
  const rows = Math.min(marks.length, MAX_MARKS) + (marks.length > MAX_MARKS);
  return {width: Math.max(MIN_WIDTH, Math.ceil(widest * CHARACTER) + 14), height: HEAD + (rows ? MARK * rows + 5 : 0)};
}
// The size of a box, and where everything in it lies: the children, the lines, the labels of the values, and the
// places at its upper and lower border where values cross it.
function layOut(g, n) {
  const box = boxAt(g, n), heading = headingSize(g, n);
  const place = {...heading, heading, children: new Map(), lines: [], labels: [], doors: {enter: {}, leave: {}}};
  if (!box.parts.length || !isOpen(g, n)) return place;
  const graph = new dagre.graphlib.Graph().setGraph({nodesep: GAP, edgesep: 6, ranksep: RANK_GAP, marginx: PAD, marginy: PAD});
  graph.setDefaultEdgeLabel(() => ({}));
  for (const child of box.parts) {
    const inner = layOut(g, child), copies = boxAt(g, child).copies.length, cards = copies && !isUnfolded(g, child) ? 2 * CARD : 0;
    place.children.set(child, inner);
    const height = isUnfolded(g, child) ? (inner.height + GAP) * copies + inner.height : inner.height + cards;
    graph.setNode(`${child}`, {width: inner.width + cards, height});
  }
  // A value is a node between its source and its readers: its label takes room, and its line branches below it. Values
  // that cross the border are in the first and the last layer: `enter` and `leave` keep them there.
  if (box.links.some(([, source]) => source < 0)) graph.setNode("enter", {width: 0, height: 0});
  if (box.links.some(([, , target]) => target < 0)) graph.setNode("leave", {width: 0, height: 0});
  for (const [value, source, target] of box.links) {
    const node = `${source}:${value}`, text = labelOf(g, value, source);
    if (!graph.hasNode(node)) {
      graph.setNode(node, {width: text ? text.length * SMALL_CHARACTER : 4, height: text ? LABEL : 0, text, value, enters: source < 0});
      graph.setEdge(source < 0 ? "enter" : `${source}`, node, {weight: source < 0 ? 1000 : 4});
    }
    if (target < 0) {
      graph.setNode(`${value}:leave`, {width: 4, height: 0, value, leaves: true});
      graph.setEdge(`${value}:leave`, "leave", {weight: 1000});
    }
    graph.setEdge(node, target < 0 ? `${value}:leave` : `${target}`);
  }
  for (const child of box.parts.map(String)) {
    if (graph.hasNode("enter") && !graph.inEdges(child).length) graph.setEdge("enter", child, {weight: 0, minlen: 2});
    if (graph.hasNode("leave") && !graph.outEdges(child).length) graph.setEdge(child, "leave", {weight: 0, minlen: 2});
  }
  dagre.layout(graph);
  arrange(graph, place);
  return place;
}
// The label of a value: its dtype and shape, unless the box that it comes from shows them.
function labelOf(g, value, source) {
  if (source < 0 || boxAt(g, source).kind === "in") return "";
  return isOpen(g, source) && boxAt(g, source).parts.length ? "" : truncated(data.graphs[g].types[value]);
}
// Take over dagre's layers and its order in each, straighten the lines, and draw them below the heading.
function arrange(graph, place) {
  const childOf = name => place.children.get(Number(name)), layerOf = side => graph.nodes().map(name => graph.node(name)).find(node => node[side])?.y;
  const {slots, rows, routes} = slotsOf(graph, (name, other, side) => {
    const child = childOf(name), door = child?.doors[side][graph.node(other).value];
    return door === undefined ? 0 : door - graph.node(name).width / 2;
  });
  straighten(rows);
  const left = Math.min(...slots.map(({x, width}) => x - width / 2)) - PAD, width = Math.max(...slots.map(({x, width}) => x + width / 2)) + PAD - left;
  const down = place.heading.height - (layerOf("enters") ?? 0), right = Math.max(0, (place.heading.width - width) / 2) - left;
  place.width = Math.max(width, place.heading.width);
  place.height = (layerOf("leaves") ?? graph.graph().height) + down;
  for (const slot of slots) {
    slot.x += right;
    slot.y += down;
    const {name, x, y} = slot, node = graph.node(name), child = childOf(name);
    if (child) Object.assign(child, {x: x - node.width / 2, y: y - node.height / 2});
    if (node?.text) place.labels.push({x, y: y + 4, text: node.text});
    if (node?.enters) place.doors.enter[node.value] = x;
    if (node?.leaves) place.doors.leave[node.value] = x;
  }
  for (const {v, w, route} of routes) {
    const points = [end(v, w, "leave"), ...route.map(({x, y, half}) => [x, y - half, y + half]), end(w, v, "enter")];
    place.lines.push({path: pathThrough(points), tip: Boolean(childOf(w)) || graph.node(w).leaves});
  }
  // Where a line meets a node: a box at the place where the value crosses its border, or side by side with the others.
  function end(name, other, side) {
    const {x, y: middle} = slots.find(slot => slot.name === name), node = graph.node(name), child = childOf(name);
    const y = middle + (side === "enter" ? -1 : 1) * node.height / 2;
    if (!child) return [x, y, y];
    const door = child.doors[side][node.value ?? graph.node(other).value];
    if (door !== undefined) return [child.x + door, y, y];
    const near = routes.filter(({v, w}) => (side === "enter" ? w : v) === name).map(({v, w, route}) => side === "enter" ? [route.at(-1) || slots.find(slot => slot.name === v), v] : [route[0] || slots.find(slot => slot.name === w), w]);
    near.sort(([a], [b]) => a.x - b.x);
    const place_ = near.findIndex(([, name_]) => name_ === other);
    return [child.x + child.width * (0.2 + 0.6 * (place_ + 0.5) / near.length), y, y];
  }
}
// The places to fill: the nodes, and where lines pass a layer; lines of one value share those. `doorAt` says how far
// from the middle of a node a line meets it. Each slot knows what it is joined to: (slot, offset, strength).
function slotsOf(graph, doorAt) {
  const byKey = new Map(), rows = new Map();
  const add = (key, slot) => {
    if (!byKey.has(key)) {
      byKey.set(key, {...slot, above: [], below: []});
      rows.set(slot.y, [...(rows.get(slot.y) || []), byKey.get(key)]);
    }
    return byKey.get(key);
  };
  const join = (one, other, offset) => {
    const strength = one.name || other.name ? one.name && other.name ? 1 : 0.3 : 6;
    if (!one.below.some(([slot]) => slot === other)) {
      one.below.push([other, offset, strength]);
      other.above.push([one, -offset, strength]);
    }
  };
  for (const name of graph.nodes().filter(name => name !== "enter" && name !== "leave")) {
    const {x, y, width, height} = graph.node(name);
    add(name, {name, x, y, width, gap: GAP / 2, height});
  }
  for (const row of rows.values()) {
    const half = Math.max(...row.map(({height}) => height)) / 2;
    for (const slot of row) slot.half = half;
  }
  const routes = graph.edges().filter(({v, w}) => v !== "enter" && w !== "leave").map(({v, w}) => {
    const passed = graph.edge(v, w).points.slice(1, -1).filter(({y}) => rows.has(y));
    const route = passed.map(({x, y}) => add(`${v} ${y}`, {x, y, width: 0, gap: 4, half: rows.get(y)[0].half}));
    const chain = [byKey.get(v), ...route, byKey.get(w)];
    chain.slice(1).forEach((slot, k) => join(chain[k], slot, (k ? 0 : doorAt(v, w, "leave")) - (k + 2 === chain.length ? doorAt(w, v, "enter") : 0)));
    return {v, w, route};
  });
  for (const row of rows.values()) row.sort((a, b) => a.x - b.x);
  return {slots: [...byKey.values()], rows: [...rows.entries()].sort(([a], [b]) => a - b).map(([, row]) => row), routes};
}
// Move the slots of each layer, in their order, as near to what they are joined to as their neighbours let them: an
// isotonic regression, in which neighbours that would pass each other are pooled at their weighted mean.
function straighten(rows) {
  for (let sweep = 0; sweep < SWEEPS; sweep++) {
    const sides = [["above"], ["below"], ["above", "below"]][sweep % 3];
    for (const row of sides[0] === "below" ? [...rows].reverse() : rows) {
      const pools = [];
      let start = 0;
      row.forEach((slot, k) => {
        if (k) start += (row[k - 1].width + slot.width) / 2 + row[k - 1].gap + slot.gap;
        const joined = sides.flatMap(side => slot[side]), weight = joined.reduce((sum, [, , strength]) => sum + strength, 0) || 0.01;
        const wish = joined.length ? joined.reduce((sum, [other, offset, strength]) => sum + strength * (other.x - offset), 0) / weight : slot.x;
        let pool = {mean: wish - start, weight, slots: [[slot, start]]};
        while (pools.length && pools.at(-1).mean > pool.mean) {
          const before = pools.pop(), total = before.weight + pool.weight;
          pool = {mean: (before.mean * before.weight + pool.mean * pool.weight) / total, weight: total, slots: [...before.slots, ...pool.slots]};
        }
        pools.push(pool);
      });
      for (const {mean, slots} of pools) for (const [slot, offset] of slots) slot.x = mean + offset;
    }
  }
}
// A line straight down through each layer, bent between them.
function pathThrough(points) {
  const xy = (x, y) => `${x.toFixed(1)},${y.toFixed(1)}`;
  let path = `M${xy(points[0][0], points[0][2])}`;
  for (let i = 1; i < points.length; i++) {
    const [before, , above] = points[i - 1], [x, below, end] = points[i], middle = (above + below) / 2;
    path += `C${xy(before, middle)} ${xy(x, middle)} ${xy(x, below)}V${end.toFixed(1)}`;
  }
  return path;
}

// ── Drawing ────────────────────────────────────────────────────────────────────────────────────────────────────────
function svg(name, attributes = {}, text) {
  const element = document.createElementNS(namespace, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, typeof value === "number" ? Number(value.toFixed(1)) : value);
  if (text !== undefined) element.textContent = text;
  return element;
}
// A box with all in it; `rename` says what a module is called where it is drawn, which is another in each copy.
function draw(g, n, place, x, y, rename) {
  const box = boxAt(g, n), marks = marksOf(box), path = rename(box.call);
  const isReserved = box.sites.some(site => data.sites[site] && !termsAt(site).length);
  const adapted = marks.length ? "adapted" : isReserved ? "reserved" : box.kind === "site" ? "bare" : "";
  const state = box.parts.length ? isOpen(g, n) ? "open" : "closed" : "";
  const spoken = [box.title, box.about, box.copies.length ? `${box.copies.length + 1} times` : "", marks.map(mark => `${mark.adapter}: ${mark.form}, ${mark.how}`).join("; ")];
  const element = svg("g", {
    class: ["box", box.kind, adapted, state].filter(Boolean).join(" "), "data-box": `${g} ${n}`, "data-path": path, tabindex: "0", role: "button",
    transform: `translate(${x.toFixed(1)},${y.toFixed(1)})`, "aria-label": spoken.filter(Boolean).join(", "),
  });
  element.append(...frame(g, n, place), ...marks.slice(0, MAX_MARKS).map((mark, row) => drawMark(mark, place.width, HEAD + row * MARK)));
  if (marks.length > MAX_MARKS) element.append(svg("text", {class: "more", x: 12, y: HEAD + MAX_MARKS * MARK + 13}, `… and ${marks.length - MAX_MARKS} more`));
  for (const line of place.lines) element.append(svg("path", {class: line.tip ? "wire tip" : "wire", d: line.path}));
  for (const label of place.labels) element.append(svg("text", {class: "shape", x: label.x, y: label.y}, label.text));
  for (const [child, inner] of place.children) {
    const {call, copies} = boxAt(g, child), all = isUnfolded(g, child) ? [call, ...copies] : [call];
    const step = inner.height + GAP;
    all.forEach((copy, k) => element.append(draw(g, child, inner, inner.x, inner.y + k * step, k ? path_ => rename(moved(path_, call, copy)) : rename)));
  }
  return element;
}
function frame(g, n, {width, height, heading}) {
  const box = boxAt(g, n), made = [], round = ROUND[box.kind], title = truncated(box.title), about = truncated(box.about);
  const cards = box.copies.length && !isUnfolded(g, n) ? [2, 1] : [];
  for (const k of cards) made.push(svg("rect", {class: "card", x: k * CARD, y: k * CARD, width, height, rx: round}));
  made.push(svg("rect", {class: "frame", width, height, rx: round}));
  if (box.kind === "graph") return made;
  if (CENTERED.includes(box.kind)) {
    const text = svg("text", {class: "centered", x: width / 2, y: 17});
    text.append(svg("tspan", {class: "title"}, title), " ", svg("tspan", {class: "about"}, about));
    return [...made, text];
  }
  const x = box.parts.length ? 24 : 10;
  if (box.parts.length) made.push(svg("text", {class: "toggle", x: 8, y: 17}, isOpen(g, n) ? "▾" : "▸"));
  made.push(svg("text", {class: "title", x, y: 17}, title), svg("text", {class: "about", x: x + (title.length + 1) * CHARACTER, y: 17}, about));
  if (box.parts.length && !isOpen(g, n)) {
    const {colors, count} = totalsOf(g, n), end = heading.width - 10 - (box.copies.length ? 6 * CHARACTER : 0) - count.length * CHARACTER;
    colors.reverse().forEach((color, k) => made.push(svg("rect", {class: `bar c${color}`, x: end - 14 - 13 * k, y: 8, width: 10, height: 10, rx: 3})));
    made.push(svg("text", {class: "totals", x: end, y: 17}, count));
  }
  if (box.copies.length) made.push(svg("text", {class: "count", x: width - 8, y: 17}, `× ${box.copies.length + 1}`));
  return made;
}
function drawMark({adapter, form, how, state, strength, color}, width, y) {
  const name = truncated(adapter), made = svg("g", {class: `mark c${color} ${state.replace(" ", "-")}${strength ? "" : " off"}`});
  made.append(
    svg("rect", {class: "chip", x: 7, y, width: width - 14, height: MARK - 3, rx: 4}), svg("rect", {class: "bar", x: 7, y, width: 5, height: MARK - 3}),
    svg("text", {class: "adapter", x: 17, y: y + 12}, name), svg("text", {class: "form", x: 17 + (name.length + 1) * CHARACTER, y: y + 12}, form),
    svg("text", {class: "state", x: width - 12, y: y + 12}, how),
  );
  return made;
}
// Lay a graph out and draw it anew; what is chosen, found or has the focus stays so.
function redraw(g) {
  const canvas = pictures.querySelectorAll("svg.graph")[g], focused = document.activeElement?.dataset?.path;
  const place = layOut(g, 0), width = place.width + 2, height = place.height + 2;
  canvas.setAttribute("viewBox", `-1 -1 ${width.toFixed(0)} ${height.toFixed(0)}`);
  canvas.setAttribute("width", width.toFixed(0));
  canvas.replaceChildren(draw(g, 0, place, 0, 0, path => path));
  zoom();
  highlight();
  if (focused !== undefined) [...canvas.querySelectorAll(".box")].find(element => element.dataset.path === focused)?.focus();
  return place.height;
}
function setOpen(g, n, open) { if (boxAt(g, n).parts.length) open ? opened.add(idOf(g, n)) : opened.delete(idOf(g, n)); }
function toggle(g, n) {
  if (!n) return;
  setOpen(g, n, !isOpen(g, n));
  redraw(g);
}
function fold(g, n) {
  const id = idOf(g, n);
  if (!boxAt(g, n).copies.length) return;
  unfolded.has(id) ? unfolded.delete(id) : unfolded.add(id);
  redraw(g);
}
// Open the boxes that lie in fewer than `depth` others; the whole graph is always open.
function openTo(g, depth) {
  data.graphs[g].boxes.forEach((_, n) => setOpen(g, n, !n || outer(g, n).length + 1 < depth));
}
// Open as many levels as stay lower than the picture may be.
function openAsFits(g) {
  const deepest = Math.max(...data.graphs[g].boxes.map((_, n) => outer(g, n).length)) + 1;
  let depth = 1;
  while (depth < deepest) {
    openTo(g, depth + 1);
    if (layOut(g, 0).height > MAX_HEIGHT) break;
    depth++;
  }
  openTo(g, depth);
}
function openAll(open) {
  data.graphs.forEach((_, g) => {
    openTo(g, open ? Infinity : 1);
    redraw(g);
  });
}
function zoom() {
  for (const canvas of pictures.querySelectorAll("svg.graph")) {
    const width = Number(canvas.getAttribute("width")), free = pictures.clientWidth - 32;
    canvas.style.width = `${width * (scale || Math.min(1, Math.max(free / width, MIN_SCALE)))}px`;
  }
}
