"""The draft layer's two attentions over packed pieces of documents, for training at any length.

Pieces lie one after another in one tensor, `lengths` says where each ends, and a query sees keys of
its own piece only. That is the format of the fused kernels: no padding, no mask, and a piece is
computed as if it were alone. The kernel is torch's own FlashAttention for such pieces. It wants a
GPU that has it and half precision; everything else is computed by products of torch.
"""

import sys
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from itertools import accumulate, groupby

import numpy as np
import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import pad, scaled_dot_product_attention

from vllm_longspec.errors import reason

Lengths = tuple[int, ...]  # tokens of each piece; they add up to num_tokens
Shifts = tuple[int, ...]  # of each piece
QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # as `window_attention` takes them
# Causal within a piece, over the last window + 1 keys or (None) over all of them.
Backend = Callable[[QKV, int | None, Lengths], torch.Tensor]


def window_attention(
    query: torch.Tensor,  # [num_tokens, num_heads, head_dim]
    key: torch.Tensor,  # [num_tokens, num_kv_heads, head_dim]
    value: torch.Tensor,  # [num_tokens, num_kv_heads, head_dim]
    window: int,
    lengths: Lengths,
    backend: str | None = None,
) -> torch.Tensor:  # [num_tokens, num_heads, head_dim]
    """Query i of a piece sees the piece's keys i - window ... i."""
    return BACKENDS[backend or choose_backend(query, key)]((query, key, value), window, lengths)


def shifted_attention(
    query: torch.Tensor,  # [num_tokens, num_heads, head_dim]
    key: torch.Tensor,  # [num_tokens, num_kv_heads, head_dim]
    value: torch.Tensor,  # [num_tokens, num_kv_heads, head_dim]
    shift: int | Shifts,
    lengths: Lengths,
    backend: str | None = None,
) -> torch.Tensor:  # [num_tokens, num_heads, head_dim]
    """Query i of a piece sees the piece's keys up to i - shift; the first `shift` give zeros."""
    attend = BACKENDS[backend or choose_backend(query, key)]
    if shift == 0:
        return attend((query, key, value), None, lengths)
    shifts = (shift,) * len(lengths) if isinstance(shift, int) else shift
    queries, keys, left = _shifted_rows(lengths, shifts, query.device)
    if not left:
        return torch.zeros_like(query)
    # Of each piece the queries behind its first `shift` and the keys before its last `shift`: as
    # many of both, and plainly causal.
    out = attend(
        (query.index_select(0, queries), key.index_select(0, keys), value.index_select(0, keys)),
        None,
        left,
    )
    return torch.zeros_like(query).index_copy(0, queries, out)


@lru_cache(maxsize=8)
def _shifted_rows(
    lengths: Lengths, shifts: Shifts, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, Lengths]:  # rows of queries, of keys; pieces they make
    sizes = np.asarray(lengths)
    left, starts = np.maximum(0, sizes - shifts), np.cumsum(sizes) - sizes
    index = np.arange(left.sum()) + np.repeat(starts - (np.cumsum(left) - left), left)
    queries, keys = (
        torch.from_numpy(rows).to(device) for rows in (index + np.repeat(shifts, left), index)
    )
    return queries, keys, tuple(left[left > 0].tolist())


@lru_cache(maxsize=8)
def _bounds(lengths: Lengths, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """Starts [num_pieces + 1] int32 of queries and of keys, the longest piece of both."""
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    return starts, starts, max(lengths), max(lengths)


def choose_backend(query: torch.Tensor, key: torch.Tensor) -> str:
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        return fused_backend(query.dtype, query.shape[1], key.shape[1], query.shape[2])
    return "torch"


@cache
def fused_backend(dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int) -> str:
    """The kernel where it works for these shapes on this GPU; where not, stderr says why."""
    try:
        _try_out(_torch_varlen, dtype, num_heads, num_kv_heads, head_dim)
    except Exception as error:  # an old GPU fails otherwise than a wide head
        print(f"attention: torch-varlen is not used ({reason(error)})", file=sys.stderr)
        return "torch"
    return "torch-varlen"


@torch.enable_grad()
def _try_out(
    attend: Backend, dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int
) -> None:
    for window in (None, 2):
        query, key, value = (
            torch.randn(8, n, head_dim, dtype=dtype, device="cuda", requires_grad=True)
            for n in (num_heads, num_kv_heads, num_kv_heads)
        )
        out = attend((query, key, value), window, (5, 3))
        out.sum().backward()
        expected = _torch((query, key, value), window, (5, 3))
        torch.testing.assert_close(out, expected, atol=0.05, rtol=0.05)


def _torch_varlen(qkv: QKV, window: int | None, lengths: Lengths) -> torch.Tensor:
    qkv = _repeat_heads(qkv)
    # A window over the longest piece is no window; -1 is the kernel's word for that.
    left = -1 if window is None or window >= max(lengths) else window
    query, key, value = (x.contiguous() for x in qkv)
    out = varlen_attn(query, key, value, *_bounds(lengths, query.device), window_size=(left, 0))
    assert isinstance(out, torch.Tensor)  # a tuple only where it is asked for more
    return out


def _torch(qkv: QKV, window: int | None, lengths: Lengths) -> torch.Tensor:
    """Pieces of one length that lie side by side are one batch."""
    outs = []
    for start, rows, length in _runs(lengths):
        q, k, v = (
            x[start : start + rows * length].unflatten(0, (rows, length)).transpose(1, 2)
            for x in qkv
        )  # [rows, heads, length, head_dim]
        if window is None or window >= length - 1:
            out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            out = _folded(q, k, v, window)
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outs)


def _runs(lengths: Lengths) -> Iterator[tuple[int, int, int]]:
    """Of equal neighbours: start in tokens, how many, their length."""
    start = 0
    for length, equal in groupby(lengths):
        rows = sum(1 for _ in equal)
        yield start, rows, length
        start += rows * length


def _folded(
    query: torch.Tensor,  # [rows, num_heads, length, head_dim]
    key: torch.Tensor,  # [rows, num_kv_heads, length, head_dim]
    value: torch.Tensor,
    window: int,
) -> torch.Tensor:  # [rows, num_heads, length, head_dim]
    """In blocks of `window` queries, which see keys of their own block and of the one before."""
    rows, _, length, _ = query.shape
    first = scaled_dot_product_attention(
        query[:, :, :window], key[:, :, :window], value[:, :, :window],
        is_causal=True, enable_gqa=True,
    )  # fmt: skip
    # torch has a fused kernel for a mask and one for grouped heads, none for both.
    query, key, value = _repeat_heads((query, key, value))
    missing = -length % window
    query, key, value = (pad(x, (0, 0, 0, missing)) for x in (query, key, value))
    blocks = query.shape[2] // window - 1

    def fold(x: torch.Tensor) -> torch.Tensor:  # [rows * blocks, heads, tokens, head_dim]
        return x.transpose(1, 2).flatten(0, 1)

    q = fold(query[:, :, window:].unflatten(2, (blocks, window)))
    k, v = (
        fold(x.unfold(2, 2 * window, window).transpose(-1, -2).contiguous()) for x in (key, value)
    )
    index = torch.arange(window, device=query.device)
    distance = index[:, None] + window - torch.arange(2 * window, device=query.device)
    mask = (distance >= 0) & (distance <= window)
    rest = scaled_dot_product_attention(q, k, v, attn_mask=mask)
    rest = rest.unflatten(0, (rows, blocks)).transpose(1, 2).flatten(2, 3)
    return torch.cat([first, rest], dim=2)[:, :, :length]


def _repeat_heads(qkv: QKV) -> QKV:  # heads in dimension 1
    query, key, value = qkv
    group = query.shape[1] // key.shape[1]
    if group == 1:
        return qkv
    return query, key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)


BACKENDS: dict[str, Backend] = {"torch-varlen": _torch_varlen, "torch": _torch}
