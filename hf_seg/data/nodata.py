"""The collar of zeros around a SAR swath: zeros connected with the border of the scene, found in bounded memory.

One pass over bands of rows labels each band's zeros by themselves and remembers which components touch the band's
edge; a graph of those tells which hang together, and with the border. Of each band no more than that is kept.
"""

from collections.abc import Iterable

import numpy as np
from scipy.ndimage import label as label_components
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

OUTSIDE, NOWHERE = 0, -1  # the node of all that lies outside the scene; a pixel that belongs to no node


class ZeroCollar:
    """Zeros from which the border of the scene can be reached through zeros, in steps to the four neighbours.

    Zeros inside the swath (calm water, radar shadow) are not among them.

    Args:
        bands: (rows, width) bool arrays, True where a pixel is zero, which stacked from top to bottom are the scene.
    """

    def __init__(self, bands: Iterable[np.ndarray]) -> None:
        self._labels: list[np.ndarray] = []  # per band, the labels of its components that touch its edge, ascending
        self._first_nodes: list[int] = []  # per band, the node of the first of them; the others follow
        links: list[np.ndarray] = []
        number_of_nodes = 1
        above: np.ndarray | None = None
        for zeros in bands:
            labels = _label(zeros)
            edges = [labels[0], labels[-1], labels[:, 0], labels[:, -1]]
            touching = np.setdiff1d(np.concatenate(edges), [0])
            top, bottom, left, right = (
                np.where(edge > 0, number_of_nodes + np.searchsorted(touching, edge), NOWHERE) for edge in edges
            )
            outside = np.full_like(top, OUTSIDE)
            links += [_links(outside if above is None else above, top), _links(np.full_like(left, OUTSIDE), left)]
            links.append(_links(np.full_like(right, OUTSIDE), right))
            self._labels.append(touching)
            self._first_nodes.append(number_of_nodes)
            number_of_nodes += len(touching)
            above = bottom
        if above is not None:
            links.append(_links(above, np.full_like(above, OUTSIDE)))
        ends = np.concatenate([np.zeros((2, 0), np.int64), *links], axis=1)
        graph = coo_array((np.ones(ends.shape[1], bool), (ends[0], ends[1])), shape=(number_of_nodes,) * 2)
        component = connected_components(graph, directed=False)[1]
        self._is_collar = component == component[OUTSIDE]

    def mask(self, band: int, zeros: np.ndarray) -> np.ndarray:
        """Find the collar in one band.

        Args:
            band: its number.
            zeros: (rows, width) bool, as it was when the collar was built.

        Returns:
            (rows, width) bool, True on the collar.
        """
        touching, first = self._labels[band], self._first_nodes[band]
        collar = touching[self._is_collar[first : first + len(touching)]]
        if not len(collar):
            return np.zeros_like(zeros)
        labels = _label(zeros)
        is_collar = np.zeros(labels.max() + 1, dtype=bool)
        is_collar[collar] = True
        return is_collar[labels]


def _label(zeros: np.ndarray) -> np.ndarray:
    """Number the components of (rows, width) bool; int32, 0 where there is none."""
    return label_components(zeros)[0] if zeros.any() else np.zeros(zeros.shape, np.int32)


def _links(nodes: np.ndarray, neighbours: np.ndarray) -> np.ndarray:
    """Return the different pairs of nodes that lie beside each other; (2, n) int64."""
    pairs = np.stack([nodes, neighbours])
    return np.unique(pairs[:, (pairs != NOWHERE).all(axis=0)], axis=1)
