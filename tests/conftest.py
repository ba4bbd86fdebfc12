"""The environment of all tests, set before anything that reads it is imported."""

import os

import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches for a network
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run on the CPU
