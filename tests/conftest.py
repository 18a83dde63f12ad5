"""Settings for the whole suite: reproducible examples, one thread."""

import torch
from hypothesis import settings

settings.register_profile("suite", max_examples=25, deadline=None, derandomize=True, database=None)
settings.load_profile("suite")

# rounding then does not depend on how many cores the machine has
torch.set_num_threads(1)
