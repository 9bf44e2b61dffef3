"""Triton kernels, installed as `contrastive_ext.triton_kernels`; none is here yet, the `triton` backend is upcoming."""
