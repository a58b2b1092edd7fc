"""Matrix factorisation by the library ``implicit``, run by the Python of an environment that holds it.

    python benchmarks/baselines/factors.py als|bpr GIVEN.npz FOUND.npz SEED

GIVEN: ``users``, ``items`` (one entry an interaction), ``shape``. FOUND: ``users`` [n, d], ``items`` [m, d],
float32, whose product scores. Nothing of align3gr is imported. Constants are near the
library's own and hardly tuned.
"""

import sys

import numpy as np
from scipy import sparse


def main(method: str, given: str, found: str, seed: int) -> None:
    """Fit and write the factors."""
    from implicit.als import AlternatingLeastSquares
    from implicit.bpr import BayesianPersonalizedRanking

    with np.load(given) as arrays:
        users, items, shape = arrays["users"], arrays["items"], tuple(arrays["shape"])
    met = sparse.csr_matrix((np.ones(len(users), np.float32), (users, items)), shape=shape)
    met.data[:] = 1.0
    if method == "als":
        model = AlternatingLeastSquares(
            factors=64, regularization=1.0, alpha=5.0, iterations=15, random_state=seed, num_threads=1
        )
    else:
        model = BayesianPersonalizedRanking(
            factors=128,
            learning_rate=0.05,
            regularization=0.02,
            iterations=150,
            random_state=seed,
            num_threads=1,
        )
    model.fit(met, show_progress=False)
    np.savez(found, users=np.asarray(model.user_factors), items=np.asarray(model.item_factors))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
