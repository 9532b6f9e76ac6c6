"""``search/run.py``, which says at its end on how many GPUs its own process has a CUDA context."""

import torch

from tunefleet.search.run import main
from tunefleet.search.session import leave

if __name__ == "__main__":
    code = main()
    print("contexts", sum(torch._C._cuda_hasPrimaryContext(k) for k in range(torch.cuda.device_count())))
    leave(code)
