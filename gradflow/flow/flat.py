"""The loss as a function of one flat vector θ: J, the tangent kernel JJᵀ, products."""

import abc
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree, Scalar

from ..losses import AbstractCompositeLoss, AbstractLoss, outer_from, samples
from .operations import operations
from .term import AbstractChart, Flat


def linearized(fn: Callable, x: PyTree) -> tuple[PyTree, Callable, Callable]:
    """f(x), and the products u ↦ Ju and v ↦ Jᵀv with J = ∂f/∂x.

    Where f has operations with a reverse derivative only (`jax.custom_vjp`), Ju is the
    pullback of the pullback v ↦ Jᵀv, which is linear: twice the price.

    **Raises:** `ValueError` where that has no derivative either.
    """
    try:
        out, push = jax.linearize(fn, x)
        # What has no forward rule is mostly found out when `push` is compiled.
        linear = operations(jax.make_jaxpr(push)(x))
        if all(one.primitive.name != "custom_lin" for one in linear):
            return out, push, lambda v: jax.linear_transpose(push, x)(v)[0]
    except TypeError as error:
        if "custom_vjp" not in str(error):
            raise
    out, back = jax.vjp(fn, x)

    def pull(v):
        return back(v)[0]

    try:
        _, forth = jax.vjp(pull, jax.tree.map(jnp.zeros_like, out))
        jax.eval_shape(forth, x)
    except Exception as error:
        raise ValueError(
            "model: expected outputs with a forward derivative, or a reverse one that "
            "can be differentiated, got an operation (jax.custom_vjp) with neither; "
            "give solver=diffrax.Tsit5(), or inside the model an adjoint such as "
            "diffrax.DirectAdjoint()."
        ) from error
    return out, lambda u: forth(u)[0], pull


_BLOCK_BYTES = 2**28


def _block_length(n: int, row_bytes: int) -> int:
    """n rows in blocks of equal length, but for the last, below `_BLOCK_BYTES`."""
    blocks = -(-n * row_bytes // _BLOCK_BYTES)
    return -(-n // min(blocks, n))


_BLOCK_NUMBERS = 2**20


def rows_at_once(size: int) -> int:
    """How many hold a million numbers, if each holds `size`; one at least."""
    return max(1, _BLOCK_NUMBERS // max(1, size))


def in_blocks(fn: Callable[[PyTree], PyTree], rows: PyTree, size: int) -> PyTree:
    """`fn` of each row, along the first axis of all arrays; of as many at once as hold
    a million numbers if each holds `size`. One program for all: see `blocks_of`."""
    (n,) = {len(x) for x in jax.tree.leaves(rows)}
    if n <= rows_at_once(size):
        return jax.vmap(fn)(rows)
    out = jax.lax.map(jax.vmap(fn), blocks_of(rows, size))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:n], out)


def summed(fn: Callable[[PyTree], Array], rows: PyTree, size: int) -> Array:
    """Σ `fn`(row), by the same blocks. Its derivatives take no more memory: for them
    each block is computed anew."""
    (n,) = {len(x) for x in jax.tree.leaves(rows)}
    if n <= rows_at_once(size):
        return jnp.sum(jax.vmap(fn)(rows), axis=0)
    blocks = blocks_of(rows, size)
    shape = jax.tree.leaves(blocks)[0].shape[:2]
    each = blocks, (jnp.arange(shape[0] * shape[1]) < n).reshape(shape)

    @jax.checkpoint
    def block(at: tuple) -> Array:
        rows, counted = at
        out = jax.vmap(fn)(rows)
        return jnp.tensordot(counted.astype(out.dtype), out, 1)

    def add(total: Array, at: tuple) -> tuple:
        return total + block(at), None

    like = jax.eval_shape(block, jax.tree.map(lambda x: x[0], each))
    return jax.lax.scan(add, jnp.zeros(like.shape, like.dtype), each)[0]


def blocks_of(rows: PyTree, size: int) -> PyTree:
    """The rows along the first axis in blocks of one length, along two: of as many as
    hold a million numbers if each holds `size`. The last is filled up with the first
    rows."""
    (n,) = {len(x) for x in jax.tree.leaves(rows)}
    length = -(-n // -(-n // rows_at_once(size)))

    def blocks(x: Array) -> Array:
        x = jnp.concatenate([x, x[: -n % length]])
        return x.reshape(-1, length, *x.shape[1:])

    return jax.tree.map(blocks, rows)


class AbstractFlatLoss(eqx.Module):
    """A loss F = ℓ(z(θ)) as a function of one vector θ ∈ ℝᵈ, for what needs a matrix.

    To be made inside a jitted function: it holds the closure that rebuilds the pytree.
    """

    loss: eqx.AbstractVar[AbstractLoss]
    chart: eqx.AbstractVar[AbstractChart]
    unravel: eqx.AbstractVar[Callable[[Array], PyTree]]

    def model(self, theta: Float[Array, " d"]) -> PyTree:
        params = self.chart.place(self.unravel(theta))
        return eqx.combine(params, self.chart.static)

    def __call__(self, theta: Float[Array, " d"]) -> Scalar:
        return self.loss(self.model(theta))

    def gradient(self, theta: Float[Array, " d"]) -> Float[Array, " d"]:
        return jax.grad(self)(theta)

    @property
    @abc.abstractmethod
    def opaque(self) -> bool:
        """Whether nothing is known of its structure: z(θ) = θ."""

    @abc.abstractmethod
    def outputs(self, theta: Float[Array, " d"]) -> Float[Array, " m"]:
        """z(θ)."""

    @abc.abstractmethod
    def outer(self, z: Float[Array, " m"]) -> Scalar:
        """ℓ(z)."""

    @abc.abstractmethod
    def outer_from(
        self, residuals: Float[Array, " m"], z: Float[Array, " m"]
    ) -> Scalar:
        """ℓ(z), from ∇ℓ(z) where that is known better than z."""

    @property
    @abc.abstractmethod
    def outer_curvature(self) -> float | None:
        """w where ℓ'' = w I everywhere, `None` otherwise."""

    @abc.abstractmethod
    def jacobian(self, theta: Float[Array, " d"]) -> Float[Array, "m d"]:
        """J = ∂z/∂θ."""

    @abc.abstractmethod
    def tangent_kernel(
        self, theta: Float[Array, " d"], weights: Float[Array, " d"] | None = None
    ) -> Float[Array, "m m"]:
        """J diag(w) Jᵀ, the empirical neural tangent kernel (Jacot et al., 2018) where
        the weights w are one."""

    def outer_hvp(
        self, z: Float[Array, " m"], u: Float[Array, " m"]
    ) -> Float[Array, " m"]:
        """ℓ''(z) u."""
        return jax.jvp(jax.grad(self.outer), (z,), (u,))[1]

    def linearize(
        self, theta: Float[Array, " d"]
    ) -> tuple[Float[Array, " m"], Callable, Callable]:
        """z(θ), and the products u ↦ Ju and v ↦ Jᵀv; see `linearized`."""
        return linearized(self.outputs, theta)

    def residuals(self, theta: Float[Array, " d"]) -> Float[Array, " m"]:
        """∇ℓ(z(θ))."""
        return jax.grad(self.outer)(self.outputs(theta))


class FlatLoss(AbstractFlatLoss):
    """One that is composite, or of which only F itself is asked."""

    loss: AbstractLoss
    chart: AbstractChart
    unravel: Callable[[Array], PyTree] = eqx.field(static=True)

    @property
    def opaque(self) -> bool:
        return False

    def outputs(self, theta: Float[Array, " d"]) -> Float[Array, " m"]:
        return self.composite.outputs(self.model(theta))

    def outer(self, z: Float[Array, " m"]) -> Scalar:
        return self.composite.outer(z)

    def outer_from(
        self, residuals: Float[Array, " m"], z: Float[Array, " m"]
    ) -> Scalar:
        return outer_from(self.composite, residuals, z)

    @property
    def outer_curvature(self) -> float | None:
        return self.composite.outer_curvature

    def jacobian(self, theta: Float[Array, " d"]) -> Float[Array, "m d"]:
        """J: sample by sample, at the cost of one gradient for each output of a
        sample, where the loss has `samples`; else by m vector-Jacobian products, or d
        Jacobian-vector ones if they are fewer."""
        x = samples(self.composite)
        if x is not None:
            return self._sample_rows(theta, x)
        z, push, _ = self.linearize(theta)
        if theta.size < z.size:
            return in_blocks(push, jnp.eye(theta.size, dtype=theta.dtype), z.size).T
        return jax.jacrev(self.outputs)(theta)

    def _sample_rows(self, theta: Float[Array, " d"], x: PyTree) -> Array:
        """The rows of J that belong to samples `x`."""

        def rows(x):
            return jax.jacrev(lambda th: self.model(th)(x).reshape(-1))(theta)

        return jax.vmap(rows)(x).reshape(-1, theta.size)

    def tangent_kernel(
        self, theta: Float[Array, " d"], weights: Float[Array, " d"] | None = None
    ) -> Float[Array, "m m"]:
        # J is made in blocks of rows of at most 256 MB.
        m = jax.eval_shape(self.outputs, theta).shape[0]
        x = samples(self.composite)
        n = m if x is None else jax.tree.leaves(x)[0].shape[0]
        block = _block_length(n, theta.nbytes * (m // n))

        def spread(v):
            return jnp.broadcast_to(weights, v.shape)

        def weighted(v):
            return v if weights is None else v * spread(v)

        if block == n:
            jac = self.jacobian(theta)
            return weighted(jac) @ jac.T
        if x is None:
            return self._kernel_by_products(theta, weighted, block)
        # The rows of a block cost one gradient: cheaper to make again than to keep.
        more = -n % block
        blocks = jax.tree.map(
            lambda a: jnp.concatenate([a, a[:more]]).reshape(-1, block, *a.shape[1:]), x
        )

        count = (n + more) // block
        i, j = np.triu_indices(count)

        def pair(at):
            left, right = (
                self._sample_rows(theta, jax.tree.map(lambda a, k=k: a[k], blocks))
                for k in at
            )
            return weighted(left) @ right.T

        upper = jax.lax.map(pair, (i, j))
        rows = upper.shape[1]
        kernel = jnp.zeros((count, count, rows, rows), theta.dtype)
        kernel = kernel.at[i, j].set(upper).at[j, i].set(upper.transpose(0, 2, 1))
        return kernel.transpose(0, 2, 1, 3).reshape(count * rows, -1)[:m, :m]

    def _kernel_by_products(
        self, theta: Float[Array, " d"], weighted: Callable, block: int
    ) -> Float[Array, "m m"]:
        """The same where outputs are not known to split into samples."""
        z, push, pull = self.linearize(theta)

        def row(e):
            return push(weighted(pull(e)))

        return jax.lax.map(row, jnp.eye(z.size, dtype=z.dtype), batch_size=block)

    @property
    def composite(self) -> AbstractCompositeLoss:
        """The loss, if it is composite.

        **Raises:** `ValueError` if it is not.
        """
        if not isinstance(self.loss, AbstractCompositeLoss):
            raise ValueError(
                f"loss: {type(self.loss).__name__} is not composite; outputs and their "
                "Jacobian need SquaredError, CrossEntropy or another composite loss."
            )
        return self.loss


class FlatOpaqueLoss(AbstractFlatLoss):
    """Any loss taken as a composite one: z(θ) = θ, J = I and ℓ = F."""

    loss: AbstractLoss
    chart: AbstractChart
    unravel: Callable[[Array], PyTree] = eqx.field(static=True)

    @property
    def opaque(self) -> bool:
        return True

    def outputs(self, theta: Float[Array, " d"]) -> Float[Array, " d"]:
        return theta

    def outer(self, z: Float[Array, " d"]) -> Scalar:
        return self(z)

    def outer_from(
        self, residuals: Float[Array, " d"], z: Float[Array, " d"]
    ) -> Scalar:
        return self(z)

    @property
    def outer_curvature(self) -> None:
        return None

    def jacobian(self, theta: Float[Array, " d"]) -> Float[Array, "d d"]:
        return jnp.eye(theta.size, dtype=theta.dtype)

    def tangent_kernel(
        self, theta: Float[Array, " d"], weights: Float[Array, " d"] | None = None
    ) -> Float[Array, "d d"]:
        return jnp.diag(jnp.ones_like(theta) if weights is None else weights)


def flatten(
    loss: AbstractLoss, params: PyTree, static: PyTree
) -> tuple[Float[Array, " d"], FlatLoss]:
    """The parameters as one vector, and the loss as a function of it."""
    return flatten_on(loss, params, Flat(static))


def flatten_on(
    loss: AbstractLoss, params: PyTree, chart: AbstractChart
) -> tuple[Float[Array, " d"], FlatLoss]:
    """The parameters of a state on a chart as one vector, and the loss as a function of
    it."""
    theta, unravel = ravel_pytree(params)
    return theta, FlatLoss(loss, chart, unravel)
