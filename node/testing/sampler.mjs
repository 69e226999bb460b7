// The normative sampler a third time, in another language and from the text of the rules alone: tests compare it with the
// reference and with the engine's. Plain and slow on purpose: BigInt for words, one full sort for the ranking.
//
// Standard input: one JSON case a line, as in tests/vectors/sampler.json ("words", "gumbel", "seed_of" or "draw" says what).
// Standard output: one JSON answer a line.

import { createInterface } from "node:readline";

const LOW = 0xffffffffn;
const DRAWS = 0x474d5331n;
const SEEDS = 0x474d5332n;
const UNIT = 2 ** 40;

function philox(counter, key) {
  let [x0, x1, x2, x3] = counter;
  let [k0, k1] = key;
  for (let round = 0; round < 10; round++) {
    const p0 = 0xd2511f53n * x0;
    const p1 = 0xcd9e8d57n * x2;
    [x0, x1, x2, x3] = [(p1 >> 32n) ^ x1 ^ k0, p1 & LOW, (p0 >> 32n) ^ x3 ^ k1, p0 & LOW];
    k0 = BigInt.asUintN(32, k0 + 0x9e3779b9n);
    k1 = BigInt.asUintN(32, k1 + 0xbb67ae85n);
  }
  return [x0, x1, x2, x3];
}

function keyOf(seed) {
  return [seed & LOW, seed >> 32n];
}

function gumbel(seed, position, token) {
  const counter = [BigInt(token) / 4n, position & LOW, position >> 32n, DRAWS];
  const word = philox(counter, keyOf(seed))[token % 4];
  return -Math.log(-Math.log((Number(word) + 0.5) / 2 ** 32));
}

function seedOf(seed, index) {
  if (index === 0) return seed;
  const words = philox([BigInt(index), 0n, 0n, SEEDS], keyOf(seed));
  return BigInt.asUintN(63, (words[1] << 32n) | words[0]);
}

function logitsOf({ vocab, seed, step, bits = 16, hidden = 0 }) {
  const logits = [];
  for (let block = 0; logits.length < vocab; block++) {
    for (const word of philox([BigInt(block), 0n, 0n, 0n], [BigInt(seed), 0n])) {
      logits.push(((Number(word >> BigInt(32 - bits)) * 16) / 2 ** bits - 8) * step);
    }
  }
  logits.length = vocab;
  return logits.map((logit, i) => (hidden && i % hidden === 0 ? -Infinity : logit));
}

function draw(test) {
  const p = test.params;
  const l = Array.isArray(test.logits) ? test.logits.map((x) => x ?? -Infinity) : logitsOf(test.logits);
  const length = typeof test.prompt === "number" ? test.prompt : test.prompt.length;
  const prompt = typeof test.prompt === "number" ? [] : test.prompt;
  const position = BigInt(length) + BigInt(test.generated.length);

  if (Array.isArray(test.allowed)) {
    const allowed = new Set(test.allowed);
    for (let i = 0; i < l.length; i++) if (!allowed.has(i)) l[i] = -Infinity;
  } else if (test.allowed) {
    for (let i = 0; i < l.length; i++) if (i % test.allowed) l[i] = -Infinity;
  }
  for (const [token, bias] of p.logit_bias) l[token] += bias;
  if (p.repetition_penalty !== 1) {
    for (const i of new Set([...prompt, ...test.generated])) {
      l[i] = l[i] > 0 ? l[i] / p.repetition_penalty : l[i] * p.repetition_penalty;
    }
  }
  const n = new Map();
  for (const i of test.generated) n.set(i, (n.get(i) ?? 0) + 1);
  for (const [i, count] of n) {
    l[i] -= p.frequency_penalty * count;
    l[i] -= p.presence_penalty;
  }

  let winner = -1;
  let best = -Infinity;
  if (p.temperature < 0.001) {
    l.forEach((x, i) => {
      if (x > best) [winner, best] = [i, x];
    });
    return { token: winner, survivors: 0 };
  }

  const s = l.map((x) => x / p.temperature);
  let ranking = [...s.keys()].sort((i, j) => (s[i] === s[j] ? i - j : s[i] < s[j] ? 1 : -1));
  const max = s[ranking[0]];
  const q = (i) => BigInt(Math.floor(Math.exp(s[i] - max) * UNIT));
  if (p.top_k > 0) ranking = ranking.slice(0, p.top_k);
  if (p.top_p < 1) {
    const total = ranking.reduce((sum, i) => sum + q(i), 0n);
    const threshold = BigInt(Math.ceil(p.top_p * Number(total)));
    let sum = 0n;
    let kept = 0;
    while (kept < ranking.length && sum < threshold) sum += q(ranking[kept++]);
    ranking = ranking.slice(0, kept);
  }
  if (p.min_p > 0) {
    const least = BigInt(Math.ceil(p.min_p * UNIT));
    ranking = ranking.filter((i) => q(i) >= least);
  }
  const seed = BigInt(p.seed);
  for (const i of ranking.toSorted((i, j) => i - j)) {
    const value = s[i] + gumbel(seed, position, i);
    if (value > best) [winner, best] = [i, value];
  }
  return { token: winner, survivors: ranking.length };
}

const ANSWERS = {
  words: ({ counter, key }) =>
    philox(counter.map((word) => BigInt("0x" + word)), key.map((word) => BigInt("0x" + word)))
      .map((word) => word.toString(16).padStart(8, "0")),
  gumbel: ({ seed, position, token }) => gumbel(BigInt(seed), BigInt(position), token),
  seed_of: ({ seed, index }) => seedOf(BigInt(seed), index).toString(),
  draw,
};

for await (const line of createInterface({ input: process.stdin })) {
  const [what, test] = JSON.parse(line);
  console.log(JSON.stringify(ANSWERS[what](test)));
}
