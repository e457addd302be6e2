"""Cross entropy through the frozen head, without the logits of all tokens at once."""

from typing import Any

import torch
from torch.nn.functional import linear

IGNORED = -100
MAX_LOGITS = 1 << 27  # at once: 512 MiB in float32


def head_loss(
    hidden: torch.Tensor,  # [num_tokens, hidden_size]
    head: torch.Tensor,  # [vocab_size, hidden_size] frozen
    labels: torch.Tensor,  # [num_tokens] int64, IGNORED where there is none
    target_hidden: torch.Tensor | None = None,  # [num_tokens, hidden_size]
) -> torch.Tensor:
    """Sum over tokens of the cross entropy: to the labels; or, with `target_hidden`, to the
    target's own next-token distributions."""
    hidden = hidden.to(head.dtype)
    logits_at_once = MAX_LOGITS if target_hidden is None else MAX_LOGITS // 2
    chunk = max(1, logits_at_once // head.shape[0])
    return ChunkedHeadLoss.apply(hidden, head, labels, target_hidden, chunk)


class ChunkedHeadLoss(torch.autograd.Function):
    """The gradient is made beside the loss, chunk by chunk, so that no logits are kept for it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: torch.Tensor,
        labels: torch.Tensor,
        target_hidden: torch.Tensor | None,
        chunk: int,
    ) -> torch.Tensor:
        wants_gradient = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if wants_gradient else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            logits = linear(hidden[rows], head).float()
            label = labels[rows, None]
            counts = label != IGNORED
            label = label.where(counts, 0)
            normaliser = logits.logsumexp(-1, keepdim=True)
            if target_hidden is None:
                wanted = None
                expected = logits.gather(1, label)
            else:
                wanted = linear(target_hidden[rows], head).float().softmax(-1)
                expected = torch.einsum("tv,tv->t", wanted, logits)[:, None]
            loss += ((normaliser - expected) * counts).sum()
            if gradient is not None:
                logits.sub_(normaliser).exp_()
                if wanted is None:
                    logits.scatter_add_(1, label, torch.full_like(normaliser, -1))
                else:
                    logits.sub_(wanted)
                logits.mul_(counts)
                gradient[rows] = logits.to(head.dtype) @ head
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_output.to(gradient.dtype), None, None, None, None


@torch.no_grad()
def most_probable(
    hidden: torch.Tensor,  # [num_tokens, hidden_size]
    head: torch.Tensor,  # [vocab_size, hidden_size]
) -> torch.Tensor:  # [num_tokens] int64
    chunks = hidden.to(head.dtype).split(max(1, MAX_LOGITS // head.shape[0]))
    return torch.cat([linear(chunk, head).argmax(-1) for chunk in chunks])
