"""The environment of all tests, set before anything that reads it is imported."""

import os
import signal

import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches for a network
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run on the CPU
# Where the tests are started in the background, Ctrl-C is ignored, and so it would be in the processes that they interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
