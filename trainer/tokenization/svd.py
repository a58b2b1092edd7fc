"""Truncated SVD of a sparse matrix, the same for the same input, whatever its rank.

Randomised range finder with power iterations (Halko, Martinsson & Tropp, SIAM Review 2011, alg. 4.4), its
random matrix from a fixed seed. ARPACK would start again at random where singular values coincide or vanish.
"""

import numpy as np
import numpy.typing as npt
from scipy import sparse

Floats = npt.NDArray[np.float64]

OVERSAMPLING = 16
POWER_ITERATIONS = 8
"""Errors fall with the 17th power of the ratio of the first left-out singular value to each kept one."""


def truncated_svd(matrix: sparse.csr_matrix, rank: int) -> tuple[Floats, Floats, Floats]:
    """(left [n, r], singular [r] falling, right [r, m]), r <= ``rank``: the numerically non-zero ones.

    The largest entry of every left vector is positive, so signs are fixed too.
    """
    n, m = matrix.shape
    width = min(rank + OVERSAMPLING, n, m)
    random = np.random.default_rng(0)
    basis, _ = np.linalg.qr(matrix @ random.standard_normal((m, width)))
    for _ in range(POWER_ITERATIONS):
        back, _ = np.linalg.qr(matrix.T @ basis)
        basis, _ = np.linalg.qr(matrix @ back)
    inner, singular, right = np.linalg.svd((matrix.T @ basis).T, full_matrices=False)
    kept = min(rank, int((singular > 1e-10 * max(float(singular[0]), 1e-300)).sum()))
    left, singular, right = (basis @ inner)[:, :kept], singular[:kept], right[:kept]
    signs = np.sign(left[np.abs(left).argmax(axis=0), np.arange(kept)])
    return left * signs, singular, right * signs[:, None]
