"""Where kernels run in these tests: on the GPU at hand, or in Triton's interpreter on the CPU."""

from __future__ import annotations

import os

import torch

ON_GPU = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
DEVICE = "cuda" if ON_GPU else "cpu"
