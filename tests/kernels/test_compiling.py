"""The interpreter runs what no GPU would compile: here every kernel is compiled for one, without having it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

KERNELS = (
    "_add_parts_kernel",
    "_add_spans_kernel",
    "_backward_kernel",
    "_e8p_add_kernel",
    "_e8p_backward_kernel",
    "_e8p_forward_kernel",
    "_factor_kernel",
    "_forward_kernel",
    "_group_mask_kernel",
    "_packed_gradient_kernel",
    "_packed_kernel",
    "_plan_kernel",
    "_rows_kernel",
    "_scale_gradient_kernel",
    "_sign_pack_kernel",
    "_x_gradient_kernel",
)

NEWER = {"squeeze", "to_tensor", "unsqueeze"}
"""Functions of ``triton.language`` that came after 3.6, the oldest Triton that kernels run on."""
FEW_STORES = 12
"""Into shared memory: what two looks into tables and the turning of a tile of y take."""


def test_every_kernel_compiles_to_machine_code_of_a_gpu(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compiling", "90"],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert {name for name, _, _ in lines} == set(KERNELS)
    # The opened weights of E8P stay in registers: the compiler found the orders of rows and inputs that it needs.
    assert max(int(stores) for name, _, stores in lines if name == "_e8p_forward_kernel") <= FEW_STORES


def test_kernels_call_nothing_that_the_oldest_triton_lacks() -> None:
    kernels = Path(__file__).parents[2] / "kernels"
    called = {name for file in kernels.rglob("*.py") for name in re.findall(r"\btl\.(\w+)", file.read_text())}
    assert "load" in called
    assert not called & NEWER
