"""Pixels outside a SAR swath: zeros connected with the border of the image (the "collar"), in bounded memory.

Zeros inside the swath (calm water, radar shadow) are data. The image is read once, in bands of rows. In each band the
connected components of zeros are labelled; those that touch the band's edge become nodes of a graph, whose connected
components tell which of them reach the border of the image. Only these labels are kept in memory.
"""

from collections.abc import Iterable

import numpy as np

OUTSIDE = 0  # node of everything outside the image
NO_NODE = -1  # pixel that belongs to no node


def outside_swath(sar: np.ndarray) -> np.ndarray:
    """Return (H, W) bool, True outside the SAR swath.

    Args:
        sar: (H, W) uint8, of which zeros connected with the border are outside; or (H, W, bands) uint8 of
            `hf_seg.bands`, where 0 in all bands says that there is no data.
    """
    if sar.ndim == 3:
        return (sar == 0).all(axis=2)
    zeros = sar == 0
    return ZeroCollar([zeros]).mask(0, zeros)


class ZeroCollar:
    """The zeros that are connected with the border of an image (4-connectivity).

    Args:
        bands: (rows, width) bool arrays from top to bottom, True where a pixel is zero.
    """

    def __init__(self, bands: Iterable[np.ndarray]) -> None:
        self._labels: list[np.ndarray] = []  # per band, the labels of its components that touch its edge, ascending
        self._first_nodes: list[int] = []  # per band, the node of the first of them; the others follow
        links: list[np.ndarray] = []
        number_of_nodes = 1
        above: np.ndarray | int = OUTSIDE
        for zeros in bands:
            labels = _label(zeros)
            edges = [labels[0], labels[-1], labels[:, 0], labels[:, -1]]
            touching = np.setdiff1d(np.concatenate(edges), [0])
            top, bottom, left, right = (
                np.where(edge > 0, number_of_nodes + np.searchsorted(touching, edge), NO_NODE) for edge in edges
            )
            links += [_links(above, top), _links(OUTSIDE, left), _links(OUTSIDE, right)]
            self._labels.append(touching)
            self._first_nodes.append(number_of_nodes)
            number_of_nodes += len(touching)
            above = bottom
        ends = np.concatenate([*links, _links(OUTSIDE, above)], axis=1)
        self._is_collar = np.ones(number_of_nodes, bool)
        if number_of_nodes == 1:  # no zeros at an edge
            return
        from scipy.sparse import coo_array  # slow to import, and most images have no collar
        from scipy.sparse.csgraph import connected_components

        graph = coo_array((np.ones(ends.shape[1], bool), (ends[0], ends[1])), shape=(number_of_nodes,) * 2)
        component = connected_components(graph, directed=False)[1]
        self._is_collar = component == component[OUTSIDE]

    def mask(self, band: int, zeros: np.ndarray) -> np.ndarray:
        """Return (rows, width) bool, True on the collar; for a band's index, and `zeros` as the constructor got it."""
        touching, first = self._labels[band], self._first_nodes[band]
        collar = touching[self._is_collar[first : first + len(touching)]]
        return np.isin(_label(zeros), collar) if len(collar) else np.zeros_like(zeros)


def _label(zeros: np.ndarray) -> np.ndarray:
    """Label the connected components of (rows, width) bool; int32, 0 on the background."""
    if not zeros.any():
        return np.zeros(zeros.shape, np.int32)
    from scipy.ndimage import label as label_components  # slow to import

    return label_components(zeros)[0]


def _links(nodes: np.ndarray | int, neighbours: np.ndarray | int) -> np.ndarray:
    """Return the distinct pairs of adjacent nodes; (2, n) int64."""
    pairs = np.stack(np.broadcast_arrays(nodes, np.atleast_1d(neighbours)))
    return np.unique(pairs[:, (pairs != NO_NODE).all(axis=0)], axis=1)
