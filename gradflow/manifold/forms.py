"""The two forms in which the critical manifold is described: what each must tell.

Everything in this folder comes down to an orthonormal basis N of the normal space and
the step that leads back to M, to first order. They are had from J where the loss is
composite and interpolated ([`JacobianForm`](jacobian_form.py)), and from ∇²F otherwise
([`HessianForm`](hessian_form.py)). Which it is, is decided once: see `choice.py`.
"""

from abc import abstractmethod

import equinox as eqx
import numpy as np
from equinox import AbstractClassVar
from jaxtyping import Array, Float, Int, PyTree

from ..flow.flat import FlatLoss
from ..losses import AbstractLoss
from ._matrix_free import Operator
from ._normal import NormalSpace


class AbstractForm(eqx.Module):
    """What describes M near θ: the weighted Jacobian A = (ℓ'')^½ J, or ∇²F."""

    name: AbstractClassVar[str]
    """As users write it, and as results tell it."""
    measured: AbstractClassVar[str]
    """What `values` are, in words."""
    interpolating: AbstractClassVar[bool]
    """Whether it takes M for the set where the loss is interpolated: then there is a
    rank to expect, and saddles and other critical points cannot be seen."""

    @abstractmethod
    def normal(
        self,
        loss: FlatLoss,
        theta: Float[Array, " d"],
        rank: Int[Array, ""] | None = None,
        damping: float = 0.0,
    ) -> NormalSpace:
        """The normal space, and the way back to M, smooth in θ where `rank` is given;
        `rank` and `damping` matter to the Hessian form."""

    @abstractmethod
    def exact_normal(
        self,
        loss: FlatLoss,
        theta: Float[Array, " d"],
        rank: Int[Array, ""] | None = None,
        *,
        rtol: float | None = None,
        time: float | Float[Array, ""] = 0.0,
    ) -> NormalSpace:
        """The same with P a projection exactly, onto all but the `rank` largest values
        (the numerical rank unless given, by `rtol` if that is), not smooth in θ; and
        whether θ is `leaving` what it is close to, at `time` since its start."""

    @abstractmethod
    def values(
        self, loss: FlatLoss, theta: Float[Array, " d"]
    ) -> tuple[Float[Array, " k"], Float[Array, ""]]:
        """What the rank is read off, descending and none negative; and the lowest
        eigenvalue of ∇²F, zero where it is not known."""

    @abstractmethod
    def curvatures(
        self, values: Float[Array | np.ndarray, " k"]
    ) -> Float[Array | np.ndarray, " k"]:
        """|eigenvalues| of ∇²F from `values`."""

    @abstractmethod
    def told_curvatures(
        self,
        loss: FlatLoss,
        theta: Float[Array, " d"],
        rank: Int[Array, ""],
        rtol: float,
    ) -> tuple[Float[Array, " k"], Float[Array, ""]]:
        """|eigenvalues| of ∇²F, descending, at the least price; and how small the
        `rank`-th may be for `normal` to be right to 1000 `rtol`."""

    @abstractmethod
    def decomposition(
        self, loss: FlatLoss, theta: Float[Array, " d"]
    ) -> tuple[Float[Array, " k"], Float[Array, "d k"]]:
        """The eigenvalues of ∇²F, the largest in size first, and its eigenvectors."""

    @abstractmethod
    def root(
        self, loss: FlatLoss, theta: Float[Array, " d"]
    ) -> tuple[Float[Array, " k"], Float[Array, "k d"]]:
        """The eigenvalues of ∇²F, and G with |∇²F| = GᵀG, its rows orthogonal and in
        the same order."""

    @abstractmethod
    def solve_shifted(
        self,
        loss: FlatLoss,
        theta: Float[Array, " d"],
        alpha: Float[Array, ""],
        h: Float[Array, ""],
        right: Float[Array, " d"],
        guess: Float[Array, " d"],
    ) -> Float[Array, " d"]:
        """v with (α + h∇²F) v = `right`, from a guess."""

    @abstractmethod
    def operator(self, loss: FlatLoss, theta: Float[Array, " d"]) -> Operator:
        """A at θ, or ∇²F, as products; each costs about a gradient."""

    @abstractmethod
    def fits(self, loss: AbstractLoss, params: PyTree, static: PyTree) -> bool:
        """Whether the matrix is small enough to be made and decomposed."""
