// Small pictures made larger without the stars and stairs of a browser's own smoothing: Mitchell and Netravali's cubic.

const TIMES = 4;

function cubic(x) {
  const a = Math.abs(x);
  if (a < 1) return (7 * a ** 3 - 12 * a ** 2 + 16 / 3) / 6;
  if (a < 2) return ((-7 / 3) * a ** 3 + 12 * a ** 2 - 20 * a + 32 / 3) / 6;
  return 0;
}

export class Enlarger {
  constructor(size) {
    this.size = size;
    this.large = TIMES * size;
    this.image = new ImageData(this.large, this.large);
    this.image.data.fill(255);
    this.between = new Float32Array(size * this.large * 3);
    this.first = []; // of each large column: where its four small ones are, and their weights
    this.weights = [];
    for (let place = 0; place < this.large; place++) {
      const middle = (place + 0.5) / TIMES - 0.5;
      const left = Math.floor(middle) - 1;
      const taps = [0, 1, 2, 3].map((tap) => Math.max(0, Math.min(size - 1, left + tap)));
      this.first.push(taps);
      this.weights.push([0, 1, 2, 3].map((tap) => cubic(middle - left - tap)));
    }
  }

  // rgb: Uint8Array [size * size * 3] -> ImageData, 4 times as wide and high.
  enlarge(rgb) {
    const { size, large, between, first, weights } = this;
    const pixels = this.image.data;
    for (let x = 0; x < large; x++) {
      const [a, b, c, d] = first[x].map((tap) => 3 * tap);
      const [p, q, r, s] = weights[x];
      for (let y = 0; y < size; y++) {
        const from = 3 * y * size;
        const to = 3 * (y * large + x);
        for (let i = 0; i < 3; i++) {
          const at = from + i;
          between[to + i] = p * rgb[at + a] + q * rgb[at + b] + r * rgb[at + c] + s * rgb[at + d];
        }
      }
    }
    for (let y = 0; y < large; y++) {
      const [a, b, c, d] = first[y].map((tap) => 3 * tap * large);
      const [p, q, r, s] = weights[y];
      for (let x = 0, to = 4 * y * large; x < large; x++, to += 4) {
        for (let i = 0; i < 3; i++) {
          const at = 3 * x + i;
          pixels[to + i] = p * between[a + at] + q * between[b + at] + r * between[c + at] + s * between[d + at];
        }
      }
    }
    return this.image;
  }
}
