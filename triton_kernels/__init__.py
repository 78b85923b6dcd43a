"""Triton kernels, one file per family; mapped into the wheel as `fastdensity.triton_kernels`.

Importing a module of this folder imports Triton; importing `fastdensity` imports none of them.
"""
