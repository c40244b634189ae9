#!/usr/bin/env python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""Writes the constraint systems that FlashRNN builds for given sizes, dtypes and devices.

Reads the wheel of the PyPI package flashrnn 1.0.8 (Apache-2.0, NXAI GmbH): `pip download --no-deps flashrnn==1.0.8`.
Only the expression that builds the text is evaluated; neither torch nor a GPU is needed.

    extract.py flashrnn-1.0.8-py3-none-any.whl OUT_DIR
"""

import ast
import pathlib
import re
import sys
import types
import zipfile

# cudaDeviceProp fields the text depends on.
DEVICES = {
    "h100": dict(maxThreadsPerBlock=1024, regsPerMultiprocessor=65536, multiProcessorCount=132,
                 sharedMemPerBlockOptin=232448),
    "a100": dict(maxThreadsPerBlock=1024, regsPerMultiprocessor=65536, multiProcessorCount=108,
                 sharedMemPerBlockOptin=166912),
    "rtx4090": dict(maxThreadsPerBlock=1024, regsPerMultiprocessor=65536, multiProcessorCount=128,
                    sharedMemPerBlockOptin=101376),
}

# (head dimension, heads, batch, dtype, function, device)
SYSTEMS = [
    (16, 48, 16, "bfloat16", "lstm", "h100"),
    (64, 12, 16, "bfloat16", "lstm", "h100"),
    (768, 1, 16, "bfloat16", "lstm", "h100"),
    (3072, 1, 8, "bfloat16", "lstm", "h100"),
    (768, 1, 16, "float32", "lstm", "h100"),
    (64, 12, 16, "float16", "elman", "h100"),
    (64, 12, 16, "bfloat16", "slstm", "a100"),
    (256, 3, 16, "bfloat16", "lstm", "rtx4090"),
]


def assignments(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            yield node.targets[0].id, node.value


def main(wheel, out):
    with zipfile.ZipFile(wheel) as z:
        source = z.read("flashrnn/flashrnn/flashrnn.py").decode()
    tree = ast.parse(source)
    fused = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "_FlashRNNCUDAFused")
    values = dict(assignments(fused))
    text = compile(ast.Expression(values["constraint_str"]), "constraint_str", "eval")
    refinements = compile(ast.Expression(values["value_refinements"]), "value_refinements", "eval")
    registry = ast.literal_eval(dict(assignments(tree))["rnn_function_registry"])

    out = pathlib.Path(out)
    order = eval(refinements, {"VR": lambda name, way: f"{name}:{way}", "LF": "max", "SF": "min"})
    (out / "order.txt").write_text("\n".join(order) + "\n")
    for dim, heads, batch, dtype, function, device in SYSTEMS:
        gates_r, gates_w, *_ = registry[function]["gates_states"]
        config = types.SimpleNamespace(
            dtype=dtype, hidden_dim=dim * heads, num_heads=heads, batch_size=batch, num_gates_r=gates_r,
            num_gates_w=gates_w, _internal_dtype_size=4 if dtype == "float32" else 2, _internal_acc_dtype_size=4)
        scope = dict(config=config, gpu_info=DEVICES[device], min=min,
                     round_to_multiple=lambda n, m=8: (n + m - 1) // m * m)
        system = re.sub(r"\n[ \t]+", "\n", eval(text, scope)).strip()
        head = (f"# The constraint system FlashRNN 1.0.8 builds for {function} {dtype}, head dimension {dim}, {heads} heads, "
                f"batch {batch}, {device}.\n# Generated text of the PyPI package flashrnn, Apache-2.0, Copyright 2024 "
                "NXAI GmbH; written by extract.py.\n\n")
        (out / f"{function}_{dtype}_{dim}x{heads}_b{batch}_{device}.csp").write_text(head + system + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
