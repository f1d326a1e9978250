"""What holds for every test: where kernels run, and that no time decides."""

import os

import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "slow machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("slow machine")

# Without a GPU, Triton's interpreter runs the kernels; it must be chosen before Triton loads.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
