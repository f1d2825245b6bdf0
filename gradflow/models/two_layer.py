"""A network with one hidden layer."""

from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._checks import check_ndim

_ACTIVATIONS = {
    "tanh": jnp.tanh,
    "erf": lambda u: jax.lax.erf(u * 0.5**0.5),
    "relu": jax.nn.relu,
}


class TwoLayer(eqx.Module):
    """f(x) = Σⱼ aⱼ φ(⟨wⱼ, x⟩ + bⱼ), φ = tanh, erf(·/√2) or the ReLU.

    tanh and erf are smooth, as the theory asks; of erf there are closed forms where
    inputs are Gaussian, see [`gradflow.PopulationError`][]. The ReLU is not: the flow
    slides along the kinks where a neuron's preactivation is zero at a data point.

    **Arguments:**

    - `inner`: the hidden weights, row j is wⱼ, of shape (h, d). With d = 1 the network
        takes scalars too.
    - `bias`: b, of shape (h,), or `None` for a network without.
    - `outer`: a, of shape (h,) for a scalar output, (k, h) for k outputs.
    - `activation`: `"tanh"`, `"erf"` or `"relu"`.

    **Raises:** `ValueError` where the shapes do not fit, or for another activation.
    """

    inner: Float[Array, "*batch h d"]
    bias: Float[Array, "*batch h"] | None
    outer: Float[Array, "*batch_k h"]
    activation: Literal["tanh", "erf", "relu"] = eqx.field(static=True, default="tanh")

    def __check_init__(self):
        check_ndim(self.inner, "inner", 2)
        check_ndim(self.outer, "outer", (1, 2))
        width = self.inner.shape[0]
        if self.bias is not None and self.bias.shape != (width,):
            raise ValueError(
                f"bias: expected shape ({width},) as inner has {width} rows, got "
                f"{self.bias.shape}."
            )
        if self.outer.shape[-1] != width:
            raise ValueError(
                f"outer: expected {width} on its last axis as inner has {width} rows, "
                f"got shape {self.outer.shape}."
            )
        if self.activation not in _ACTIVATIONS:
            raise ValueError(
                "activation: expected 'tanh', 'erf' or 'relu', got "
                f"{self.activation!r}."
            )

    @property
    def biases(self) -> Float[Array, "*batch h"]:
        """b, zero where the network has none."""
        return jnp.zeros_like(self.inner[..., 0]) if self.bias is None else self.bias

    def preactivations(self, x: Float[Array, "*d"]) -> Float[Array, " h"]:
        """⟨wⱼ, x⟩ + bⱼ at `x`, as for the model itself: a ReLU has its kink where it is
        zero."""
        return self.inner @ jnp.reshape(x, (self.inner.shape[1],)) + self.biases

    def __call__(self, x: Float[Array, "*d"]) -> Float[Array, "*k"]:
        """f(x), for x of shape (d,), or a scalar where d = 1."""
        hidden = _ACTIVATIONS[self.activation](self.preactivations(x))
        return jnp.dot(self.outer, hidden)
