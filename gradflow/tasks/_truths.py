"""What is known where the drift's end point solves a convex program."""

import abc
from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ._convex import Certified, lasso, least_l1


class AbstractConvexTruth(eqx.Module):
    """A target, and a convex program that may have it for its solution."""

    target: eqx.AbstractVar[Array]
    resolved: eqx.AbstractClassVar[float]
    """To what relative error a solution of the program is known."""

    @abc.abstractmethod
    def certificate(self) -> Certified:
        """The solution of the program, with the dual point that proves it."""

    def end_point(self) -> Array:
        """The interpolant of least norm: the global minimum of the penalty on M. The
        drift ends at a KKT point of that problem, which need not be this one where the
        problem is not convex in the parameters.

        **Raises:** as `certificate`.
        """
        return jnp.asarray(self.certificate().solution, self.target.dtype)

    def recovers_target(self, *, tolerance: float | None = None) -> bool:
        """Whether the end point is the target, to a relative `tolerance`; by default to
        what is known of it.

        **Raises:** as `certificate`.
        """
        tolerance = self.resolved if tolerance is None else tolerance
        error = jnp.linalg.norm(self.end_point() - self.target)
        return bool(error <= tolerance * jnp.linalg.norm(self.target))


class AbstractSparseTruth(AbstractConvexTruth):
    """A sparse target β⋆ behind targets y = Xβ⋆, and the least ℓ1 norm."""

    features: eqx.AbstractVar[Float[Array, "n d"]]
    targets: eqx.AbstractVar[Float[Array, " n"]]
    resolved: ClassVar[float] = 1e-6

    def certificate(self) -> Certified:
        """argmin ‖β‖₁ over Xβ = y, with the dual point that proves it (by
        `scipy.optimize.linprog`).

        **Raises:** `RuntimeError` where there is none, or none certified.
        """
        return least_l1(np.asarray(self.features), np.asarray(self.targets))

    def lasso(self, weight: float) -> Float[Array, " d"]:
        """argmin ½‖Xβ − y‖² + w‖β‖₁, for a `weight` w > 0, exactly (Osborne, Presnell,
        Turlach, IMA J. Numer. Anal. 20, 2000).

        **Raises:** `RuntimeError` where the optimality conditions are not met, as it
        may be where solutions are not unique.
        """
        solution = lasso(np.asarray(self.features), np.asarray(self.targets), weight)
        return jnp.asarray(solution, self.target.dtype)
