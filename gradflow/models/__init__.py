"""The models that the papers train: small, and written as a reader would."""

from .centred import Centred as Centred
from .deep_linear import DeepLinear as DeepLinear
from .diagonal import (
    DiagonalNetwork as DiagonalNetwork,
    DifferenceNetwork as DifferenceNetwork,
)
from .embedding_decoder import (
    EmbeddingDecoder as EmbeddingDecoder,
    messy_embedding as messy_embedding,
)
from .factorisation import MatrixFactorisation as MatrixFactorisation
from .graph import Graph as Graph, GraphNetwork as GraphNetwork
from .hadamard import HadamardProduct as HadamardProduct
from .linear import LinearModel as LinearModel
from .lstm import LSTMClassifier as LSTMClassifier
from .pair_product import PairProduct as PairProduct
from .transformer import Transformer as Transformer
from .two_layer import TwoLayer as TwoLayer
