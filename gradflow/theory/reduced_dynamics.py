"""Grokking in two dimensions: how the norm of the weights and the messiness of the
representation move together (Liu, Michaud, Tegmark, arXiv 2210.01117, section 5)."""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Scalar

from .._checks import check_arguments, check_integer, check_number, check_positive


class Cliff(eqx.Module):
    """A loss l̃(w, m) of a norm w and a messiness m that is zero on a plain and rises
    beyond a straight edge in the plane of (log w, m):

        l̃ = a (δ log(1 + e^{d/δ}))²,   d = sin θ (log w_c(m) − log w),
        w_c(m) = w₀ exp(m / tan θ),

    d being the distance beyond the edge: l̃ ≈ a d² there, and ≈ 0 before it. Along w it
    is the L of the paper: high below the critical norm w_c, flat above; and a messier
    representation needs a larger norm.

    **Arguments:**

    - `norm`: w₀, the critical norm where m = 0.
    - `angle`: θ, between the edge and the axis of log w, in radians, 0 < θ < π/2. The
        more data, the smaller.
    - `height`: a.
    - `softness`: δ, over which the edge is rounded.

    **Raises:** `ValueError` for other angles, and unless the others are positive.

    Source: Liu, Michaud, Tegmark, arXiv 2210.01117, section 5.
    """

    norm: float | Scalar
    angle: float | Scalar
    height: float | Scalar = 10.0
    softness: float | Scalar = 0.01

    def __check_init__(self):
        _check_positive(norm=self.norm, height=self.height, softness=self.softness)
        check_number(
            self.angle, "angle", "0 < θ < π/2", lambda v: (v > 0) & (v < np.pi / 2)
        )

    def critical_norm(self, messiness: float | Scalar) -> Scalar:
        """w_c(m), m the `messiness`."""
        return self.norm * jnp.exp(messiness / jnp.tan(self.angle))

    def __call__(self, norm: float | Scalar, messiness: float | Scalar) -> Scalar:
        """l̃(w, m)."""
        ahead = jnp.log(self.critical_norm(messiness)) - jnp.log(norm)
        beyond = jnp.sin(self.angle) * ahead
        depth = self.softness * jax.nn.softplus(beyond / self.softness)
        return self.height * depth**2


class ReducedPath(eqx.Module):
    """A path of the reduced dynamics."""

    t: Float[Array, " n"]
    """The saved times."""
    norm: Float[Array, " n"]
    """w at these times."""
    messiness: Float[Array, " n"]
    """m at these times."""
    loss: Float[Array, " n"]
    """l̃ along the path."""
    result: diffrax.RESULTS
    """How the run ended, in Diffrax's words."""

    def time_until(self, messiness: float | Scalar) -> Scalar:
        """When m falls below `messiness` for the first time, a time t, between two
        saved times by a straight line; infinite where it never does, NaN where the run
        did not reach its end before."""
        below = self.messiness <= messiness
        i = jnp.argmax(below)
        before, m = jnp.maximum(i - 1, 0), self.messiness
        drop = m[before] - m[i]
        share = jnp.where(drop > 0, (m[before] - messiness) / drop, 0.0)
        at = self.t[before] + share * (self.t[i] - self.t[before])
        never = jnp.where(jnp.isfinite(m[-1]), jnp.inf, jnp.nan)
        return jnp.where(jnp.any(below), at, never)


class ReducedDynamics(eqx.Module):
    """dw/dt = −η_D(∂l̃/∂w + γw), dm/dt = −η_R ∂l̃/∂m: equation 6 of Liu, Michaud,
    Tegmark, arXiv 2210.01117.

    **Arguments:**

    - `loss`: l̃(w, m), such as a `Cliff`, or any smooth function that JAX can
        differentiate.
    - `decoder_rate`, `representation_rate`: η_D and η_R.

    **Raises:** `ValueError` unless these are positive.

    **On a cliff**, from (w₁, m₁) on the plain until the messiness is m₂, weight decay
    first takes log w to the edge at speed v = η_Dγ, and then along it. With
    L = log w₁ − log w_c(m₂) and h = m₁ − m₂ the paper has

        t η_Dγ = L + h tan θ,

    from a speed of v cos θ along the edge. That is so where the loss pushes back at
    right angles to the edge in the plane of (log w, m), that is where w² η_R = η_D; in
    general it pushes along (−(η_D/w²) ∂l̃/∂log w, −η_R ∂l̃/∂m), and eliminating how
    much gives

        t η_Dγ = L + tan²θ ∫ η_D/(η_R w²) d log w,   over the edge from m₂ to m₁,

    exact as γ → 0 and then δ → 0. `time_law` has both.
    """

    loss: Callable[[Any, Any], Scalar]
    decoder_rate: float | Scalar = 1.0
    representation_rate: float | Scalar = 1.0

    def __check_init__(self):
        _check_positive(
            decoder_rate=self.decoder_rate,
            representation_rate=self.representation_rate,
        )

    def velocity(
        self, norm: Scalar, messiness: Scalar, weight_decay: float | Scalar
    ) -> tuple[Scalar, Scalar]:
        """(dw/dt, dm/dt) at w = `norm`, m = `messiness`, with γ = `weight_decay`."""
        by_norm, by_messiness = jax.grad(self.loss, (0, 1))(norm, messiness)
        shrink = by_norm + weight_decay * norm
        return -self.decoder_rate * shrink, -self.representation_rate * by_messiness

    def simulate(
        self,
        norm: float | Scalar,
        messiness: float | Scalar,
        *,
        weight_decay: float | Scalar,
        t1: float | Scalar,
        saves: int = 1025,
        rtol: float = 1e-8,
        max_steps: int = 1_000_000,
        throw: bool = True,
    ) -> ReducedPath:
        """The path from (`norm`, `messiness`), by Diffrax's Tsit5. Against the edge the
        equations are stiff, but of two numbers many steps are cheap.

        **Arguments:**

        - `norm`, `messiness`: at t = 0.
        - `weight_decay`: γ.
        - `t1`: the final time.
        - `saves`: number of times, evenly from 0 to `t1`.
        - `rtol`: of log w and m.
        - `max_steps`: at most so many.
        - `throw`: raise where that is not enough; otherwise see `path.result`, and what
            comes after is infinite.

        **Returns:** a `ReducedPath`.

        **Raises:** `ValueError` where an argument makes no sense; Diffrax's error where
        `max_steps` are not enough, and `throw`.
        """
        _check_positive(norm=norm, weight_decay=weight_decay, t1=t1)
        check_number(messiness, "messiness", "a number", lambda v: v == v)
        check_arguments(rtol=rtol, max_steps=max_steps)
        check_integer(saves, "saves", 2)

        def field(t, y, args):
            # Of log w, which cannot become negative.
            w = jnp.exp(y[0])
            dw, dm = self.velocity(w, y[1], weight_decay)
            # A trial step from a plain to far beyond an edge may overflow. It is
            # rejected if its error is finite; after a NaN no step is accepted.
            huge = float(jnp.finfo(y.dtype).max) ** 0.25
            finite = {"nan": huge, "posinf": huge, "neginf": -huge}
            return jnp.nan_to_num(jnp.stack([dw / w, dm]), **finite)

        start = jnp.stack(
            [jnp.log(jnp.asarray(norm, float)), messiness + jnp.zeros(())]
        )
        with jax.numpy_dtype_promotion("standard"):
            solution = diffrax.diffeqsolve(
                diffrax.ODETerm(field),
                diffrax.Tsit5(),
                t0=0.0,
                t1=t1,
                dt0=None,
                y0=start,
                saveat=diffrax.SaveAt(ts=jnp.linspace(0, t1, saves)),
                stepsize_controller=diffrax.PIDController(rtol=rtol, atol=rtol),
                max_steps=max_steps,
                throw=throw,
            )
        assert solution.ts is not None and solution.ys is not None
        log_norm, m = solution.ys.T
        w = jnp.exp(log_norm)
        loss = jax.vmap(self.loss)(w, m)
        return ReducedPath(solution.ts, w, m, loss, solution.result)

    def time_law(
        self,
        norm: float,
        messiness: float,
        until: float,
        *,
        weight_decay: float,
        exact: bool = True,
    ) -> float:
        """How long it takes on a cliff from (`norm`, `messiness`) until the messiness
        is `until`: t = (L + h tan θ)/(η_Dγ), or the same with the factor η_D/(η_R w²)
        that the paper leaves out.

        **Arguments:**

        - `norm`, `messiness`: w₁ and m₁, where the loss is nearly zero.
        - `until`: m₂.
        - `weight_decay`: γ.
        - `exact`: with that factor.

        **Raises:** `ValueError` where the loss is not a `Cliff`, m₂ is not below m₁, or
            the start is beyond the edge.
        """
        cliff = self.loss
        if not isinstance(cliff, Cliff):
            raise ValueError("loss: the law is that of a Cliff.")
        if not until < messiness:
            raise ValueError(f"until: expected less than {messiness}, got {until}.")
        edge, end = (float(cliff.critical_norm(m)) for m in (messiness, until))
        if norm < edge:
            raise ValueError(
                f"norm: expected {edge:.4g}, the critical norm, or more, got {norm}."
            )
        slope = np.tan(float(cliff.angle))
        ratio = float(self.decoder_rate) / float(self.representation_rate)
        along = (messiness - until) * slope
        if exact:
            # ∫ w⁻² d log w from the end to the edge.
            along = slope**2 * ratio * (end**-2 - edge**-2) / 2
        total = np.log(norm / end) + along
        return float(total / (self.decoder_rate * weight_decay))


def _check_positive(**values: object) -> None:
    for name, value in values.items():
        check_positive(value, name)
