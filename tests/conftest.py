"""Every test computes with one thread: what is tested must not depend on the machine, and tests run side by side."""

import torch

torch.set_num_threads(1)
