"""The models that the papers train: small, and written as a reader would."""

from .deep_linear import DeepLinear as DeepLinear
from .diagonal import (
    DiagonalNetwork as DiagonalNetwork,
    DifferenceNetwork as DifferenceNetwork,
)
from .factorisation import MatrixFactorisation as MatrixFactorisation
from .hadamard import HadamardProduct as HadamardProduct
from .linear import LinearModel as LinearModel
from .pair_product import PairProduct as PairProduct
from .two_layer import TwoLayer as TwoLayer
