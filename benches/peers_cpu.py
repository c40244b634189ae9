#!/usr/bin/env python3
"""Time PyTorch on the processor at the cases of `einfall bench`, alone or in turns with it.

    python3 benches/peers_cpu.py --threads 16                      # PyTorch alone, a JSON object a line
    python3 benches/peers_cpu.py --with target/release/einfall --rounds 5 --threads 16 --out cpu.jsonl

With `--with`, einfall and PyTorch take turns: of every case, einfall's block, then a block of each of its peers, and so on
for all rounds, so that whatever else the machine does falls on both. It ends with a table of ratios (the peer's median time
over ours: above 1 is faster than the peer; in brackets the least and most that the rounds span). The lines go to
`einfall report`.

Cases are named as src/cli/bench/cases.rs names them and count what that counts. Needs torch and numpy; torch.compile only
where there is a C++ compiler. Memory that is freed stays with the process, so that PyTorch's results cost no page faults,
and cases that memory bounds stream over as many arrays as ours do. A peer that cannot run prints a line with `error`.
"""
import argparse, json, math, os, re, shutil, statistics, subprocess, sys, time

STREAMED_BYTES, SETS = 512 << 20, 16


def arguments():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--threads", type=int, default=os.cpu_count())
    ap.add_argument("--family", help="only this family")
    ap.add_argument("--case", help="only cases whose name contains this")
    ap.add_argument("--with", dest="ours", metavar="EINFALL", help="the einfall binary to take turns with")
    ap.add_argument("--rounds", type=int, default=1, help="blocks of every case")
    ap.add_argument("--budget-ms", type=int, default=100, help="milliseconds of a block")
    ap.add_argument("--out", help="write the lines here too")
    ap.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    return ap.parse_args()


ARGS = arguments()
# What must be known before a process starts: freed memory stays with it, and so many threads.
KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "1099511627776", "OMP_NUM_THREADS": str(ARGS.threads)}
if any(os.environ.get(k) != v for k, v in KEEP.items()):
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP})

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

torch.set_num_threads(ARGS.threads)
torch.manual_seed(0)
torch.set_grad_enabled(False)
COMPILER = not ARGS.no_compile and any(shutil.which(c) for c in (os.environ.get("CXX", "g++"), "clang++"))
TYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def processor():
    with open("/proc/cpuinfo") as f:
        names = [line.split(":", 1)[1] for line in f if line.startswith("model name")]
    return " ".join(names[0].split()) if names else "unknown"


DEVICE = f"{processor()}, {ARGS.threads} thread{'' if ARGS.threads == 1 else 's'}"


def rnd(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(*shape) * scale).to(dtype)


# ------------------------------------------------------------------------------------------------ the peers of a case
# make(TYPE, NUMBERS of the name..) gives ("flops" | "bytes", how many) and the peers: name -> (arrays, function of them).

def gemm(dtype, m, n, k):
    a, b, out = rnd(m, k, dtype=dtype), rnd(k, n, dtype=dtype), torch.empty(m, n, dtype=dtype)
    peers = {"torch": ([a, b, out], lambda a, b, out: torch.matmul(a, b, out=out))}
    if m >= 64:
        return ("flops", 2.0 * m * n * k), peers
    # A layer's weight lies the other way round.
    peers["torch_linear"] = ([a, b.T.contiguous(), out], lambda a, w, out: F.linear(a, w))
    return ("bytes", float(n * k * b.element_size())), peers


def attn_fwd(dtype, b, h, kv, n, d, causal):
    q, k, v = rnd(b, h, n, d, dtype=dtype), rnd(b, kv, n, d, dtype=dtype), rnd(b, kv, n, d, dtype=dtype)
    work = 4.0 * b * h * n * n * d * (0.5 if causal else 1.0)
    return ("flops", work), {"torch_sdpa": ([q, k, v], lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal))}


def attn_variants(dtype, b, h, n, d, variant):
    q, k, v = (rnd(b, h, n, d, dtype=dtype) for _ in range(3))
    later = torch.ones(n, n, dtype=torch.bool).triu(1)
    slope = torch.exp2(-torch.arange(1, h + 1, dtype=torch.float32)).view(h, 1, 1)
    at = torch.arange(n)
    distance = (at[None, :] - at[:, None]).to(torch.float32)
    scale = d ** -0.5

    def softcap(q, k, v):
        s = 20.0 * torch.tanh(q @ k.transpose(-1, -2) * (scale / 20.0))
        return s.masked_fill(later, -math.inf).softmax(-1) @ v

    def alibi(q, k, v):
        s = q @ k.transpose(-1, -2) * scale + slope * distance
        return s.masked_fill(later, -math.inf).softmax(-1) @ v

    def biased(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    f = softcap if variant.startswith("softcap") else alibi
    peers = {"torch": ([q, k, v], f)}
    if f is alibi:
        bias = (slope * distance).masked_fill(later, -math.inf)[None]
        peers["torch_sdpa_bias"] = ([q, k, v], biased)
    if COMPILER:
        peers["torch_compile"] = ([q, k, v], torch.compile(f, dynamic=False))
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, n, n, device="cpu")
        flat = slope.flatten()
        if f is alibi:
            score = lambda s, b, h, i, j: s + flat[h] * (j - i)  # noqa: E731
        else:
            score = lambda s, b, h, i, j: 20.0 * torch.tanh(s / 20.0)  # noqa: E731
        flex = torch.compile(flex_attention, dynamic=False)
        peers["torch_flex"] = ([q, k, v], lambda q, k, v: flex(q, k, v, score_mod=score, block_mask=mask))
    expected = f(q, k, v)
    for _, (arrays, g) in list(peers.items())[1:]:
        close(g(*arrays), expected)
    return ("flops", 2.0 * b * h * n * n * d), peers


def attn_decode(dtype, b, h, kv, n, d):
    q, k, v = rnd(b, h, 1, d, dtype=dtype), rnd(b, kv, n, d, dtype=dtype), rnd(b, kv, n, d, dtype=dtype)
    peers = {
        "torch_sdpa_gqa": ([q, k, v], lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)),
        # Heads that share keys as rows of one head.
        "torch_sdpa_rows": ([q.view(b, kv, h // kv, d), k, v], F.scaled_dot_product_attention),
    }
    return ("bytes", 2.0 * b * kv * n * d * k.element_size()), peers


def norm(dtype, what, rows, d):
    x, w, b, out = rnd(rows, d, dtype=dtype), rnd(d, dtype=dtype), rnd(d, dtype=dtype), torch.empty(rows, d, dtype=dtype)
    f = {
        "layernorm": lambda x, out: F.layer_norm(x, (d,), w, b),
        "rmsnorm": lambda x, out: F.rms_norm(x, (d,), w),
        "softmax": lambda x, out: torch.softmax(x, -1, out=out),
    }[what]
    peers = {"torch": ([x, out], f)}
    if COMPILER and what == "rmsnorm":
        peers["torch_compile"] = ([x, out], torch.compile(f, dynamic=False))
    return ("bytes", 2.0 * rows * d * x.element_size()), peers


def lstm_dense(dtype, b, t, hidden):
    net = torch.nn.LSTM(hidden, hidden).to(dtype)
    x = rnd(t, b, hidden, dtype=dtype)
    return ("flops", 2.0 * t * b * 4 * hidden * 2 * hidden), {"torch": ([x], lambda x: net(x)[0])}


def linear_attn(dtype, b, t, h, d):
    q, k, v = (rnd(b, h, t, d, dtype=dtype) for _ in range(3))
    chunk = 64
    kept = torch.ones(chunk, chunk, dtype=dtype).tril()

    def chunked(q, k, v):
        q, k, v = (x.view(b, h, -1, chunk, x.shape[-1]) for x in (q, k, v))
        state = k.transpose(-1, -2) @ v
        before = torch.cumsum(state, 2) - state
        return ((q @ k.transpose(-1, -2) * kept) @ v + q @ before).view(b, h, -1, v.shape[-1])

    few = 2 * chunk
    short = [x[:, :, :few].contiguous() for x in (q, k, v)]
    close(chunked(*short), (short[0] @ short[1].transpose(-1, -2)).tril() @ short[2])
    return ("bytes", 4.0 * b * t * h * d * q.element_size()), {"torch_chunk64": ([q, k, v], chunked)}


def diagonal(dtype, b, t, d):
    decay, x, y, h0 = rnd(t, b, d, dtype=dtype), rnd(t, b, d, dtype=dtype), torch.empty(t, b, d, dtype=dtype), torch.zeros(b, d)

    def steps(decay, x, y):
        h = h0
        for i in range(t):
            h = torch.addcmul(x[i], decay[i], h, out=y[i])
        return y

    return ("bytes", 3.0 * b * t * d * x.element_size()), {"torch": ([decay, x, y], steps)}


def moe_up(dtype, t, e, k, d, f):
    x, w, out = rnd(t, d, dtype=dtype), rnd(e, d, f, dtype=dtype), torch.empty(t * k, f, dtype=dtype)
    source = torch.arange(t) * 1237 % t
    # Groups whose sizes are to each other as 2, 3, 4 and so on.
    begin = [t * (i * (i + 3) // 2) // (e * (e + 3) // 2) for i in range(e + 1)]

    def experts(x, w, out):
        rows = x[source]
        for i in range(e):
            torch.matmul(rows[begin[i]:begin[i + 1]], w[i], out=out[begin[i]:begin[i + 1]])
        return out

    return ("flops", 2.0 * t * k * d * f), {"torch": ([x, w, out], experts)}


def copy(dtype):
    x = rnd(1 << 24, dtype=dtype)
    return ("bytes", 2.0 * (1 << 26)), {"torch": ([x, torch.empty_like(x)], lambda x, y: y.copy_(x))}


T = r"_(?P<dtype>f32|bf16)$"
PATTERNS = [
    ("ceilings", r"copy_64MiB$", copy, ()),
    ("gemm", r"m(\d+)_n(\d+)_k(\d+)" + T, gemm, (int, int, int)),
    ("attn_fwd", r"b(\d+)_h(\d+)_kv(\d+)_n(\d+)_d(\d+)_(causal|full)" + T, attn_fwd, (int,) * 5 + (lambda x: x == "causal",)),
    ("attn_variants", r"b(\d+)_h(\d+)_n(\d+)_d(\d+)_(softcap20|alibi)_causal" + T, attn_variants, (int,) * 4 + (str,)),
    ("attn_decode", r"b(\d+)_h(\d+)_kv(\d+)_ctx(\d+)_d(\d+)" + T, attn_decode, (int,) * 5),
    ("norm", r"(layernorm|rmsnorm|softmax)_(\d+)x(\d+)" + T, norm, (str, int, int)),
    ("rnn_fwd", r"lstm_dense_b(\d+)_t(\d+)_hidden(\d+)" + T, lstm_dense, (int,) * 3),
    ("linrec_fwd", r"linear_attn_b(\d+)_t(\d+)_h(\d+)_d(\d+)" + T, linear_attn, (int,) * 4),
    ("linrec_fwd", r"diagonal_b(\d+)_t(\d+)_d(\d+)" + T, diagonal, (int,) * 3),
    ("moe", r"up_t(\d+)_e(\d+)_k(\d+)_d(\d+)_f(\d+)" + T, moe_up, (int,) * 5),
]
# The names, where einfall is not there to say them.
ALONE = [("ceilings", "copy_64MiB")] + [
    (family, f"{name}_{dtype}") for dtype in TYPES for family, names in {
        "gemm": [f"m{m}_n{m}_k{m}" for m in (512, 1024, 2048)] + [f"m{m}_n4096_k4096" for m in (16, 4, 1)],
        "attn_fwd": [f"b1_h8_kv8_n2048_d{d}_{c}" for d in (64, 128) for c in ("full", "causal")],
        "attn_variants": [f"b1_h8_n2048_d64_{v}_causal" for v in ("softcap20", "alibi")] if dtype == "f32" else [],
        "attn_decode": ["b8_h32_kv8_ctx2048_d128"],
        "norm": [f"{what}_4096x4096" for what in ("layernorm", "rmsnorm", "softmax")],
        "rnn_fwd": ["lstm_dense_b16_t512_hidden512"],
        "linrec_fwd": ["linear_attn_b1_t2048_h8_d64", "diagonal_b1_t2048_d4096"] if dtype == "f32" else [],
        "moe": ["up_t2048_e8_k1_d512_f1024"],
    }.items() for name in names
]


def close(found, expected):
    """A peer computes what it should, to the accuracy of its type: the largest error against the root mean square."""
    error = (found.double() - expected.double()).abs().max() / expected.double().square().mean().sqrt()
    assert error < 1e-3, f"differs from its definition by {error:.1e}"


# ------------------------------------------------------------------------------------------------ timing

class Peer:
    """One peer of a case, warmed up."""

    def __init__(self, name, work, arrays, function):
        self.name, self.work, self.function = name, work, function
        size = sum(a.numel() * a.element_size() for a in arrays)
        n = max(2, min(SETS, STREAMED_BYTES // size)) if work[0] == "bytes" else 2
        self.sets = [arrays] + [[a.clone() for a in arrays] for _ in range(n - 1)]
        for arrays in self.sets:
            function(*arrays)

    def block(self, budget_ms):
        """The median of the launches of a block, milliseconds; the first warms up."""
        samples, begin = [], time.perf_counter()
        for turn in range(1 << 30):
            arrays = self.sets[turn % len(self.sets)]
            start = time.perf_counter()
            self.function(*arrays)
            end = time.perf_counter()
            if turn:
                samples.append((end - start) * 1e3)
            # Of what takes long one launch is enough.
            took = (end - begin) * 1e3
            if len(samples) >= (1 if took > 3 * budget_ms else 3) and took > budget_ms:
                return statistics.median(samples)


def peers_of(family, case):
    """The peers of a case; none where it has none."""
    for of, pattern, make, types in PATTERNS:
        found = of == family and re.match(pattern, case)
        if found:
            dtype = TYPES[found.groupdict().get("dtype") or "f32"]
            numbers = [t(x) for t, x in zip(types, found.groups())]
            work, peers = make(dtype, *numbers)
            return [Peer(name, work, *peer) for name, peer in peers.items()]
    return []


OUT = open(ARGS.out, "w") if ARGS.out else None
ROWS = []


def emit(row):
    line = json.dumps(row)
    if OUT:
        OUT.write(line + "\n")
        OUT.flush()
    if not ARGS.ours:
        print(line, flush=True)
    ROWS.append(row)


def failed(family, case, peer, error):
    emit(dict(family=family, case=case, peer=peer, error=f"{type(error).__name__}: {str(error)[:200]}", device=DEVICE))


def block(family, case, peers, index):
    for peer in peers:
        ms = peer.block(ARGS.budget_ms)
        kind, amount = peer.work
        rate = dict(tflops=amount / ms / 1e9) if kind == "flops" else dict(gbps=amount / ms / 1e6)
        emit(dict(family=family, case=case, peer=peer.name, block=index, ms=ms, **rate, threads=ARGS.threads,
                  torch=torch.__version__, device=DEVICE))


def prepared(family, case):
    try:
        return peers_of(family, case)
    except Exception as e:  # a peer that cannot run must not stop the rest
        failed(family, case, "torch", e)
        return []


def alone():
    chosen = [(f, c) for f, c in ALONE if ARGS.family in (None, f) and (ARGS.case or "") in c]
    if not chosen:
        sys.exit(f"there is no such family or case; the families are {', '.join(dict.fromkeys(f for f, _ in ALONE))}")
    for family, case in chosen:
        peers = prepared(family, case)
        for i in range(ARGS.rounds):
            block(family, case, peers, i)


def in_turns():
    command = [ARGS.ours, "bench", "--device", "cpu", "--jsonl", "--paced", "--blocks", str(ARGS.rounds),
               "--budget-ms", str(ARGS.budget_ms), "--threads", str(ARGS.threads)]
    command += ["--family", ARGS.family] if ARGS.family else []
    command += ["--case", ARGS.case] if ARGS.case else []
    ours = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    last, index, peers = None, 0, []
    begin = time.time()
    while True:
        # Threads that PyTorch leaves spinning have gone to sleep.
        time.sleep(0.01)
        try:
            ours.stdin.write("\n")
            ours.stdin.flush()
        except BrokenPipeError:
            break
        line = ours.stdout.readline()
        if not line:
            break
        row = json.loads(line)
        names = (row["family"], row["case"])
        if names != last:
            last, index, peers = names, 0, None
            print(f"{time.time() - begin:6.1f} s  {names[0]} {names[1]}", file=sys.stderr, flush=True)
        emit({**row, "block": index})
        if peers is None:
            peers = prepared(*names)
        block(*names, peers, index)
        index += 1
        if index == ARGS.rounds:
            peers = []
    return ours.wait()


def table():
    """A line a case: the medians of ours and of its best peer, and their ratio with what the rounds span."""
    times = {}
    for row in ROWS:
        if "ms" in row:
            ways = times.setdefault((row["family"], row["case"]), {})
            ways.setdefault(row["peer"], []).append(row["ms"])
    print(f"{DEVICE}; torch {torch.__version__}; {ARGS.rounds} rounds; ms are medians; a ratio is the peer's time over ours")
    for (family, case), ways in times.items():
        ours = ways.pop("einfall", None)
        if ours is None:
            continue
        mine = statistics.median(ours)
        text = f"{family:13} {case:36} {mine:10.3f} ms"
        for name, ms in sorted(ways.items(), key=lambda way: statistics.median(way[1])):
            turns = [b / a for a, b in zip(ours, ms)]
            text += f"   {statistics.median(turns):5.2f} [{min(turns):.2f}, {max(turns):.2f}] {name} {statistics.median(ms):.3f} ms"
        print(text)
    for row in ROWS:
        if "error" in row:
            print(f"not timed: {row['family']} {row['case']} {row['peer']}: {row['error']}")


if ARGS.ours:
    code = in_turns()
    table()
    sys.exit(code)
alone()
