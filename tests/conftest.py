"""What every test runs under: two CPU devices, no accelerator, no colours."""

import os

# Before JAX is imported, and for the processes that tests start.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "2"
