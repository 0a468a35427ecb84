"""Comparisons whose bounds follow the size and the dtype of what is compared."""

import numpy as np


def assert_close(got, expected, *, factor, scale=None, dtype="float32", err_msg=""):
    """Checks |got - expected| <= factor * eps(dtype) * scale, elementwise.

    Rounding errors of a sum grow with its terms, not with its value: where terms cancel, a bound relative to each value
    is too narrow on another processor, and an absolute one is too narrow for large numbers or too wide for small ones.

    Args:
        got: an array, or anything that NumPy takes for one.
        expected: of the same shape, or one number for all elements.
        factor: roundings allowed, in units of the dtype's eps: about the number of operations along the longest path.
        scale: size of the terms; None: the largest finite absolute value of `expected`.
        dtype: in which `got` was computed, by NumPy's name, or "bfloat16".
        err_msg: printed on failure.
    """
    eps = 2.0**-7 if dtype == "bfloat16" else float(np.finfo(dtype).eps)
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert expected.shape in ((), got.shape), f"{err_msg}: shape {got.shape}, expected {expected.shape}"
    if scale is None:
        finite = np.abs(expected[np.isfinite(expected)])
        scale = finite.max() if finite.size else 0.0
    np.testing.assert_allclose(got, expected, rtol=0, atol=factor * eps * float(scale), err_msg=err_msg)
