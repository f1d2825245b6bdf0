"""The gradient flow θ' = −∇F(θ) − λ∇R(θ), as a Diffrax term."""

from collections.abc import Callable, Iterator
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree, Scalar

from ._checks import check_init_scale, check_model, is_concrete, word
from .losses import (
    AbstractCompositeLoss,
    AbstractLoss,
    CrossEntropy,
    Huber,
    Logistic,
    SquaredError,
)
from .penalties import AbstractPenalty, L2


class GradientFlow(eqx.Module):
    """The flow θ' = −∇F(θ) − λ∇R(θ) of the trainable parameters of a model.

    λ, the weight decay, is given when the flow is run; so one flow serves them all.
    """

    loss: AbstractLoss
    penalty: AbstractPenalty
    trainable: PyTree = eqx.field(static=True)
    hold_norm: bool = eqx.field(static=True)

    def __init__(
        self,
        loss: AbstractLoss,
        *,
        penalty: AbstractPenalty | None = None,
        trainable: PyTree = eqx.is_inexact_array,
        hold_norm: bool = False,
    ):
        """**Arguments:**

        - `loss`: the training loss F.
        - `penalty`: R; ½‖θ‖² unless given.
        - `trainable`: a filter, as for `eqx.partition`: a function of a leaf, or a
            pytree of booleans. Leaves that it leaves out stay as they are.
        - `hold_norm`: keep the norm ‖θ‖ of the trainable parameters at its initial
            value: the flow on a sphere, θ' = −(I − θ̂θ̂ᵀ)(∇F(θ) + λ∇R(θ)), θ̂ = θ/‖θ‖.

        **Raises:** `ValueError` where loss or penalty is none of gradflow's.
        """
        if not isinstance(loss, AbstractLoss):
            raise ValueError(
                f"loss: expected a gradflow loss, got {word(loss)}; wrap a function of "
                "the model as gradflow.Loss(fn)."
            )
        if not (penalty is None or isinstance(penalty, AbstractPenalty)):
            raise ValueError(
                f"penalty: expected a gradflow penalty, got {word(penalty)}; see "
                "gradflow.AbstractPenalty for one of your own."
            )
        self.loss = loss
        self.penalty = L2() if penalty is None else penalty
        self.trainable = trainable
        self.hold_norm = hold_norm

    def partition(self, model: PyTree) -> tuple[PyTree, PyTree]:
        """Splits `model` into its trainable parameters and all the rest.

        **Raises:** `ValueError` where there are no parameters, or where they are
        complex or of mixed precision.
        """
        return partition(model, self.trainable)

    def term(self, model: PyTree) -> tuple["FlowTerm", PyTree]:
        """The flow as a Diffrax term, and its initial state, for use with
        `diffrax.diffeqsolve(term, solver, ..., y0=params, args=weight_decay)`.

        **Returns:** `(term, params)`; the state is the pytree of parameters.

        **Raises:** `ValueError` as `partition`, and for parameters that are all zero
        where `hold_norm`.
        """
        params, static = self.partition(model)
        if not self.hold_norm:
            return FlowTerm(self.loss, self.penalty, static), params
        norm = optax.tree.norm(params)
        if is_concrete(norm) and not norm > 0:
            raise ValueError("model: parameters of norm 0 leave no direction to hold.")
        sphere = Sphere(static, norm)
        return FlowTerm(self.loss, Tangential(self.penalty, sphere), sphere), params

    def velocity(self, model: PyTree, weight_decay: float | Scalar) -> PyTree:
        """θ' = −∇F(θ) − λ∇R(θ) at `model`, a pytree like its parameters. At a kink of R
        it is minus the element of least norm of ∇F(θ) + λ∂R(θ)."""
        term, params = self.term(model)
        force = jax.grad(lambda p: term.loss(term.model(p)))(params)
        slope = term.penalty.least_norm(params, force, weight_decay)
        return jax.tree.map(jnp.negative, slope)


def partition(
    model: PyTree, trainable: PyTree = eqx.is_inexact_array
) -> tuple[PyTree, PyTree]:
    """Splits `model` into trainable parameters and the rest; see
    `GradientFlow.partition`."""
    params, static = _split(model, trainable)
    check_model(params)
    return params, static


def _split(model: PyTree, trainable: PyTree) -> tuple[PyTree, PyTree]:
    try:
        params, static = eqx.partition(model, trainable)
    except (TypeError, ValueError) as error:
        raise ValueError(
            "trainable: expected a function of a leaf, or booleans in the structure of "
            f"the model, got {word(trainable)}."
        ) from error
    for at, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not eqx.is_inexact_array(leaf):
            kind = getattr(leaf, "dtype", type(leaf).__name__)
            raise ValueError(
                "trainable: expected to choose arrays of floating-point numbers, but "
                f"model{jax.tree_util.keystr(at)} is of type {kind}."
            )
    return params, static


def check_flow(flow: Any) -> None:
    """Raises unless it is a flow. A loss alone does not say which penalty."""
    if not isinstance(flow, GradientFlow):
        loss = isinstance(flow, AbstractLoss)
        remedy = "; make one as gradflow.GradientFlow(loss)" if loss else ""
        raise ValueError(f"flow: expected a GradientFlow, got {word(flow)}{remedy}.")


def flow_of(loss: Any, trainable: PyTree = eqx.is_inexact_array) -> GradientFlow:
    """The flow of a loss alone, whatever the penalty: from the loss, or from a flow.

    **Raises:** `ValueError` for anything else; for a flow that holds the norm; and
    where `trainable` is not that of the flow.
    """
    if isinstance(loss, GradientFlow):
        check_free(loss)
        if trainable not in (eqx.is_inexact_array, loss.trainable):
            raise ValueError("trainable: the flow says already what is trainable.")
        loss, trainable = loss.loss, loss.trainable
    return GradientFlow(loss, trainable=trainable)


def check_free(flow: Any) -> None:
    """Raises unless it is a flow, of parameters whose norm is not held."""
    check_flow(flow)
    if flow.hold_norm:
        raise ValueError(
            "flow: it holds the norm, for which there is no theory of the critical "
            "manifold here; give one without hold_norm."
        )


class Sphere(eqx.Module):
    """What is not trained of a model whose parameters are held at a norm w: those of a
    state φ are θ = wφ/‖φ‖.

    The plain flow of φ ↦ F(wφ/‖φ‖) from ‖φ‖ = w is the flow on the sphere itself: its
    gradient is tangent, so ‖φ‖ never changes. Every solver serves it as it is.
    """

    static: PyTree
    norm: Scalar

    def place(self, params: PyTree) -> PyTree:
        """θ."""
        scale = self.norm / optax.tree.norm(params)
        return jax.tree.map(lambda p: scale * p, params)


def place(params: PyTree, static: PyTree) -> tuple[PyTree, PyTree]:
    """The parameters of a model, and all the rest of it, from those of a state."""
    if isinstance(static, Sphere):
        return static.place(params), static.static
    return params, static


class Tangential(AbstractPenalty):
    """φ ↦ R(wφ/‖φ‖), whose gradient is tangent to the sphere."""

    penalty: AbstractPenalty
    sphere: Sphere

    @property
    def smooth(self) -> bool:
        return self.penalty.smooth

    def __call__(self, params: PyTree) -> Scalar:
        return self.penalty(self.sphere.place(params))

    def gradient(self, params: PyTree) -> PyTree:
        theta, pull = jax.vjp(self.sphere.place, params)
        return pull(self.penalty.gradient(theta))[0]

    def curvature(self, params: PyTree) -> float | PyTree:
        return self.penalty.curvature(self.sphere.place(params))

    def terms(self):
        return self.penalty.terms()


class FlowTerm(diffrax.AbstractTerm):
    """θ' = −∇F(θ) − λ∇R(θ) as a Diffrax term that knows its loss.

    The state is the pytree of trainable parameters; `args` is the weight decay λ. Made
    by `GradientFlow.term`.
    """

    loss: AbstractLoss
    penalty: AbstractPenalty
    static: PyTree

    def model(self, params: PyTree) -> PyTree:
        """The model with parameters `params`."""
        return eqx.combine(*place(params, self.static))

    def velocity(self, params: PyTree, weight_decay: float | Scalar) -> PyTree:
        """θ' = −∇F(θ) − λ∇R(θ), a pytree like the parameters."""
        force = jax.grad(lambda p: self.loss(self.model(p)))(params)
        decay = self.penalty.gradient(params)
        return jax.tree.map(lambda f, r: -f - weight_decay * r, force, decay)

    def vf(self, t: Any, y: PyTree, args: Any) -> PyTree:
        return self.velocity(y, args)

    def contr(self, t0: Any, t1: Any, **kwargs: Any) -> Any:
        return t1 - t0

    def prod(self, vf: PyTree, control: Any) -> PyTree:
        return jax.tree.map(lambda v: v * control, vf)


class Tracked(eqx.Module):
    """A state that carries the multiplier μ = ∇ℓ(z(θ)) along, found by a KKT solver
    together with θ. On the critical manifold μ is a small difference of large numbers,
    which θ alone gives with a far larger relative error."""

    params: PyTree
    multiplier: Float[Array, "*times m"]


class TrackedFlowTerm(FlowTerm):
    """The same flow with a `Tracked` state."""

    def vf(self, t: Any, y: Tracked, args: Any) -> Tracked:
        return Tracked(super().vf(t, y.params, args), jnp.zeros_like(y.multiplier))


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
    pull = lambda v: back(v)[0]
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


def operations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a program, and of those inside of it."""
    for equation in jaxpr.eqns:
        yield equation
        inner = lambda p: hasattr(p, "eqns")
        for param in jax.tree.leaves(list(equation.params.values()), is_leaf=inner):
            if inner(param):
                yield from operations(param)


_BLOCK_BYTES = 2**28


def _block_length(n: int, row_bytes: int) -> int:
    """n rows in blocks of equal length, but for the last, below `_BLOCK_BYTES`."""
    blocks = -(-n * row_bytes // _BLOCK_BYTES)
    return -(-n // min(blocks, n))


class FlatLoss(eqx.Module):
    """A loss as a function of one vector θ ∈ ℝᵈ, for what needs a matrix.

    To be made inside a jitted function: it holds the closure that rebuilds the pytree.
    """

    loss: AbstractLoss
    static: PyTree
    unravel: Callable[[Array], PyTree] = eqx.field(static=True)

    def model(self, theta: Float[Array, " d"]) -> PyTree:
        return eqx.combine(*place(self.unravel(theta), self.static))

    def __call__(self, theta: Float[Array, " d"]) -> Scalar:
        return self.loss(self.model(theta))

    def gradient(self, theta: Float[Array, " d"]) -> Float[Array, " d"]:
        return jax.grad(self)(theta)

    def outputs(self, theta: Float[Array, " d"]) -> Float[Array, " m"]:
        """z(θ)."""
        return self.composite.outputs(self.model(theta))

    def outer(self, z: Float[Array, " m"]) -> Scalar:
        """ℓ(z)."""
        return self.composite.outer(z)

    def outer_from(
        self, residuals: Float[Array, " m"], z: Float[Array, " m"]
    ) -> Scalar:
        """ℓ(z), from ∇ℓ(z) where that is known better than z."""
        return self.composite.outer_from(residuals, z)

    @property
    def outer_curvature(self) -> float | None:
        """w where ℓ'' = w I everywhere, `None` otherwise."""
        return self.composite.outer_curvature

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

    def jacobian(self, theta: Float[Array, " d"]) -> Float[Array, "m d"]:
        """J = ∂z/∂θ: sample by sample, at the cost of one gradient for each output of a
        sample, where the loss has `samples`; else by m vector-Jacobian products."""
        x = self.composite.samples
        if x is None:
            return jax.jacrev(self.outputs)(theta)
        return self._sample_rows(theta, x)

    def _sample_rows(self, theta: Float[Array, " d"], x: PyTree) -> Array:
        """The rows of J that belong to samples `x`."""

        def rows(x):
            return jax.jacrev(lambda th: self.model(th)(x).reshape(-1))(theta)

        return jax.vmap(rows)(x).reshape(-1, theta.size)

    def tangent_kernel(
        self, theta: Float[Array, " d"], weights: Float[Array, " d"] | None = None
    ) -> Float[Array, "m m"]:
        """J diag(w) Jᵀ, the empirical neural tangent kernel (Jacot et al., 2018) where
        the weights w are one. J is made in blocks of rows of at most 256 MB."""
        m = jax.eval_shape(self.outputs, theta).shape[0]
        x = self.composite.samples
        n = m if x is None else jax.tree.leaves(x)[0].shape[0]
        block = _block_length(n, theta.nbytes * (m // n))
        spread = lambda v: jnp.broadcast_to(weights, v.shape)
        weighted = lambda v: v if weights is None else v * spread(v)
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
        row = lambda e: push(weighted(pull(e)))
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


class FlatOpaqueLoss(FlatLoss):
    """Any loss taken as a composite one: z(θ) = θ, J = I and ℓ = F."""

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

    def tangent_kernel(
        self, theta: Float[Array, " d"], weights: Float[Array, " d"] | None = None
    ) -> Float[Array, "d d"]:
        return jnp.diag(jnp.ones_like(theta) if weights is None else weights)


def flatten(
    loss: AbstractLoss, params: PyTree, static: PyTree
) -> tuple[Float[Array, " d"], FlatLoss]:
    """The parameters as one vector, and the loss as a function of it."""
    theta, unravel = ravel_pytree(params)
    return theta, FlatLoss(loss, static, unravel)


def may_have_kinks(loss: FlatLoss, theta: Float[Array, " d"]) -> bool:
    """Whether something in the outputs of the model (or in the loss, if it is none of
    gradflow's own) may have kinks, such as a ReLU, a maximum, an order, or a comparison
    of numbers. Nothing is computed; it is traced once."""
    own = isinstance(loss.loss, SquaredError | Huber | Logistic | CrossEntropy)
    return _kinked(jax.make_jaxpr(loss.outputs if own else loss.__call__)(theta))


def _kinked(jaxpr: Any) -> bool:
    # The maximum in a softmax is one through which no derivative flows.
    shifts = any(one.primitive.name == "stop_gradient" for one in jaxpr.eqns)

    def kinked(one: Any) -> bool:
        inner = [p for p in jax.tree.leaves(
            list(one.params.values()), is_leaf=lambda p: hasattr(p, "eqns")
        ) if hasattr(p, "eqns")]  # fmt: skip
        if _function(one) in ("logaddexp", "logaddexp2"):
            return False  # smooth, though written with a maximum
        if any(map(_kinked, inner)):
            return True
        name = one.primitive.name
        if name not in _KINKS or (name in ("reduce_max", "max") and shifts):
            return False
        # Of numbers; a maximum with −∞ is none.
        numbers = jnp.issubdtype(one.invars[0].aval.dtype, jnp.floating)
        bounds = [np.asarray(v.val) for v in one.invars if hasattr(v, "val")]
        return numbers and bool(np.isfinite(bounds).all())

    return any(map(kinked, jaxpr.eqns))


def _function(one: Any) -> str | None:
    """The name of the function whose derivative is given by hand (`jax.custom_jvp`)."""
    inner = one.params.get("call_jaxpr")
    about = getattr(getattr(inner, "jaxpr", None), "debug_info", None)
    return getattr(about, "func_name", None)


_KINKS = frozenset(
    "abs argmax argmin ceil clamp cummax cummin floor ge gt le lt max min reduce_max "
    "reduce_min reduce_window_max rem round sign sort top_k".split()
)


def scaled(
    model: PyTree,
    alpha: float | Scalar,
    *,
    trainable: PyTree = eqx.is_inexact_array,
) -> PyTree:
    """The model with all trainable parameters, biases too, multiplied by α.

    **Arguments:**

    - `model`: any Equinox module.
    - `alpha`: α > 0.
    - `trainable`: which leaves, as for `GradientFlow`.

    **Raises:** `ValueError` where α is not one positive number.
    """
    check_init_scale(alpha, "alpha")
    params, static = _split(model, trainable)
    times = lambda p: jnp.asarray(alpha, p.dtype) * p
    return eqx.combine(jax.tree.map(times, params), static)
