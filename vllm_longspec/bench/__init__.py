"""What LongSpec costs and gains: a cycle, a start, a training step, tokens per second. Starts vLLM
from outside, as users do; only `probe.py` looks inside its worker, to time it."""
