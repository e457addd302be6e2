"""Copies from the text itself: the plain version of `draft/lookup.py`'s kernels.

The longest suffix of what is committed is looked up among the earlier tokens; what followed there
is proposed. How probable that is follows from the length of the match, by what was seen.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log

import torch

COPY_DEPTH = 16  # tokens copied
MAX_MATCH = 32  # tokens compared
# Of one token: an eighth to a quarter of such copies are right, and a draft knows those better.
MIN_MATCH = 2
DECAY = 1 - 1 / 64  # of what was seen, for each try: about the last 64 count

# Lengths from which a bucket of match lengths starts. A copied token's length is that of the match
# and the copied tokens before it: over text, tokens first and later in a copy are right as often
# where that sum is the same (4 tokens: 55% and 57%; 16: 86% and 86%).
BUCKETS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32)
# How often copies of each bucket are right before a request has shown it: mean and weight, in
# tries, of a beta-binomial distribution over the 58 held-out texts (code, reports, books) of
# shared/corpus/dev.jsonl.xz in nano's tokens, each counting for at most 64 tries a bucket, by
# likelihood. The weight is capped at 8: requests differ more than these texts do.
PRIOR = (0.40, 0.51, 0.54, 0.60, 0.66, 0.69, 0.72, 0.78, 0.79, 0.83, 0.85)
PRIOR_WEIGHT = (8.0, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0, 3.0, 4.0)


def bucket(length: int) -> int:
    """Of a copied token with `length` tokens before it as they stand before its original."""
    return max(sum(length >= start for start in BUCKETS) - 1, 0)


def longest_match(
    tokens: torch.Tensor,  # [num_tokens] int
) -> tuple[int, int]:
    """(length, position of its last token) of the longest suffix, of at most `MAX_MATCH` tokens,
    that stands earlier, too; the latest of equally long ones; (0, -1) if there is none."""
    last = len(tokens) - 1
    alike = (tokens[:last] == tokens[last]).nonzero().flatten()
    if len(alike) == 0:
        return 0, -1
    length = 1
    while length < MAX_MATCH:
        longer = alike[alike >= length]
        longer = longer[tokens[longer - length] == tokens[last - length]]
        if len(longer) == 0:
            break
        alike, length = longer, length + 1
    return length, int(alike[-1])


def continuation(
    tokens: torch.Tensor,  # [num_tokens] int
    position: int,
) -> list[int]:
    """The `COPY_DEPTH` tokens after `position`; past the end the text goes on as it did: what lies
    between is a period."""
    period = len(tokens) - 1 - position
    return [int(tokens[position + 1 + i % period]) for i in range(COPY_DEPTH)]


@dataclass
class Seen:
    """How often copies were right, by bucket; of one request."""

    hits: torch.Tensor  # [num_buckets] float32, decayed
    tries: torch.Tensor  # [num_buckets] float32, decayed

    @classmethod
    def nothing(cls) -> "Seen":
        return cls(torch.zeros(len(BUCKETS)), torch.zeros(len(BUCKETS)))

    def learn(self, copied: Sequence[int], length: int, committed: Sequence[int]) -> None:
        """Compares a copy after a match of `length` with what was committed instead, at least one
        token, whether or not any of it was verified: hits up to the first miss."""
        hits, tries = torch.zeros_like(self.hits), torch.zeros_like(self.tries)
        for i, (copy, token) in enumerate(zip(copied, committed, strict=False)):
            tries[bucket(length + i)] += 1
            if copy != token:
                break
            hits[bucket(length + i)] += 1
        self.hits = self.hits * DECAY**tries + hits
        self.tries = self.tries * DECAY**tries + tries

    def scores(self, length: int) -> list[float]:
        """Cumulative log-probabilities of the `COPY_DEPTH` tokens after a match of `length`."""
        prior, weight = torch.tensor(PRIOR), torch.tensor(PRIOR_WEIGHT)
        rates = ((self.hits + prior * weight) / (self.tries + weight)).tolist()
        scores, total = [], 0.0
        for i in range(COPY_DEPTH):
            total += log(rates[bucket(length + i)])
            scores.append(total)
        return scores


def expected_copies(scores: Sequence[float]) -> float:
    """The number of tokens of a copy that are right, on average."""
    return sum(exp(score) for score in scores)
