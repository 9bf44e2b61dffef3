"""The door to triton_kernels/: launches, grids, workspaces.

In reading order: launch (when it can run, how a kernel is launched), pairs (pair rules as arguments), sweeps (forward
and gradient of one problem), then one file per operator.
"""
