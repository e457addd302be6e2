"""What accepts: hybrid attention, sampling and walking, moving what was accepted, and the trees'
state on the device. Knows vLLM and what a tree is, but no draft."""
