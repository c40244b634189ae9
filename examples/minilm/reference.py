"""Reference embeddings of all-MiniLM-L6-v2 in float64, in NumPy, sharing no code with the crate beside it.

    python reference.py MODEL_FOLDER > tests/reference.json

Reads vocab.txt and model.safetensors itself. BERT: Devlin et al., arXiv 1810.04805; mean pooling over real tokens
and unit length: Reimers & Gurevych, arXiv 1908.10084. Sentences are computed one by one, so nothing is padded.
"""

import json
import math
import struct
import sys
import unicodedata
from pathlib import Path

import numpy as np

HEADS, LAYERS, EPS, MAX_TOKENS = 12, 6, 1e-12, 256

SENTENCES = [
    "The cat sits on the windowsill and watches the birds.",
    "A kitten looks at sparrows through the window.",
    "Interest rates rose by a quarter of a percentage point on Thursday.",
    "Café naïve façade, ÜBER-straße: can't re-enter the résumé?!",
    "Kernels",
    "",
    "東京は日本の首都です。 Tokyo (population: 14,000,000) is the capital.",
    "Tensors, " * 20 + "and " + "antidisestablishmentarianism " * 9 + "zzzzqqqqxxxx.",
    "All work and no play makes Jack a dull boy. " * 30,
]


def is_punctuation(c):
    return 33 <= ord(c) <= 47 or 58 <= ord(c) <= 64 or 91 <= ord(c) <= 96 or 123 <= ord(c) <= 126 or unicodedata.category(
        c
    ).startswith("P")


def is_ideograph(c):
    blocks = [(0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B81F), (0x2B820, 0x2CEAF)]
    return any(lo <= ord(c) <= hi for lo, hi in blocks + [(0xF900, 0xFAFF), (0x2F800, 0x2FA1F)])


def words(text):
    text = unicodedata.normalize("NFD", text)
    text = "".join(c for c in text if unicodedata.category(c) != "Mn").lower()
    return "".join(f" {c} " if is_punctuation(c) or is_ideograph(c) else c for c in text).split()


def pieces(word, vocabulary):
    """Greedy longest match first; a word with a part that is not there is unknown as a whole."""
    if len(word) > 100:
        return ["[UNK]"]
    found, start = [], 0
    while start < len(word):
        for end in range(len(word), start, -1):
            piece = ("##" if start else "") + word[start:end]
            if piece in vocabulary:
                found.append(piece)
                start = end
                break
        else:
            return ["[UNK]"]
    return found


def tokenize(text, vocabulary):
    body = [vocabulary[p] for w in words(text) for p in pieces(w, vocabulary)]
    return [vocabulary["[CLS]"], *body[: MAX_TOKENS - 2], vocabulary["[SEP]"]]


def read_safetensors(path):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    arrays = {}
    for name, entry in header.items():
        if name != "__metadata__" and entry["dtype"] == "F32":
            first, end = (8 + length + offset for offset in entry["data_offsets"])
            arrays[name] = np.frombuffer(data[first:end], "<f4").reshape(entry["shape"]).astype(np.float64)
    return arrays


def normalise(x, p, name):
    centred = x - x.mean(-1, keepdims=True)
    deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + EPS)
    return centred / deviation * p[f"{name}.LayerNorm.weight"] + p[f"{name}.LayerNorm.bias"]


def linear(x, p, name):
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def gelu(x):
    return 0.5 * x * (1.0 + np.vectorize(math.erf)(x / math.sqrt(2.0)))


def embed(ids, p):
    e = "embeddings"
    x = p[f"{e}.word_embeddings.weight"][ids] + p[f"{e}.position_embeddings.weight"][: len(ids)]
    x = normalise(x + p[f"{e}.token_type_embeddings.weight"][0], p, e)
    for i in range(LAYERS):
        n = f"encoder.layer.{i}"
        heads = [linear(x, p, f"{n}.attention.self.{w}") for w in ("query", "key", "value")]
        q, k, v = (h.reshape(len(ids), HEADS, -1).transpose(1, 0, 2) for h in heads)
        s = q @ k.transpose(0, 2, 1) / math.sqrt(q.shape[-1])
        a = np.exp(s - s.max(-1, keepdims=True))
        a /= a.sum(-1, keepdims=True)
        o = (a @ v).transpose(1, 0, 2).reshape(len(ids), -1)
        x = normalise(x + linear(o, p, f"{n}.attention.output.dense"), p, f"{n}.attention.output")
        z = gelu(linear(x, p, f"{n}.intermediate.dense"))
        x = normalise(x + linear(z, p, f"{n}.output.dense"), p, f"{n}.output")
    mean = x.mean(0)
    return mean / np.linalg.norm(mean)


def main():
    folder = Path(sys.argv[1])
    vocabulary = {t: i for i, t in enumerate((folder / "vocab.txt").read_text(encoding="utf-8").splitlines())}
    p = read_safetensors(folder / "model.safetensors")
    cases = []
    for sentence in SENTENCES:
        ids = tokenize(sentence, vocabulary)
        cases.append({"sentence": sentence, "ids": ids, "embedding": embed(ids, p).tolist()})
    print("[\n" + ",\n".join(json.dumps(c, ensure_ascii=False) for c in cases) + "\n]")


if __name__ == "__main__":
    main()
