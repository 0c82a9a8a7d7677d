// What the person wants of the arm: keys, the pad's buttons, a pointer on a picture, a gamepad. Read once a step.

const KEYS = {
  ArrowUp: "up", ArrowDown: "down", ArrowLeft: "left", ArrowRight: "right",
  KeyW: "up", KeyS: "down", KeyA: "left", KeyD: "right",
};
const SLOW = 0.35;
const DEAD = 0.18; // of a gamepad's stick

export class Inputs {
  // changed(): called when the person begins to want something.
  constructor(stepLength, changed) {
    this.stepLength = stepLength; // milliseconds
    this.changed = changed;
    this.down = new Map(); // key or button -> {move, since}
    this.tapped = { up: 0, down: 0, left: 0, right: 0 }; // ms held and let go since the last reading
    this.pointer = null; // {world, x, y, held}
    this.slow = false;
    this.since = null; // when the first wish came that was not read yet
    addEventListener("blur", () => this.release());
  }

  moveOf(code) {
    return KEYS[code];
  }

  press(name, move) {
    if (this.down.has(name)) return;
    this.down.set(name, { move, since: performance.now() });
    this.touched();
  }

  lift(name) {
    const held = this.down.get(name);
    if (!held) return;
    this.down.delete(name);
    this.tapped[held.move] += performance.now() - held.since;
    if (this.since === null) this.since = performance.now();
  }

  point(world, x, y) {
    if (!this.pointer || !this.pointer.held) this.touched();
    this.pointer = { world, x, y, held: true };
  }

  unpoint() {
    if (this.pointer) this.pointer.held = false; // a short tap still counts once
  }

  touched() {
    if (this.since === null) this.since = performance.now();
    this.changed();
  }

  release() {
    this.down.clear();
    this.pointer = null;
    this.slow = false;
  }

  stick() {
    for (const pad of navigator.getGamepads ? navigator.getGamepads() : []) {
      if (!pad) continue;
      const [x, y] = [pad.axes[0] || 0, -(pad.axes[1] || 0)];
      if (Math.hypot(x, y) > DEAD) return [x, y];
    }
    return null;
  }

  moves() {
    return new Set([...this.down.values()].map((held) => held.move));
  }

  get active() {
    return this.down.size > 0 || (this.pointer && this.pointer.held) || this.stick() !== null;
  }

  // The wish now: a message for the server, and since when it was wished (or null).
  read() {
    const since = this.since;
    this.since = null;
    const limit = this.slow ? SLOW : 1;
    const now = this.moves();
    const share = (move) => (now.has(move) ? 1 : this.tapped[move] ? Math.min(1, Math.max(this.tapped[move], 60) / this.stepLength) : 0);
    let velocity = [share("right") - share("left"), share("up") - share("down")];
    this.tapped = { up: 0, down: 0, left: 0, right: 0 };
    const wish = { type: "act", limit };
    if (velocity[0] || velocity[1]) {
      if (this.slow) velocity = velocity.map((value) => value * SLOW);
    } else if (this.pointer) {
      wish.world = this.pointer.world;
      wish.to = [this.pointer.x, this.pointer.y];
      if (!this.pointer.held) this.pointer = null;
    } else {
      velocity = this.stick() || velocity;
    }
    wish.velocity = velocity.map((value) => Math.max(-1, Math.min(1, value)));
    return { wish, since };
  }
}
