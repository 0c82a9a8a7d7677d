// Drawing: one world's picture with the ring and the hand on it; the trace of how far the cubes are apart.

import { Enlarger } from "./enlarge.js";

const GREEN = "#63d297";

export class View {
  constructor(figure, size) {
    this.figure = figure;
    this.canvas = figure.querySelector("canvas");
    this.context = this.canvas.getContext("2d");
    this.enlarger = new Enlarger(size);
    this.picture = document.createElement("canvas");
    this.picture.width = this.picture.height = this.enlarger.large;
    this.ring = [];
    this.reached = false;
    this.at = null; // where the peg is, 0 to 1
    this.hand = null; // where the pointer is, 0 to 1
    new ResizeObserver(() => this.resize()).observe(this.canvas);
  }

  resize() {
    const side = Math.round(this.canvas.clientWidth * devicePixelRatio);
    if (side && side !== this.canvas.width) {
      this.canvas.width = this.canvas.height = side;
      this.draw();
    }
  }

  // rgb: Uint8Array of one picture. told: what the server says of the world; frame: which of its pictures this is.
  show(rgb, told, frame, ring) {
    this.picture.getContext("2d").putImageData(this.enlarger.enlarge(rgb), 0, 0);
    this.ring = ring;
    this.at = told.at[frame];
    this.tell(told, frame);
    this.draw();
  }

  tell(told, frame) {
    const { figure } = this;
    const distance = told.distance[frame];
    this.reached = told.reached;
    figure.classList.toggle("reached", told.reached);
    figure.querySelector(".done").hidden = !told.reached;
    figure.querySelector(".distance").textContent = distance === null ? "out of sight" : centimetres(distance);
    figure.querySelector(".unit").textContent = distance === null ? "" : "from the ring";
    figure.querySelector(".goals").textContent = told.goals ? `${told.goals} reached` : "";
    figure.dataset.peg = told.peg[frame] || "";
    figure.dataset.cube = told.cube[frame] || "";
  }

  draw() {
    const { context, canvas } = this;
    const side = canvas.width;
    context.imageSmoothingEnabled = true;
    context.imageSmoothingQuality = "high";
    context.drawImage(this.picture, 0, 0, side, side);
    if (this.ring.length) {
      context.beginPath();
      this.ring.forEach(([x, y], index) => (index ? context.lineTo(x * side, y * side) : context.moveTo(x * side, y * side)));
      context.closePath();
      context.fillStyle = this.reached ? "rgb(99 210 151 / 28%)" : "rgb(255 255 255 / 12%)";
      context.fill();
      this.stroke("rgb(20 24 32 / 45%)", side / 110);
      this.stroke(this.reached ? GREEN : "#fff", side / 200);
    }
    if (this.hand) this.drawHand(side);
  }

  drawHand(side) {
    const { context } = this;
    const [x, y] = this.hand.map((value) => value * side);
    context.beginPath();
    if (this.at) {
      context.moveTo(this.at[0] * side, this.at[1] * side);
      context.lineTo(x, y);
    }
    context.moveTo(x + side / 50, y);
    context.arc(x, y, side / 50, 0, 7);
    this.stroke("rgb(20 24 32 / 40%)", side / 110);
    this.stroke("rgb(255 255 255 / 90%)", side / 220);
  }

  stroke(style, width) {
    this.context.strokeStyle = style;
    this.context.lineWidth = width;
    this.context.lineJoin = this.context.lineCap = "round";
    this.context.stroke();
  }

  // Where a pointer is on the picture, 0 to 1.
  place(event) {
    const box = this.canvas.getBoundingClientRect();
    const share = (value, from, length) => Math.max(0, Math.min(1, (value - from) / length));
    return [share(event.clientX, box.left, box.width), share(event.clientY, box.top, box.height)];
  }
}

export class Trace {
  constructor(box, length) {
    this.box = box;
    this.canvas = box.querySelector("canvas");
    this.length = length;
    this.values = [];
    new ResizeObserver(() => this.draw()).observe(this.canvas);
  }

  clear() {
    this.values = [];
    this.draw();
  }

  add(value) {
    this.values.push(value);
    if (this.values.length > this.length) this.values.shift();
    this.box.querySelector("output").textContent = value === null ? "–" : centimetres(value);
    this.draw();
  }

  draw() {
    const { canvas } = this;
    const [width, height] = [canvas.clientWidth, canvas.clientHeight].map((value) => Math.round(value * devicePixelRatio));
    if (!width) return;
    canvas.width = width;
    canvas.height = height;
    const context = canvas.getContext("2d");
    const style = getComputedStyle(canvas);
    const top = Math.max(0.1, ...this.values.filter((value) => value !== null));
    const margin = 3 * devicePixelRatio;
    context.lineWidth = 2 * devicePixelRatio;
    context.lineJoin = context.lineCap = "round";
    context.strokeStyle = style.getPropertyValue("color");
    context.beginPath();
    let drawing = false;
    this.values.forEach((value, index) => {
      if (value === null) {
        drawing = false;
        return;
      }
      const x = margin + ((width - 2 * margin) * index) / (this.length - 1);
      const y = height - margin - ((height - 2 * margin) * value) / top;
      if (drawing) context.lineTo(x, y);
      else context.moveTo(x, y);
      drawing = true;
    });
    context.stroke();
  }
}

export function centimetres(metres) {
  const value = metres * 100;
  return `${value < 10 ? value.toFixed(1) : Math.round(value)} cm`;
}
