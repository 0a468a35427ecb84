"""Stands in for sgl_kernel, whose usual wheel is a CUDA build; for tests of text models on a CPU only.

Also for pinned memory, which SGLang's LoRA layers ask of PyTorch, and which there is none of without a GPU.
"""

import torch
from _absent import stand_in

__version__ = "0.4.10"
__getattr__ = stand_in("sgl_kernel")


def _unpinned(make):
    def made(*args, pin_memory=False, **kwargs):
        return make(*args, **kwargs)

    return made


for _name in ("tensor", "empty", "zeros", "ones", "full", "empty_like", "zeros_like", "arange"):
    setattr(torch, _name, _unpinned(getattr(torch, _name)))
torch.Tensor.pin_memory = lambda self, *args, **kwargs: self
