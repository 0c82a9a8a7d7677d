// The page of `orrery play`: asks the server for the next four pictures just in time, and plays them at the world's pace.

import { Inputs } from "./inputs.js";
import { Trace, View } from "./view.js";

const SPARE = 30; // ms that an answer may be later than usual
const REST = 45_000; // ms without a wish after which the world rests
const HINT = "Press an arrow key, or drag on a picture. The world moves when you do.";
const find = (selector) => document.querySelector(selector);

const state = {
  name: "loading", // loading, beginning, ready (stands still until a wish), playing, paused, closed
  hello: null,
  queue: [], // pictures to show: {header, frame, pixels: world -> Uint8Array}
  due: 0, // when the next one is
  asked: null, // {at, since} of the step that is being computed
  usual: 150, // ms that an answer takes
  wished: 0, // when the person last wanted something
  shown: [], // times of the latest pictures
  unseen: 0,
};
const views = {};
let socket, inputs, trace;

function become(name) {
  state.name = document.body.dataset.state = name;
  find("#pause").setAttribute("aria-pressed", String(name === "paused"));
  find("#pause span").textContent = name === "paused" ? "Go on" : "Pause";
}

function say(text, kind = "") {
  find("#message").textContent = text;
  find("#message").className = kind;
}

function send(message) {
  if (socket.readyState === WebSocket.OPEN) socket.send(JSON.stringify(message));
}

// ---- what the server says

function hear(event) {
  if (typeof event.data !== "string") return unpack(event.data);
  const message = JSON.parse(event.data);
  if (message.type === "hello") greet(message);
  else {
    state.asked = null;
    if (state.name === "beginning") become("ready");
    if (state.name === "playing") become("paused");
    say(message.message, "error");
  }
}

function unpack(buffer) {
  const length = new DataView(buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  const rest = new Uint8Array(buffer, 4 + length);
  if (header.type === "film") return download(header.name, rest);
  if (header.type === "begin") begun(header);
  else if (state.name === "beginning") return; // a step of the game before
  else answered(header);
  const { size } = state.hello;
  const bytes = 3 * size * size;
  for (let frame = 0; frame < header.count; frame++) {
    const pixels = {};
    Object.keys(header.worlds).forEach((world, index) => {
      const from = (index * header.count + frame) * bytes;
      pixels[world] = rest.subarray(from, from + bytes);
    });
    state.queue.push({ header, frame, pixels });
  }
}

function greet(hello) {
  state.hello = hello;
  for (const world of hello.worlds) {
    const figure = find(`[data-world=${world}]`);
    figure.hidden = false;
    views[world] = new View(figure, hello.size);
    follow(views[world], world);
  }
  const both = hello.worlds.length === 2;
  document.body.classList.toggle("alone", !both);
  find("#apart").hidden = !both;
  find("#model").textContent = `model: ${hello.model}${hello.note ? ` · ${hello.note}` : ""}`;
  inputs = new Inputs((1000 * hello.held) / hello.fps, wish);
  trace = new Trace(find("#apart"), 20 * hello.fps);
  begin(hello.seed);
}

function begin(seed) {
  find("#seed").value = seed;
  become("beginning");
  state.queue = [];
  send({ type: "begin", seed });
}

function begun(header) {
  state.asked = null;
  state.due = 0;
  state.round = header.round;
  state.goals = 0;
  state.unseen = 0;
  find("#seed").value = header.seed;
  trace.clear();
  for (const [world, view] of Object.entries(views)) view.figure.classList.toggle("absent", !(world in header.worlds));
  document.body.dataset.steps = 0;
}

function answered(header) {
  const took = performance.now() - state.asked.at;
  state.usual = took > state.usual ? (state.usual + took) / 2 : 0.9 * state.usual + 0.1 * took;
  header.since = state.asked.since;
  state.asked = null;
  document.body.dataset.steps = Number(document.body.dataset.steps) + 1;
  const seconds = Object.values(header.seconds).reduce((sum, value) => sum + value, 0);
  document.body.dataset.compute = seconds;
  find("#compute").textContent = `${Math.round(1000 * seconds)} ms a step`;
}

function download(name, content) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([content], { type: "video/mp4" }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  say(`Saved as ${name}.`);
}

// ---- time

function interval() {
  const { fps, held } = state.hello;
  return Math.max(1000 / fps, (state.usual + SPARE) / held); // a slow machine shows a slower world, not a jerky one
}

function tick(now) {
  requestAnimationFrame(tick);
  if (!state.hello) return;
  if (state.queue.length && now >= state.due) {
    show(state.queue.shift(), now);
    state.due = Math.max(state.due + interval(), now + 0.5 * interval());
  }
  if (state.name === "ready" && inputs.active) wish(); // a stick, or a key that was down before the world was there
  if (state.name !== "playing" || state.asked) return;
  if (inputs.active) state.wished = now;
  if (now - state.wished > REST) return rest();
  const left = Math.max(0, state.due - now) + state.queue.length * interval();
  if (left <= state.usual + SPARE) ask(now);
}

function ask(now) {
  const { wish, since } = inputs.read();
  state.asked = { at: now, since };
  send(wish);
}

function show({ header, frame, pixels }, now) {
  for (const [world, told] of Object.entries(header.worlds)) views[world].show(pixels[world], told, frame, header.ring);
  if (frame === 0 && header.since) lagged(now - header.since);
  if (header.apart.length) trace.add(header.apart[frame]);
  if (header.type === "step") {
    measure(now);
    if (frame === header.count - 1) comment(header);
  } else {
    become("ready");
    say(header.note || HINT, header.note ? "error" : "");
  }
}

function measure(now) {
  state.shown.push(now);
  while (now - state.shown[0] > 2000) state.shown.shift();
  const { shown, hello } = state;
  if (shown.length < 8) return;
  const fps = (1000 * (shown.length - 1)) / (now - shown[0]);
  document.body.dataset.fps = fps.toFixed(2);
  const share = fps / hello.fps;
  find("#fps").textContent = share > 0.95 ? `${fps.toFixed(0)} pictures/s, real time` : `${fps.toFixed(1)} pictures/s, ${share.toFixed(2)}× real time`;
}

function lagged(ms) {
  document.body.dataset.lag = Math.round(ms);
  find("#lag").textContent = `${Math.round(ms)} ms from key to picture`;
}

// ---- words

function comment(header) {
  const worlds = Object.entries(header.worlds);
  const goals = worlds.reduce((sum, [, told]) => sum + told.goals, 0);
  const lost = worlds.some(([, told]) => told.cube.at(-1) === null);
  state.unseen = lost ? state.unseen + 1 : 0;
  if (goals > state.goals) {
    const names = worlds.filter(([, told]) => told.reached).map(([world]) => (world === "model" ? "the world model" : "MuJoCo"));
    say(`On the ring, in ${names.join(" and in ")}.`, "success");
  } else if (header.round !== state.round) say("A new ring.");
  else if (state.unseen > 6) say("A cube is out of sight. Press R to begin again.");
  state.goals = goals;
  state.round = header.round;
}

// ---- what the person does

function wish() {
  state.wished = performance.now();
  if (state.name !== "ready") return;
  become("playing");
  say("");
}

function rest() {
  become("ready");
  say("Resting. It goes on when you do.");
}

function pause() {
  if (state.name === "playing") {
    become("paused");
    say("Paused.");
  } else if (state.name === "paused" || state.name === "ready") {
    state.wished = performance.now();
    become("playing");
    say("");
  }
}

function save() {
  send({ type: "save" });
  say("Making the video…");
}

function openPicture(file) {
  if (!file || socket.readyState !== WebSocket.OPEN) return;
  become("beginning");
  state.queue = [];
  say("Opening the picture…");
  socket.send(file);
}

function seedWanted() {
  const field = find("#seed");
  if (field.checkValidity() && field.value !== "") return field.valueAsNumber;
  say(`The seed is ${field.value || "empty"}; allowed is 0 to ${field.max}.`, "error");
  return null;
}

const ACTIONS = {
  reset: () => seedWanted() !== null && begin(seedWanted()),
  next: () => seedWanted() !== null && begin(seedWanted() + 1),
  pause,
  goal: () => send({ type: "goal" }),
  save,
  open: () => find("#picture").click(),
};
const LETTERS = { r: "reset", n: "next", g: "goal", v: "save", p: "pause", " ": "pause" };

function keydown(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || !inputs) return;
  if (event.target.matches("input")) {
    if (event.key === "Enter" || event.key === "Escape") event.target.blur(); // a changed seed begins by that
    if (event.key === "Enter" && state.name !== "beginning") ACTIONS.reset();
    return;
  }
  if (event.key === "Shift") inputs.slow = true;
  const move = inputs.moveOf(event.code);
  if (move) {
    event.preventDefault();
    if (!event.repeat) inputs.press(event.code, move);
    return light();
  }
  if (event.key === " " && event.target.matches("button")) return; // the button's own key
  const action = LETTERS[event.key.toLowerCase()];
  if (!action) return;
  event.preventDefault();
  if (!event.repeat) ACTIONS[action]();
}

function keyup(event) {
  if (!inputs) return;
  if (event.key === "Shift") inputs.slow = false;
  inputs.lift(event.code);
  light();
}

function light() {
  const moves = inputs.moves();
  for (const button of document.querySelectorAll("[data-move]")) button.classList.toggle("lit", moves.has(button.dataset.move));
}

function follow(view, world) {
  const { canvas } = view;
  const move = (event) => {
    view.hand = view.place(event);
    inputs.point(world, ...view.hand);
    view.draw();
  };
  const end = () => {
    view.hand = null;
    inputs.unpoint();
    view.draw();
  };
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    canvas.setPointerCapture(event.pointerId);
    move(event);
  });
  canvas.addEventListener("pointermove", (event) => canvas.hasPointerCapture(event.pointerId) && move(event));
  canvas.addEventListener("pointerup", end);
  canvas.addEventListener("pointercancel", end);
}

function listen() {
  addEventListener("keydown", keydown);
  addEventListener("keyup", keyup);
  addEventListener("blur", () => inputs && light());
  for (const [id, action] of Object.entries(ACTIONS)) find(`#${id}`).addEventListener("click", () => state.hello && action());
  for (const button of document.querySelectorAll("[data-move]")) {
    const name = `pad ${button.dataset.move}`;
    const lift = () => (inputs.lift(name), light());
    button.addEventListener("pointerdown", (event) => {
      if (!inputs) return;
      button.setPointerCapture(event.pointerId);
      inputs.press(name, button.dataset.move);
      light();
    });
    for (const end of ["pointerup", "pointercancel", "lostpointercapture"]) button.addEventListener(end, lift);
    button.addEventListener("contextmenu", (event) => event.preventDefault());
  }
  find("#seed").addEventListener("change", ACTIONS.reset);
  find("#picture").addEventListener("change", (event) => {
    openPicture(event.target.files[0]);
    event.target.value = "";
  });
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    openPicture(event.dataTransfer.files[0]);
  });
  document.addEventListener("visibilitychange", () => document.hidden && state.name === "playing" && pause());
}

function connect() {
  socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/game`);
  socket.binaryType = "arraybuffer";
  socket.addEventListener("message", hear);
  socket.addEventListener("close", (event) => {
    become("closed");
    say(`${event.reason || "The server has ended"}. Reload the page when it runs again.`, "error");
  });
}

listen();
connect();
requestAnimationFrame(tick);
