"""Stands in for sgl_kernel, whose usual wheel is a CUDA build; for tests of text models on a CPU only."""

from _absent import stand_in

__version__ = "0.4.10"
__getattr__ = stand_in("sgl_kernel")
