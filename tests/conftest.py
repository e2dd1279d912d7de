"""Every test computes with one thread: what is tested must not depend on the machine, and tests run side by side."""

import os

import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
