"""Ready problems: data, an initial model, a loss, metrics, and what is known."""

from .deep_linear import deep_linear as deep_linear, DeepLinearTruth as DeepLinearTruth
from .diagonal import (
    diagonal_network as diagonal_network,
    DiagonalTruth as DiagonalTruth,
    fourier_diagonal as fourier_diagonal,
    fourier_features as fourier_features,
)
from .image_classification import (
    image_classification as image_classification,
    ImageTruth as ImageTruth,
)
from .linear_regression import (
    linear_regression as linear_regression,
    LinearTruth as LinearTruth,
)
from .matrix_completion import (
    CompletionTruth as CompletionTruth,
    matrix_completion as matrix_completion,
)
from .matrix_recovery import (
    matrix_recovery as matrix_recovery,
    MatrixTruth as MatrixTruth,
)
from .modular_addition import (
    modular_addition as modular_addition,
    ModularTruth as ModularTruth,
)
from .relu_1d import Kinks as Kinks, relu_1d as relu_1d, ReLU1dTruth as ReLU1dTruth
from .sparse_recovery import (
    sparse_recovery as sparse_recovery,
    SparseTruth as SparseTruth,
)
from .task import RelativeError as RelativeError, Task as Task
from .teacher_student import (
    teacher_student as teacher_student,
    TeacherTruth as TeacherTruth,
)
from .wide_teacher import (
    wide_teacher as wide_teacher,
    WideTeacherTruth as WideTeacherTruth,
)
