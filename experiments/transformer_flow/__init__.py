"""Networks that grok modular addition, in continuous time: from the start through
memorising to generalising, for weight decays over three decades.

`addition` follows a one-layer transformer, and checks the path against gradient descent
in small steps; `embedding` follows an embedding and a network of one hidden layer, and
measures what an explicit solver would take for the same.
"""

from ..shared.command import Study
from .addition import Addition
from .embedding import Embedding

STUDY = Study(
    "transformer_flow", __doc__, {"addition": Addition, "embedding": Embedding}
)
