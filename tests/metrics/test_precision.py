"""No reduced precision inside, whichever interface of torch allowed it, and all as before after."""

from __future__ import annotations

import subprocess
import sys

#: Torch cannot be brought back to its initial settings: a process of its own for each statement.
PROGRAM = """
import os, sys, traceback
import torch
from cmbench.metrics.precision import exact_float32

STATEMENTS = [
    "pass",
    "b.fp32_precision = 'tf32'",
    "b.cudnn.fp32_precision = 'tf32'",
    "b.cudnn.conv.fp32_precision = 'ieee'",
    "b.cuda.matmul.fp32_precision = 'tf32'",
    "b.mkldnn.matmul.fp32_precision = 'bf16'",
    "b.mkldnn.conv.fp32_precision = 'bf16'",
    "torch.set_float32_matmul_precision('medium')",
    "b.cuda.matmul.allow_tf32 = b.cudnn.allow_tf32 = True",
    "b.cuda.matmul.allow_tf32 = True; b.cudnn.rnn.fp32_precision = 'ieee'",
]
b = torch.backends
operations = [b.cuda.matmul, b.cudnn.conv, b.cudnn.rnn, b.mkldnn.matmul, b.mkldnn.conv]

def state():
    found = [o.fp32_precision for o in (b, b.cudnn, b.mkldnn, *operations)]
    for read in (lambda: b.cuda.matmul.allow_tf32, lambda: b.cudnn.allow_tf32,
                 torch.get_float32_matmul_precision):
        try:
            found.append(read())
        except RuntimeError:
            found.append("refused")
    return found

def check(statement):
    exec(statement)
    before = state()
    with exact_float32():
        inside = [o.fp32_precision for o in operations]
    assert set(inside) <= {"ieee", "none"}, inside
    assert state() == before, (state(), before)

failed = 0
for statement in STATEMENTS:
    process = os.fork()
    if process == 0:
        try:
            check(statement)
        except BaseException:
            print(statement, traceback.format_exc(), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    failed += os.waitpid(process, 0)[1] != 0
sys.exit(failed)
"""


def test_settings_are_exact_inside_and_as_before_outside() -> None:
    found = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
