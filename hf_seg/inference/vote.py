"""The weighted mean of several networks' class probabilities, and how sure of it they are.

accumulator = VoteAccumulator()
for network, weight in zip(networks, weights):            # weights that add up to 1
    accumulator.add(network_probs, weight)                # (..., K, H, W)
accumulator.label_map(), accumulator.confidence(), accumulator.entropy(), accumulator.disagreement()
"""

import torch
from torch import Tensor

from hf_seg.labels import BACKGROUND

# Of class 0. Minus infinity would become NaN where logits are resized; this is 0 after a softmax too, and half
# precision can represent it.
MASKED_LOGIT = -1e4
_LEAST = torch.finfo(torch.float32).tiny  # a probability that has underflowed keeps a finite logarithm


class VoteAccumulator:
    """One running sum in float32, whatever the number of networks, and the label map of each of them alone.

    Background never wins. It stays in the sum, so a network counts for less where it sees none of the other classes.

    Args:
        device: where the sum is kept; None: where the first probabilities are.

    Attributes:
        label_maps: of each network, (..., H, W) uint8 class ids.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.label_maps: list[Tensor] = []
        self._device = device
        self._weights: list[float] = []
        self._sum = torch.empty(0)

    def add(self, probs: Tensor, weight: float = 1.0) -> None:
        """Add the (..., K, H, W) probabilities of one more network; all weights add up to 1."""
        probs = probs.to(self._device or probs.device, torch.float32)
        if self.label_maps:
            self._sum.add_(probs, alpha=weight)
        else:
            self._sum = probs * weight
        self.label_maps.append(_most_probable(probs)[1])
        self._weights.append(weight)

    def probs(self) -> Tensor:
        """Return the mean probabilities, (..., K, H, W) float32."""
        return self._sum

    def label_map(self) -> Tensor:
        """Return the class of the largest mean probability, (..., H, W) uint8."""
        return _most_probable(self._sum)[1]

    def confidence(self) -> Tensor:
        """Return the mean probability of that class, (..., H, W) float32."""
        return _most_probable(self._sum)[0]

    def logits(self) -> Tensor:
        """Return the logarithm of the mean probability, (..., K, H, W), and `MASKED_LOGIT` for class 0."""
        logits = self._sum.clamp_min(_LEAST).log()
        logits.select(-3, BACKGROUND).fill_(MASKED_LOGIT)
        return logits

    def entropy(self) -> Tensor:
        """Return -sum_c q_c ln q_c in nats, (..., H, W): 0 if certain, ln K if uniform over K classes.

        q is the mean probability of the classes from 1 up, scaled to a sum of 1.
        """
        mean = _land_cover(self._sum).clamp_min(_LEAST)
        return torch.special.entr(mean / mean.sum(-3, keepdim=True)).sum(-3)

    def disagreement(self) -> Tensor:
        """Return the weight, 0..1, of the networks that alone choose another class than all together; (..., H, W)."""
        winner = self.label_map()
        outvoted = torch.zeros_like(winner, dtype=torch.float32)
        for weight, label_map in zip(self._weights, self.label_maps, strict=True):
            outvoted.add_(label_map != winner, alpha=weight)
        return outvoted


def _land_cover(probs: Tensor) -> Tensor:
    return probs.narrow(-3, BACKGROUND + 1, probs.shape[-3] - BACKGROUND - 1)


def _most_probable(probs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest probability of a land-cover class, and the class as uint8; (..., H, W) each."""
    largest, index = _land_cover(probs).max(-3)
    return largest, (index + BACKGROUND + 1).to(torch.uint8)
