"""Data from published files at hand, what stands in for them, and arrays of one's own.

Nothing is fetched: each error about a file tells where to get it.
"""

from .bonds import (
    Bond as Bond,
    bonds_from_positions as bonds_from_positions,
    molecular_graph as molecular_graph,
)
from .enumerated import (
    Enumerated as Enumerated,
    enumerated_molecules as enumerated_molecules,
)
from .grammar import synthetic_reviews as synthetic_reviews
from .images import (
    FASHION_MNIST_SHA256 as FASHION_MNIST_SHA256,
    images_name as images_name,
    mnist as mnist,
    mnist_files as mnist_files,
    MNIST_SHA256 as MNIST_SHA256,
    read_idx as read_idx,
    scikit_learn_digits as scikit_learn_digits,
)
from .molecules import (
    Molecule as Molecule,
    parse_xyz as parse_xyz,
    PROPERTIES as PROPERTIES,
    qm9 as qm9,
    qm9_path as qm9_path,
    QM9_SHA256 as QM9_SHA256,
    QM9_SIZE as QM9_SIZE,
)
from .own import (
    Images as Images,
    own_arrays as own_arrays,
    own_images as own_images,
    own_molecules as own_molecules,
    own_reviews as own_reviews,
)
from .packaged_molecules import (
    is_qm9pack as is_qm9pack,
    qm9pack as qm9pack,
    QM9PACK_SHA256 as QM9PACK_SHA256,
    QM9PACK_SIZE as QM9PACK_SIZE,
)
from .text import (
    imdb as imdb,
    imdb_path as imdb_path,
    IMDB_SHA256 as IMDB_SHA256,
    Reviews as Reviews,
    Vocabulary as Vocabulary,
    words_of as words_of,
)
