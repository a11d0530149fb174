"""How far the logits of a side are from those of PyTorch in float32."""

from __future__ import annotations

from typing import Any

import numpy as np


def divergence(reference_NV: np.ndarray[Any, Any], other_NV: np.ndarray[Any, Any]) -> dict[str, float]:
    """Return mean and greatest KL(reference ‖ other) of the next-token distributions in nats, and top-1 agreement.

    Args:
        reference_NV: Logits of N positions over V tokens.
        other_NV: The same of another side.
    """
    assert reference_NV.shape == other_NV.shape
    kl_N, is_same_N = [], []
    for reference_V, other_V in zip(reference_NV, other_NV, strict=True):
        log_p, log_q = _log_softmax(reference_V), _log_softmax(other_V)
        kl_N.append(float((np.exp(log_p) * (log_p - log_q)).sum()))
        is_same_N.append(bool(log_p.argmax() == log_q.argmax()))
    return {
        "mean_kl": float(np.mean(kl_N)),
        "max_kl": max(kl_N),
        "top1": float(np.mean(is_same_N)),
        "positions": len(kl_N),
    }


def _log_softmax(logits_V: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    shifted = logits_V.astype(np.float64) - logits_V.max()
    log_p: np.ndarray[Any, Any] = shifted - np.log(np.exp(shifted).sum())
    return log_p
