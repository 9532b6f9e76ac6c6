"""What only a GPU can show; skipped where there is none. benchmarks/gpu.sh runs it in two minutes.

``GPU_TESTS_DEVICE=cpu`` rehearses it: what CUDA would do is left out or stood in for.
"""

import os

import pytest
import torch

DEVICE = os.environ.get("GPU_TESTS_DEVICE", "cuda")
ON_GPU = DEVICE == "cuda"
on_device = pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="torch sees no GPU here")
only_on_gpu = pytest.mark.skipif(not ON_GPU, reason="a rehearsal without a GPU")
