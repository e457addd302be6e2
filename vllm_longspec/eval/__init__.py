"""How good a draft is: acceptance lengths and the paper's protocols, in engines, over servers and
without either. Starts vLLM from outside, as users do, and knows nothing of what serves a draft."""
