"""AdaMSS in NumPy: each row of the weight, its bias behind it, gets the change of its group (NeurIPS 2025)."""

import numpy as np

SETTLED = 1e-4
"""scikit-learn's default: the share of the points' variance that the centers move by in a last round."""


def _change(p):
    change = np.zeros((len(p.adamss_B), p.adamss_newB.shape[1]))
    for group, row, own in zip(*p.adamss_groups, p.adamss_B, strict=True):
        change[row] = own @ p.adamss_A[group] @ p.adamss_newB
    return change


def weight(W, p, variant):
    return W + _change(p)[:, : W.shape[1]]


def bias(b, W, p, variant):
    return b + _change(p)[:, -1]


def count(out, columns, variant):
    rank, groups = min(variant.r, out, columns + 1), min(variant.num_subspaces, out)
    return variant.subspace_rank * (groups * rank + out)


class KMeans:
    """k-means as scikit-learn computes it with these arguments, for PEFT where scikit-learn is not installed."""

    def __init__(self, n_clusters, init, n_init, max_iter, random_state):
        assert (init, n_init) == ("random", 1)
        self.count, self.rounds, self.random = n_clusters, max_iter, np.random.RandomState(random_state)

    def fit_predict(self, points):
        points = np.asarray(points, dtype=np.float64)
        points = points - points.mean(0)
        chosen = self.random.choice(len(points), self.count, replace=False, p=[1 / len(points)] * len(points))
        centers = [points[index] for index in chosen]
        for _ in range(self.rounds):
            nearest = self._nearest(points, centers)
            moved = [points[nearest == number].mean(0) for number in range(self.count)]
            shift = sum(np.sum((new - old) ** 2) for new, old in zip(moved, centers, strict=True))
            centers = moved
            if shift <= SETTLED * points.var(0).mean():
                break
        return self._nearest(points, centers)

    @staticmethod
    def _nearest(points, centers):
        return np.array([np.argmin([np.sum((point - center) ** 2) for center in centers]) for point in points])
