"""Several networks are averaged by their weights, and background never wins."""

import math

import torch
from torch import Tensor

from hf_seg.inference.vote import VoteAccumulator
from hf_seg.labels import OPEN_EARTH_MAP


def one_hot(*classes: int) -> Tensor:
    """(3, 1, n) probabilities, certain of one class a pixel."""
    return torch.nn.functional.one_hot(torch.tensor([classes]), 3).permute(2, 0, 1).float()


def accumulate(*probs: Tensor, weights: tuple[float, ...] | None = None) -> VoteAccumulator:
    accumulator = VoteAccumulator()
    for each, weight in zip(probs, weights or (1 / len(probs),) * len(probs), strict=True):
        accumulator.add(each, weight)
    return accumulator


def test_the_label_is_the_class_of_the_largest_mean_probability() -> None:
    probs = [torch.rand(9, 6, 5, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    accumulator, mean = accumulate(*probs), torch.stack(probs).mean(0)
    assert accumulator.label_map().dtype == torch.uint8
    assert torch.equal(accumulator.label_map().long(), mean[1:].argmax(0) + 1)
    torch.testing.assert_close(accumulator.confidence(), mean[1:].amax(0))
    torch.testing.assert_close(accumulator.probs(), mean)


def test_one_network_alone_keeps_its_bits() -> None:
    probs = torch.rand(9, 6, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(accumulate(probs).probs(), probs)


def test_networks_disagree_where_any_chooses_another_class() -> None:
    accumulator = accumulate(*(one_hot(*classes) for classes in ((1, 1, 2), (1, 2, 2), (1, 1, 2))))
    torch.testing.assert_close(accumulator.disagreement(), torch.tensor([[0, 1 / 3, 0]]))
    assert accumulator.label_map().tolist() == [[1, 1, 2]]
    assert [each.tolist() for each in accumulator.label_maps] == [[[1, 1, 2]], [[1, 2, 2]], [[1, 1, 2]]]
    torch.testing.assert_close(accumulator.confidence(), torch.tensor([[1, 2 / 3, 1]]))


def test_background_never_wins() -> None:
    accumulator = accumulate(one_hot(0, 0))  # all that is left for the others is 0
    assert accumulator.label_map().tolist() == [[1, 1]] and accumulator.confidence().tolist() == [[0, 0]]


def test_the_probabilities_given_are_left_alone() -> None:
    probs = one_hot(1, 2)
    accumulate(probs, one_hot(2, 2))
    assert torch.equal(probs, one_hot(1, 2))


def test_uncertainty_stays_within_its_bounds() -> None:
    generator, weights = torch.Generator().manual_seed(0), (0.2, 0.3, 0.5)
    probs = [(8 * torch.randn(OPEN_EARTH_MAP.num_labels, 50, 50, generator=generator)).softmax(0) for _ in weights]
    accumulator = accumulate(*probs, weights=weights)
    entropy, disagreement = accumulator.entropy(), accumulator.disagreement()
    assert entropy.min() >= 0 and entropy.max() <= math.log(OPEN_EARTH_MAP.num_labels - 1) + 1e-6
    assert disagreement.min() == 0 and disagreement.max() <= 1
    assert set(disagreement.mul(10).round().int().unique().tolist()) <= {0, 2, 3, 5, 7, 8, 10}
    winner = accumulator.label_map()
    agreeing = sum(w * (each == winner) for w, each in zip(weights, accumulator.label_maps, strict=True))
    torch.testing.assert_close(disagreement, 1 - agreeing)
