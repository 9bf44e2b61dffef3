"""Benchmark of contrastive_ext against plain PyTorch: correctness first, then time and memory. `python -m bench`."""

import os

# Before torch is imported. OpenMP threads that wait by spinning stop each other when a machine is shared: the same job
# took 31 s so, and 4.5 s with threads that sleep. All methods run under it; the results file notes it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
