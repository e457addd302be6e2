"""What proposes: drafts that grow trees, their checkpoints; the LongSpec layer is the first kind
(`protocol.py` says what one has to do). Does not know the proposer or vLLM's runner hooks."""
