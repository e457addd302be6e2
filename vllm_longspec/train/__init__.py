"""Makes a draft: its layer in transformers, the data, the objective, the loop. Knows of serving
only the checkpoint that it hands over, and nothing of vLLM."""
