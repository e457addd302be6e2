"""What vLLM calls: options, refusals, the proposer, the model's state, the hooks and patches that
bring them in. Asks of a draft what `draft/protocol.py` says; knows no training or measuring."""
