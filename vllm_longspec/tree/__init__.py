"""The tree as plain tensors: its shape, how it grows, is pruned, walked, and what it costs. Knows
neither vLLM nor a draft.

Node 0 is the root: the newest committed token. Nodes 1 ... m follow in level order, so a parent
always precedes its children and any prefix of the nodes is a tree. A node at depth d stands at
position n + d, n being the root's position.
"""
