"""Who computes (floor 3): one ordered table, one file or folder per backend.

In reading order: backend (what one is), dispatch (the table, one reason per backend that cannot), verified (what
hardware has proven), torch/ (plain PyTorch, block by block), native and cpu (the compiled library), triton/ (kernels of
triton_kernels/), cuda. Each ends in its `BACKEND`.
"""
