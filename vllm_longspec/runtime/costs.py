"""What a step costs on this GPU, measured once the CUDA graphs exist, and kept for the next start.

A step is the target's forward over 1 + m rows a request, the head and sampling of all rows, and the
proposal of the next tree. Its time grows with the tokens in the cache by what attention reads; that
is measured at two lengths.
"""

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from vllm import envs
from vllm.logger import init_logger

logger = init_logger("vllm.longspec")

FORMAT = 1


@dataclass(frozen=True)
class Curve:
    """Milliseconds of one kind of graph by the number of requests."""

    batches: tuple[int, ...]  # measured, ascending
    milliseconds: tuple[float, ...]  # with next to no context
    per_token: float  # more for each token of context, of the whole batch

    def at(self, num_reqs: int, num_context: int) -> float:
        return float(
            np.interp(num_reqs, self.batches, self.milliseconds) + self.per_token * num_context
        )


@dataclass(frozen=True)
class Costs:
    """Of the plans of one engine; plan -1 is plain decoding."""

    nodes: tuple[int, ...]  # verified by each plan
    target: Mapping[int, Curve]  # by rows a request
    proposals: tuple[Curve, ...]  # of each plan
    # Head and sampling: of any number of rows, and of each row.
    sampling: tuple[float, float] = (0.0, 0.0)

    def of_batch(self, num_reqs: int) -> tuple[np.ndarray, np.ndarray]:
        """Milliseconds of a step with each plan, the last one plain decoding: [plans + 1] without
        context, and [plans + 1] more for each token of context."""
        base, per_token = np.zeros((2, len(self.nodes) + 1))
        fixed, of_a_row = self.sampling
        for plan in range(-1, len(self.nodes)):
            rows = 1 if plan < 0 else 1 + self.nodes[plan]
            curves = [self.target[rows], *([self.proposals[plan]] if plan >= 0 else [])]
            base[plan] = fixed + of_a_row * rows * num_reqs
            base[plan] += sum(curve.at(num_reqs, 0) for curve in curves)
            per_token[plan] = sum(curve.per_token for curve in curves)
        return base, per_token


def to_json(costs: Costs) -> dict[str, Any]:
    return asdict(costs)


def from_json(read: Mapping[str, Any]) -> Costs:
    """Raises KeyError, TypeError or ValueError for what `to_json` never wrote."""

    def curve(values: Mapping[str, Any]) -> Curve:
        made = Curve(
            tuple(int(batch) for batch in values["batches"]),
            tuple(float(ms) for ms in values["milliseconds"]),
            float(values["per_token"]),
        )
        numbers = [*made.milliseconds, made.per_token]
        if not made.batches or len(made.batches) != len(made.milliseconds):
            raise ValueError("a curve without points")
        if list(made.batches) != sorted(set(made.batches)):
            raise ValueError("batch sizes that do not rise")
        if not np.isfinite(numbers).all() or min(made.milliseconds) <= 0 or made.per_token < 0:
            raise ValueError("a time that is none")
        return made

    fixed, of_a_row = (float(ms) for ms in read["sampling"])
    if not np.isfinite([fixed, of_a_row]).all() or min(fixed, of_a_row) < 0:
        raise ValueError("a time of sampling that is none")
    costs = Costs(
        tuple(int(m) for m in read["nodes"]),
        {int(rows): curve(values) for rows, values in read["target"].items()},
        tuple(curve(values) for values in read["proposals"]),
        (fixed, of_a_row),
    )
    if len(costs.proposals) != len(costs.nodes):
        raise ValueError("plans without a proposal")
    if not {1, *(1 + m for m in costs.nodes)} <= set(costs.target):
        raise ValueError("plans without a verification")
    return costs


def cost_file(of_what: Mapping[str, Any]) -> Path:
    """Where the costs of an engine lie: `of_what` names everything that they depend on."""
    name = hashlib.sha256(json.dumps(of_what, sort_keys=True).encode()).hexdigest()[:16]
    return Path(envs.VLLM_CACHE_ROOT) / "longspec" / f"costs-{name}.json"


def read_costs(file: Path, of_what: Mapping[str, Any]) -> Costs | None:
    """None where there are none to use: never measured, of another engine, damaged."""
    try:
        read = json.loads(file.read_text())
        if read["format"] != FORMAT or read["of"] != json.loads(json.dumps(of_what)):
            raise ValueError("it is of another version or engine")
        return from_json(read["costs"])
    except FileNotFoundError:
        return None
    # Of what anybody may have written there; other ranks wait for an answer.
    except (OSError, LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        logger.warning("LongSpec: costs are measured anew, %s cannot be used: %s", file, error)
        return None


def write_costs(file: Path, of_what: Mapping[str, Any], costs: Costs) -> None:
    """Whole or not at all; a folder that cannot be written costs a warning and the next start's
    seconds."""
    text = json.dumps({"format": FORMAT, "of": of_what, "costs": to_json(costs)})
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as out:
            partial = Path(out.name)
            try:
                out.write(text)
                out.close()
                partial.chmod(0o644)  # a cache folder may be shared
                partial.replace(file)
            except OSError:
                partial.unlink()
                raise
    except OSError as error:
        logger.warning(
            "LongSpec: the measured costs cannot be kept (%s); every start measures them", error
        )


def sizes_to_time(batches: Sequence[int]) -> list[int]:
    """Of batch sizes that have a graph, ascending, those to time; a curve joins them."""
    timed: list[int] = []
    for batch in batches:
        if not timed or batch >= 1.4 * timed[-1] or batch == batches[-1]:
            timed.append(batch)
    return timed
