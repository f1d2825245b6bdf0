"""Ready problems: data, an initial model, a loss, metrics, and what is known."""

from ._deep_linear import deep_linear as deep_linear, DeepLinearTruth as DeepLinearTruth
from ._diagonal import (
    diagonal_network as diagonal_network,
    DiagonalTruth as DiagonalTruth,
    fourier_diagonal as fourier_diagonal,
    fourier_features as fourier_features,
)
from ._image_classification import (
    image_classification as image_classification,
    ImageTruth as ImageTruth,
)
from ._image_mlp import DataTruth as DataTruth, image_mlp as image_mlp
from ._linear_regression import (
    linear_regression as linear_regression,
    LinearTruth as LinearTruth,
)
from ._matrix_completion import (
    CompletionTruth as CompletionTruth,
    matrix_completion as matrix_completion,
)
from ._matrix_recovery import (
    matrix_recovery as matrix_recovery,
    MatrixTruth as MatrixTruth,
)
from ._modular_addition import (
    modular_addition as modular_addition,
    ModularTruth as ModularTruth,
)
from ._modular_transformer import (
    modular_transformer as modular_transformer,
    OperationTruth as OperationTruth,
)
from ._polarizability import (
    polarizability as polarizability,
    PolarizabilityTruth as PolarizabilityTruth,
)
from ._relu_1d import Kinks as Kinks, ReLU1dTruth as ReLU1dTruth, relu_1d as relu_1d
from ._sentiment import sentiment as sentiment
from ._sparse_recovery import (
    sparse_recovery as sparse_recovery,
    SparseTruth as SparseTruth,
)
from ._symbol_addition import (
    AdditionTruth as AdditionTruth,
    symbol_addition as symbol_addition,
)
from ._task import RelativeError as RelativeError, Task as Task
from ._teacher_mlp import (
    ShareWithin as ShareWithin,
    teacher_mlp as teacher_mlp,
    TeacherMLPTruth as TeacherMLPTruth,
)
from ._teacher_student import (
    teacher_student as teacher_student,
    TeacherTruth as TeacherTruth,
)
from ._wide_teacher import (
    wide_teacher as wide_teacher,
    WideTeacherTruth as WideTeacherTruth,
)
