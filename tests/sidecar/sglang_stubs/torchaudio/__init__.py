"""Stands in for torchaudio, whose usual wheel is a CUDA build; for tests of text models on a CPU only."""

from _absent import stand_in

__version__ = "0.0.0"
__getattr__ = stand_in("torchaudio")
