"""Packed attentions and the chunked loss against oracles that spell out every mask and logit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_longspec.train import loss as loss_module
from vllm_longspec.train.attention import shifted_attention, window_attention
from vllm_longspec.train.loss import IGNORED, ChunkedHeadLoss, most_probable

pieces = st.lists(st.integers(1, 40), min_size=1, max_size=6).map(tuple)
heads = st.sampled_from([(1, 1), (4, 2), (6, 3), (4, 1)])


def oracle(qkv: list[torch.Tensor], lengths: tuple[int, ...], first: int, last):
    """Query i sees keys i - first ... i - last of its piece; `last` for all or [num_tokens, 1]."""
    query, key, value = qkv
    piece = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    index = torch.arange(len(piece))
    distance = index[:, None] - index[None]
    mask = (piece[:, None] == piece[None]) & (distance >= last) & (distance <= first)
    mask = mask.to(query.device)
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * query.shape[-1] ** -0.5
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1).nan_to_num(0)
    return torch.einsum("hqk,khd->qhd", weights, value)


def random_qkv(
    num_tokens: int, heads: tuple[int, int], seed: int, dim: int = 8
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(num_tokens, n, dim, generator=generator) for n in (*heads, heads[1])]


def agree(function, qkv: list[torch.Tensor], *oracle_arguments) -> None:
    ours = [x.clone().requires_grad_() for x in qkv]
    theirs = [x.clone().requires_grad_() for x in qkv]
    out, expected = function(*ours), oracle(theirs, *oracle_arguments)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
    for tensors, result in ((ours, out), (theirs, expected)):
        if result.requires_grad:
            (result * upstream).sum().backward()
        for x in tensors:
            x.grad = torch.zeros_like(x) if x.grad is None else x.grad
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4)


@given(pieces, heads, st.integers(1, 45), st.integers(0, 1000))
def test_window(lengths: tuple[int, ...], heads: tuple[int, int], window: int, seed: int) -> None:
    agree(
        lambda q, k, v: window_attention(q, k, v, window, lengths),
        random_qkv(sum(lengths), heads, seed), lengths, window, 0,
    )  # fmt: skip


@given(pieces, heads, st.integers(0, 6), st.integers(0, 1000))
def test_shift(lengths: tuple[int, ...], heads: tuple[int, int], shift: int, seed: int) -> None:
    agree(
        lambda q, k, v: shifted_attention(q, k, v, shift, lengths),
        random_qkv(sum(lengths), heads, seed), lengths, 10**9, shift,
    )  # fmt: skip


@given(pieces, heads, st.lists(st.integers(1, 6), min_size=6, max_size=6), st.integers(0, 1000))
def test_shift_by_piece(
    lengths: tuple[int, ...], heads: tuple[int, int], drawn: list[int], seed: int
) -> None:
    shifts = tuple(drawn[: len(lengths)])
    by_token = torch.repeat_interleave(torch.tensor(shifts), torch.tensor(lengths))[:, None]
    agree(
        lambda q, k, v: shifted_attention(q, k, v, shifts, lengths),
        random_qkv(sum(lengths), heads, seed), lengths, 10**9, by_token,
    )  # fmt: skip


class Largest(TorchDispatchMode):
    """The most elements that any tensor made meanwhile has, forward and backward."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


def test_a_long_window_needs_no_square_of_the_length() -> None:
    length, window = 16_384, 256
    qkv = [torch.randn(length, 1, 8, requires_grad=True) for _ in range(3)]
    at = torch.arange(10_000, 10_010)
    with Largest() as largest:
        out = window_attention(*qkv, window, (length,))
        out.sum().backward()
    assert largest.elements <= 2 * length * window
    out, qkv = out.detach()[at], [x.detach() for x in qkv]
    kept = slice(10_000 - window, 10_010)
    expected = oracle([x[kept] for x in qkv], (window + 10,), window, 0)[window:]
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("backend", ["torch-varlen", "torch"])
@pytest.mark.parametrize("lengths", [(1,), (3, 700, 1, 2, 333), (2, 2, 2), (1024, 1024)])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
def test_fused_kernels(backend: str, lengths: tuple[int, ...], heads: tuple[int, int]) -> None:
    exact = [x.cuda() for x in random_qkv(sum(lengths), heads, 0, dim=64)]
    upstream = torch.randn_like(exact[0])
    for kind, amount in (("window", 128), ("window", 5000), ("shift", 0), ("shift", 3),
                         ("shift", tuple(1 + i % 4 for i in range(len(lengths))))):  # fmt: skip
        results = []
        for dtype, backend_used in ((torch.bfloat16, backend), (torch.float32, None)):
            qkv = [x.to(torch.bfloat16).to(dtype).requires_grad_() for x in exact]
            if backend_used is None:
                last = 0 if kind == "window" else amount
                if isinstance(last, tuple):
                    last = torch.repeat_interleave(torch.tensor(last), torch.tensor(lengths))
                    last = last[:, None]
                first = amount if kind == "window" else 10**9
                out = oracle(qkv, lengths, first, last)
            else:
                function = window_attention if kind == "window" else shifted_attention
                out = function(*qkv, amount, lengths, backend=backend_used)
            if out.requires_grad:
                (out.float() * upstream).sum().backward()
            grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in qkv]
            results.append([x.float() for x in (out, *grads)])
        for got, expected in zip(*results, strict=True):
            scale = expected.abs().max().clamp(min=1)
            assert float((got - expected).abs().max() / scale) < 0.02, (kind, amount)


@given(
    st.integers(1, 50), st.integers(2, 60), st.integers(1, 60), st.floats(0, 1),
    st.integers(0, 1000),
)  # fmt: skip
def test_chunked_loss(tokens: int, vocab: int, chunk: int, ignored: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, 6, generator=generator)
    head = torch.randn(vocab, 6, generator=generator)
    labels = torch.randint(vocab, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < ignored] = IGNORED
    ours, theirs = (hidden.clone().requires_grad_() for _ in range(2))
    loss = ChunkedHeadLoss.apply(ours, head, labels, None, chunk)
    expected = cross_entropy(theirs @ head.T, labels, ignore_index=IGNORED, reduction="sum")
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-4)
    (loss * 0.3).backward()
    (expected * 0.3).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4)

    target_hidden = torch.randn(tokens, 6, generator=generator)
    ours, theirs = (hidden.clone().requires_grad_() for _ in range(2))
    loss = ChunkedHeadLoss.apply(ours, head, labels, target_hidden, chunk)
    wanted = (target_hidden @ head.T).softmax(-1)
    each = cross_entropy(theirs @ head.T, wanted, reduction="none")
    expected = each[labels != IGNORED].sum()
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-4)
    (loss * 0.3).backward()
    (expected * 0.3).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4)


def test_the_loss_of_long_text_makes_no_logits_of_all_tokens(monkeypatch) -> None:
    monkeypatch.setattr(loss_module, "MAX_LOGITS", 40_000)
    hidden, head = torch.randn(3000, 6, requires_grad=True), torch.randn(1000, 6)
    with Largest() as largest:
        loss_module.head_loss(hidden, head, torch.randint(1000, (3000,))).backward()
    assert 20_000 < largest.elements <= 40_000


def test_most_probable_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "MAX_LOGITS", 130)
    hidden, head = torch.randn(37, 6), torch.randn(50, 6)
    assert torch.equal(most_probable(hidden, head), (hidden @ head.T).argmax(-1))
