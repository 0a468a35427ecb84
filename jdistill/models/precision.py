"""Which parameters are cast to the compute dtype ahead of use, and which stay float32."""

from __future__ import annotations

from typing import Any

import jax


def cast_params(params: Any, dtype: jax.typing.DTypeLike) -> Any:
    """Casts parameters to `dtype`, except the scales of norms, which keep theirs.

    The decoder casts a weight to its compute dtype at use, so casting it earlier changes no number. It multiplies the
    scales of norms in float32 whatever its compute dtype, so casting those would.

    Args:
        params: a pytree whose paths hold the parameters' names (`decoder.param_specs`): a decoder's state, or
            `Decoder.unstacked()`.
        dtype: the decoder's compute dtype.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x if "norm" in jax.tree_util.keystr(path) else x.astype(dtype), params
    )
