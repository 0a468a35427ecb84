"""Checks the shape annotations of the numerical packages while the tests run."""

import types
import typing

CHECKED = ("jdistill.losses", "jdistill.models", "jdistill.rollout", "jdistill.student")


def install() -> None:
    """Installs jaxtyping's import hook; only modules that are imported afterwards are checked.

    Raises:
        ModuleNotFoundError: jaxtyping or beartype is missing, as in the engines' environments.
    """
    import beartype  # noqa: F401
    import jaxtyping

    jaxtyping.install_import_hook(list(CHECKED), "tests.shapes.check")


def check(function):
    """Decorates `function` with beartype, restricted to the parameters and results annotated by jaxtyping.

    Other annotations stay unchecked: functions refuse a wrong option with a message for users, which tests assert.
    """
    import beartype

    hints = {name: _any_array(hint) for name, hint in function.__annotations__.items() if "jaxtyping" in repr(hint)}
    if not hints:
        return function
    function.__annotations__ = hints
    return beartype.beartype(function)


def _any_array(hint):
    """The hint, where jax.Array admits what JAX converts: NumPy arrays of that shape and dtype, numbers as scalars."""
    import jax
    import numpy as np

    if isinstance(hint, type) and getattr(hint, "array_type", None) is jax.Array:
        arrays = hint.dtype[jax.Array | np.ndarray, hint.dim_str]
        return arrays if hint.dim_str else typing.Union[arrays, bool, int, float]  # noqa: UP007
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.Union[tuple(_any_array(one) for one in typing.get_args(hint))]  # noqa: UP007
    return hint
