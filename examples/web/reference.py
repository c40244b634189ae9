"""The page's inputs and what they should give, in float64, in NumPy, sharing no code with the kernels.

    python reference.py MODEL_FOLDER > reference.json

Queries, keys and values are those of one layer of all-MiniLM-L6-v2 for one sentence, by the reference of the encoder
beside this folder; inputs of the recurrence come from a formula that the page has too. `bound` is how far float32 may be off:
a running bound over every operation (Higham, Accuracy and Stability, ch. 3), with u = 2^-24.
"""

import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np

SENTENCE = "The trophy does not fit in the suitcase because it is too big."
LAYER = 3
STEPS, CHANNELS, CHECKED = 16384, 64, 16
UNIT = 2.0**-24
# A unit in the last place, relative to the smallest number that has it: two roundings.
ULP = 2 * UNIT
# What the compiler lets a device's exponential be off (`UnaryOp::ulps` in ir/src/ops.rs), and its division, a reciprocal
# and a multiplication (`DIVISION_ULPS` in ir/src/cascade/eval/bound.rs).
EXP_ULPS, DIVIDE_ULPS = 2, 2


def encoder():
    path = Path(__file__).parent.parent / "minilm" / "reference.py"
    spec = importlib.util.spec_from_file_location("encoder", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def projections(m, ids, p):
    """Queries, keys and values [heads, tokens, width] of LAYER, rounded to float32: what the page is given."""
    e = "embeddings"
    x = p[f"{e}.word_embeddings.weight"][ids] + p[f"{e}.position_embeddings.weight"][: len(ids)]
    x = m.normalise(x + p[f"{e}.token_type_embeddings.weight"][0], p, e)
    for i in range(LAYER + 1):
        n = f"encoder.layer.{i}"
        heads = [m.linear(x, p, f"{n}.attention.self.{w}") for w in ("query", "key", "value")]
        q, k, v = (h.reshape(len(ids), m.HEADS, -1).transpose(1, 0, 2) for h in heads)
        if i == LAYER:
            return [a.astype(np.float32).astype(np.float64) for a in (q, k, v)]
        a = np.exp(q @ k.transpose(0, 2, 1) / math.sqrt(q.shape[-1]))
        o = (a / a.sum(-1, keepdims=True) @ v).transpose(1, 0, 2).reshape(len(ids), -1)
        x = m.normalise(x + m.linear(o, p, f"{n}.attention.output.dense"), p, f"{n}.attention.output")
        z = m.gelu(m.linear(x, p, f"{n}.intermediate.dense"))
        x = m.normalise(x + m.linear(z, p, f"{n}.output.dense"), p, f"{n}.output")


def attention(q, k, v):
    scale = 1 / math.sqrt(q.shape[-1])
    s = q @ k.transpose(0, 2, 1) * scale
    a = np.exp(s - s.max(-1, keepdims=True))
    a /= a.sum(-1, keepdims=True)
    width, keys = q.shape[-1], k.shape[1]
    # Scores, differences from the maximum, exponentials; then two sums over keys and a division.
    score = (np.abs(q) @ np.abs(k).transpose(0, 2, 1)) * scale * (width + 3) * UNIT
    score = 2 * score.max(-1, keepdims=True) + 2 * np.abs(s).max(-1, keepdims=True) * UNIT
    # Numerator and denominator have the scores' and the exponentials' error.
    relative = 2 * (score + EXP_ULPS * ULP) + 2 * keys * UNIT + DIVIDE_ULPS * ULP
    return a @ v, a, float((relative * (a @ np.abs(v))).max()), float((relative * a).max())


def hashed(n, seed):
    """[0, 1) in 24 bits, by the finaliser of MurmurHash3."""
    h = np.arange(n, dtype=np.uint32) + np.uint32(seed)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = (h ^ (h >> np.uint32(shift))) * np.uint32(factor)
    h ^= h >> np.uint32(16)
    return (h >> np.uint32(8)).astype(np.float64) * 2.0**-24


def recurrence():
    keep = (0.9 + 0.0999 * hashed(STEPS * CHANNELS, 1)).astype(np.float32).astype(np.float64).reshape(STEPS, CHANNELS)
    x = (2 * hashed(STEPS * CHANNELS, 7_000_003) - 1).astype(np.float32).astype(np.float64).reshape(STEPS, CHANNELS)
    h, error = np.zeros(CHANNELS), np.zeros(CHANNELS)
    rows, most = [], 0.0
    for t in range(STEPS):
        kept, taken = keep[t] * h, (1 - keep[t]) * x[t]
        h = kept + taken
        error = keep[t] * error + UNIT * (np.abs(kept) + 2 * np.abs(taken) + np.abs(h))
        most = max(most, float(error.max()))
        if (t + 1) % (STEPS // CHECKED) == 0:
            rows.append(h)
    return np.array(rows), most


def digits(a, n):
    return [float(f"{x:.{n}g}") for x in np.ravel(a)]


def main():
    folder = Path(sys.argv[1])
    m = encoder()
    vocabulary = {t: i for i, t in enumerate((folder / "vocab.txt").read_text(encoding="utf-8").splitlines())}
    names = {i: t for t, i in vocabulary.items()}
    ids = m.tokenize(SENTENCE, vocabulary)
    q, k, v = projections(m, ids, m.read_safetensors(folder / "model.safetensors"))
    # What is shipped is short; float64 takes what is shipped.
    q, k, v = ([[[float(f"{x:.5g}") for x in row] for row in head] for head in a] for a in (q, k, v))
    q, k, v = (np.array(a).astype(np.float32).astype(np.float64) for a in (q, k, v))
    o, a, o_bound, a_bound = attention(q, k, v)
    rows, bound = recurrence()
    print(
        json.dumps(
            {
                "sentence": SENTENCE,
                "layer": LAYER,
                "tokens": [names[i] for i in ids],
                "attention": {
                    "heads": q.shape[0],
                    "width": q.shape[2],
                    **{n: digits(x, 5) for n, x in (("Q", q), ("K", k), ("V", v))},
                    "O": digits(o, 9),
                    "A": digits(a, 9),
                    "bound": {"O": o_bound, "A": a_bound},
                },
                "recurrence": {
                    "steps": STEPS,
                    "channels": CHANNELS,
                    "every": STEPS // CHECKED,
                    "y": digits(rows, 9),
                    "bound": {"y": bound},
                },
            },
            ensure_ascii=False,
            separators=(",", ":"),
        )
    )


if __name__ == "__main__":
    main()
