"use strict";
// The page's data is what page.py makes; every text goes into it as text, never as markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const state = { map: 0, layer: 0 }; // the layer is an index into the map's layers
  const standing = new Map(); // position -> the elements that stand for it
  const spots = new WeakMap(); // element -> { at: positions, say: its text, layer: or undefined }
  const paint = []; // functions that draw again when the map or the layer changes

  // ---- elements

  function make(parent, name, attributes = {}, text = null) {
    const svg = parent.namespaceURI === "http://www.w3.org/2000/svg" || name === "svg";
    const element = svg
      ? document.createElementNS("http://www.w3.org/2000/svg", name)
      : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== null) element.textContent = text;
    return parent.appendChild(element);
  }

  /** The element lights up whenever one of these positions is pointed at. */
  function standsFor(element, at) {
    for (const position of at) {
      if (!standing.has(position)) standing.set(position, []);
      standing.get(position).push(element);
    }
  }

  /** To point at the element is to point at these positions. */
  function spot(element, at, say, layer) {
    element.classList.add("spot");
    spots.set(element, { at, say, layer });
  }

  const number = (value) =>
    Math.abs(value) >= 0.001 || value === 0 ? value.toFixed(3) : value.toExponential(1);

  /** -1 is orange, 0 white, 1 dark blue. */
  function color(share) {
    const last = data.colors.length - 1;
    const place = ((Math.max(-1, Math.min(1, share)) + 1) / 2) * last;
    const index = Math.min(last - 1, Math.floor(place));
    const parts = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
    const [from, to] = [parts(data.colors[index]), parts(data.colors[index + 1])];
    return `rgb(${from.map((x, i) => Math.round(x + (to[i] - x) * (place - index))).join(",")})`;
  }

  const largest = (values) => values.reduce((most, x) => Math.max(most, Math.abs(x)), 0) || 1e-9;

  /** A colour bar from the smallest to the largest value. */
  function scale(parent, values, unit, name) {
    parent.replaceChildren();
    const least = Math.min(0, ...values), most = Math.max(0, ...values);
    const low = least < -0.02 * unit ? least : 0;
    const high = most > 0.02 * unit || low === 0 ? Math.max(most, 1e-9) : 0;
    const stops = [0, 0.2, 0.4, 0.6, 0.8, 1].map((t) => color((low + (high - low) * t) / unit));
    make(parent, "span", {}, number(low));
    make(parent, "i").style.background = `linear-gradient(to right, ${stops.join(",")})`;
    make(parent, "span", {}, `${number(high)} ${name}`);
  }

  // ---- the image, the tokens and the layers of a map

  const map = () => data.maps[state.map];
  const ofImage = (data.image?.patches ?? []).map(([position]) => position);

  /** Position -> value, at the chosen layer. */
  function values() {
    if (!data.maps.length) return new Map();
    return new Map(map().at.map((position, i) => [position, map().values[state.layer][i]]));
  }

  function drawImage() {
    const { size, frames, patches, views, source } = data.image;
    const side = (i) => frames.map((frame) => frame[i]);
    const x0 = Math.min(0, ...side(0)), y0 = Math.min(0, ...side(1));
    const width = Math.max(size[0], ...side(2)) - x0, height = Math.max(size[1], ...side(3)) - y0;
    const svg = make(byId("image"), "svg", { viewBox: `${x0} ${y0} ${width} ${height}` });
    const stretched = { width: size[0], height: size[1], preserveAspectRatio: "none" };
    make(svg, "image", { href: source, ...stretched });
    const names = new Map(patches);
    let cells = [];

    /** An area of the image, and the positions that show it: one, or one of each view. */
    function area(group, box, at) {
      const rect = make(group, "rect", { ...box, class: "patch" });
      spot(rect, at, () => at.map((position) => `patch ${names.get(position)}\n${told(position)}`).join("\n"));
      standsFor(rect, at);
      return [at, rect];
    }

    function drawView({ x, y, at }) {
      svg.querySelector("g")?.remove();
      for (const [position, elements] of standing) {
        standing.set(position, elements.filter((element) => element.isConnected));
      }
      const group = make(svg, "g");
      cells = at.flatMap((row, r) => row.flatMap((positions, c) => {
        const box = { x: x[c], y: y[r], width: x[c + 1] - x[c], height: y[r + 1] - y[r] };
        return positions.length ? [area(group, box, positions)] : [];
      }));
      svg.classList.toggle("dense", cells.length > 1200);
    }

    function paintCells() {
      const shown = values();
      const own = cells.map(([at]) => {
        const known = at.filter((position) => shown.has(position));
        return known.reduce((sum, position) => sum + shown.get(position), 0) / (known.length || 1);
      });
      const unit = largest(own);
      cells.forEach(([, rect], i) => {
        rect.style.fill = color(Math.sign(own[i]) * Math.max(0.5, Math.abs(own[i]) / unit));
        rect.style.fillOpacity = 0.9 * Math.abs(own[i]) / unit;
      });
      const shared = cells.some(([at]) => at.length > 1);
      if (data.maps.length) scale(byId("scale"), own, unit, shared ? "patches, mean of the views" : "patches");
    }

    const select = byId("image-view");
    views.forEach((view, i) => make(select, "option", { value: i }, view.title));
    select.addEventListener("change", () => {
      drawView(views[select.value]);
      paintCells();
    });
    drawView(views[0]);
    paint.push(paintCells);
    byId("coloured").addEventListener("change", (event) =>
      byId("image").classList.toggle("coloured", event.target.checked));
  }

  /** What the map says about a position. */
  function told(position) {
    const value = values().get(position);
    return value === undefined ? "" : `${map().name}, layer ${map().layers[state.layer]}: ${number(value)}`;
  }

  function drawTokens() {
    const chips = data.tokens.map((token) => {
      const kind = ["token", token.constraint && "constraint", token.visual && "visual"];
      const chip = make(byId("tokens"), "span", { class: kind.filter(Boolean).join(" "), tabindex: 0 }, token.label.trim() || "␣");
      const where = token.at.length > 1 ? `positions ${token.at[0]} to ${token.at.at(-1)}` : `position ${token.at[0]}`;
      spot(chip, token.at, () => `“${token.label}”, ${where}\n${token.at.length > 1 ? "" : told(token.at[0])}`.trim());
      standsFor(chip, token.at);
      return [token, chip];
    });
    paint.push(() => {
      const shown = values();
      const words = chips.filter(([token]) => token.at.length === 1);
      const own = words.map(([token]) => shown.get(token.at[0]) ?? 0);
      const unit = largest(own);
      words.forEach(([, chip], i) => {
        chip.style.background = color(own[i] / unit);
        chip.style.color = Math.abs(own[i]) / unit > 0.55 ? "#fff" : "inherit";
      });
      if (data.maps.length) scale(byId("token-scale"), own, unit, `tokens: ${map().name}, layer ${map().layers[state.layer]}`);
    });
  }

  /** A bar per layer: the sum over the image, or what comes from the positions pointed at. */
  function drawLayers(at = null) {
    const parent = byId("layers");
    if (!parent || !data.maps.length) return;
    const all = ofImage.length ? ofImage : map().at;
    const wanted = new Set(at ?? all);
    const columns = map().at.flatMap((position, i) => (wanted.has(position) ? [i] : []));
    const sums = map().values.map((row) => columns.reduce((sum, i) => sum + row[i], 0));
    const unit = largest(sums), step = 440 / sums.length, height = 56;
    parent.replaceChildren();
    const whole = at === null ? (ofImage.length ? "the whole image" : "everywhere") : at.length > 1 ? "these positions" : `position ${at[0]}`;
    const svg = make(parent, "svg", { viewBox: "0 0 440 90", class: "bars" });
    make(svg, "text", { x: 0, y: 10 }, `${map().name}, from ${whole}, by layer (largest: ${number(unit)})`);
    sums.forEach((sum, i) => {
      const tall = Math.max(0.5, (Math.abs(sum) / unit) * height), x = i * step;
      const bar = make(svg, "rect", { x: x + 0.5, y: 74 - tall, width: Math.max(0.5, step - 1), height: tall });
      bar.classList.toggle("here", i === state.layer);
      const touch = make(svg, "rect", { x, y: 16, width: step, height: 60 });
      spot(touch, at ?? [], () => `layer ${map().layers[i]}: ${number(sum)}`, map().layers[i]);
      if (map().layers[i] % 5 === 0) make(svg, "text", { x, y: 87, class: "axis" }, map().layers[i]);
    });
  }

  function chooseLayer(index) {
    state.layer = Math.max(0, Math.min(map().layers.length - 1, index));
    byId("layer").value = state.layer;
    byId("layer-name").textContent = map().layers[state.layer];
    paint.forEach((draw) => draw());
    drawLayers();
  }

  /** A map begins at the layer in which it is largest. */
  function chooseMap(index) {
    state.map = index;
    byId("layer").max = map().layers.length - 1;
    const patches = new Set(ofImage);
    const seen = map().at.map((position) => patches.has(position));
    const counts = (i) => seen[i] || !seen.includes(true);
    const sizes = map().values.map((row) => row.reduce((sum, x, i) => sum + (counts(i) ? Math.abs(x) : 0), 0));
    chooseLayer(sizes.indexOf(Math.max(...sizes)));
  }

  // ---- the trace

  function drawTrace() {
    const trace = data.trace, select = byId("view");
    trace.views.forEach((view, i) => make(select, "option", { value: i }, view.title));
    select.parentElement.hidden = trace.views.length < 2;
    const draw = () => {
      byId("panels").replaceChildren();
      const view = trace.views[select.value || 0];
      trace.sites.forEach((site, s) => drawPanel(site, view.rows, view.values[s]));
    };
    select.addEventListener("change", draw);
    draw();
  }

  function drawPanel(site, rows, cells) {
    const layers = data.trace.layers, high = rows.length > 12 ? 15 : 21;
    const wide = Math.max(3, Math.min(26, 230 / layers.length));
    const label = 12 + 6.3 * Math.max(...rows.map((row) => short(row.label.trim()).length));
    const unit = largest(cells.flat());
    const panel = make(byId("panels"), "div", { class: "panel" });
    make(panel, "h3", {}, site);
    const size = [label + wide * layers.length + 4, high * rows.length + 18];
    const svg = make(panel, "svg", { width: size[0], height: size[1], viewBox: `0 0 ${size[0]} ${size[1]}` });
    rows.forEach((row, r) => {
      const group = make(svg, "g", { class: "row" });
      const name = make(group, "text", { x: label - 5, y: high * (r + 0.5) + 4, "text-anchor": "end" }, short(row.label.trim() || "␣"));
      spot(name, row.at, () => row.label);
      cells[r].forEach((value, i) => {
        const at = { x: label + wide * i, y: high * r, width: wide, height: high, class: "cell" };
        const cell = make(group, "rect", { ...at, fill: color(value / unit) });
        spot(cell, row.at, () => `${row.label.trim()}\n${site}, layer ${layers[i]}: ${value < 0 ? "" : "+"}${number(value)}`, layers[i]);
      });
      make(group, "rect", { x: label, y: high * r, width: wide * layers.length, height: high, class: "frame" });
      standsFor(group, row.at);
    });
    layers.forEach((layer, i) => {
      if (layer % 5 === 0) make(svg, "text", { x: label + wide * i, y: size[1] - 5, class: "axis" }, layer);
    });
    scale(make(panel, "div", { class: "scale" }), cells.flat(), unit, "");
  }

  const short = (text) => (text.length > 26 ? `${text.slice(0, 16)}…${text.slice(-9)}` : text);

  // ---- pointing

  let lit = [];

  function pointAt(element, x, y) {
    lit.forEach((other) => other.classList.remove("lit"));
    lit = [];
    const found = element && spots.get(element);
    const tip = byId("tip");
    tip.hidden = !found;
    if (!found) return;
    for (const position of found.at) lit.push(...(standing.get(position) ?? []));
    lit.forEach((other) => other.classList.add("lit"));
    tip.textContent = found.say();
    tip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${Math.max(4, Math.min(y + 16, innerHeight - tip.offsetHeight - 8))}px`;
  }

  function listen() {
    document.addEventListener("pointerover", (event) => {
      const element = event.target.closest(".spot");
      pointAt(element, event.clientX, event.clientY);
      if (!element?.closest(".bars")) drawLayers(element && spots.get(element).at.length ? spots.get(element).at : null);
    });
    document.addEventListener("focusin", (event) => {
      const box = event.target.getBoundingClientRect();
      if (spots.has(event.target)) pointAt(event.target, box.left, box.bottom);
    });
    document.addEventListener("click", (event) => {
      const layer = spots.get(event.target.closest(".spot"))?.layer;
      if (layer !== undefined && data.maps.length) chooseLayer(map().layers.indexOf(layer));
    });
  }

  drawTokens();
  if (data.image) drawImage();
  if (data.trace) drawTrace();
  if (data.maps.length) {
    const select = byId("map");
    data.maps.forEach((each, i) => make(select, "option", { value: i }, each.name));
    select.addEventListener("change", () => chooseMap(Number(select.value)));
    byId("layer").addEventListener("input", (event) => chooseLayer(Number(event.target.value)));
    select.value = data.start;
    chooseMap(data.start);
  } else {
    paint.forEach((draw) => draw());
  }
  listen();
})();
