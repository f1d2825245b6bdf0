"""Penalties R(θ) on the trainable parameters."""

from .base import (
    absolute_weights as absolute_weights,
    AbstractAbsolute as AbstractAbsolute,
    AbstractComposite as AbstractComposite,
    AbstractCurved as AbstractCurved,
    AbstractKinked as AbstractKinked,
    AbstractLipschitz as AbstractLipschitz,
    AbstractPenalty as AbstractPenalty,
    AbstractProximal as AbstractProximal,
    check_declared as check_declared,
    curvature as curvature,
    least_norm as least_norm,
    lipschitz as lipschitz,
    prox as prox,
    Scaled as Scaled,
    smooth_gradient as smooth_gradient,
    Sum as Sum,
)
from .jacobian import Sobolev as Sobolev
from .leafwise import (
    AbstractLeafwise as AbstractLeafwise,
    ElasticNet as ElasticNet,
    GroupLasso as GroupLasso,
    L1 as L1,
    L2 as L2,
    soft_threshold as soft_threshold,
)
from .matrix import Nuclear as Nuclear, Schatten as Schatten
from .moreau import Moreau as Moreau
from .quadratic import Quadratic as Quadratic
