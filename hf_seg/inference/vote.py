"""The weighted mean of several networks' class probabilities, and how sure of it they are.

votes = WeightedVotes()
for network, weight in zip(networks, weights):      # weights that add up to 1
    votes.add(network_probs, weight)                 # (..., K, H, W)
votes.choice(), votes.entropy(), votes.disagreement()
"""

import torch
from torch import Tensor

from hf_seg.labels import BACKGROUND

# Of class 0. Minus infinity would become NaN where logits are resized; this is 0 after a softmax too, and half
# precision holds it.
MASKED_LOGIT = -1e4
_LEAST = torch.finfo(torch.float32).tiny  # a probability that has underflowed keeps a finite logarithm


class WeightedVotes:
    """One running sum in float32, whatever the number of networks, and what each of them alone would choose.

    Background never wins. It stays in the sum, so a network counts for less where it sees none of the other classes,
    but no answer holds it.

    Attributes:
        choices: of each network, (..., H, W) uint8 class ids.
    """

    def __init__(self) -> None:
        self.choices: list[Tensor] = []
        self._weights: list[float] = []
        self._sum = torch.empty(0)

    def add(self, probs: Tensor, weight: float) -> None:
        """Take the (..., K, H, W) probabilities of one more network; all weights add up to 1."""
        if not self.choices:
            self._sum = torch.zeros_like(probs, dtype=torch.float32)
        self._sum.add_(probs, alpha=weight)
        self.choices.append(_most_probable(probs))
        self._weights.append(weight)

    def choice(self) -> Tensor:
        """Return the class of the largest mean probability, (..., H, W) uint8."""
        return _most_probable(self._sum)

    def logits(self) -> Tensor:
        """Return the logarithm of the mean probability, (..., K, H, W), and `MASKED_LOGIT` for class 0."""
        logits = self._sum.clamp_min(_LEAST).log()
        logits.select(-3, BACKGROUND).fill_(MASKED_LOGIT)
        return logits

    def entropy(self) -> Tensor:
        """Return -sum_c q_c ln q_c in nats, (..., H, W), 0 (certain) to ln 8 (no idea).

        q is the mean probability of classes 1..8, scaled to a sum of 1.
        """
        mean = _land_cover(self._sum).clamp_min(_LEAST)
        return torch.special.entr(mean / mean.sum(-3, keepdim=True)).sum(-3)

    def disagreement(self) -> Tensor:
        """Return the weight, 0..1, of the networks that alone choose another class than all together; (..., H, W)."""
        winner = self.choice()
        outvoted = torch.zeros_like(winner, dtype=torch.float32)
        for weight, choice in zip(self._weights, self.choices, strict=True):
            outvoted.add_(choice != winner, alpha=weight)
        return outvoted


def _land_cover(probs: Tensor) -> Tensor:
    return probs.narrow(-3, BACKGROUND + 1, probs.shape[-3] - BACKGROUND - 1)


def _most_probable(probs: Tensor) -> Tensor:
    return (_land_cover(probs).argmax(-3) + BACKGROUND + 1).to(torch.uint8)
