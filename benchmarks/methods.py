"""Every contender behind one interface: `Contender.make(problem)` gives a solver with
`warm`, which compiles, and `solve`, which runs. All in float64."""

import dataclasses
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
from jaxtyping import Array, Float
from problems import Problem
from scipy.integrate import solve_ivp

import gradflow as gf
from gradflow.solvers import KKT4, KKT5, RKC2
from gradflow.solvers.controllers import AbstractWrapped

gf.enable_float64()

OK, OVER = "ok", "over budget"


class Solved(NamedTuple):
    """What one solve gave: θ at the times asked for, an array n × d, and its cost."""

    theta: np.ndarray | None
    status: str = OK
    steps: int | None = None
    rejected: int | None = None
    evaluations: int | None = None
    compiled: bool = False
    """Whether this solve had to compile first; then its time does not count."""


class Run(NamedTuple):
    """A solve and its time: the median of `repeats`, without compilation."""

    solved: Solved
    seconds: float
    repeats: int


class Solver(Protocol):
    """A method on one problem. λ, times and tolerance may change from solve to solve
    without a new compilation, as long as there are as many times."""

    def warm(self, lam: float, ts: np.ndarray) -> None:
        """Compiles all that `solve` needs, and does little more."""

    def solve(self, lam: float, ts: np.ndarray, rtol: float, budget: float) -> Solved:
        """Runs for `budget` seconds at most."""


class OverBudget(Exception):
    """Raised by a right-hand side whose time is up."""


def compile_time(solver: Solver, lam: float, ts: np.ndarray) -> float:
    """Seconds that the first call takes longer than the second: nothing where another
    method has compiled the same before."""
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        solver.warm(lam, ts)
        seconds.append(time.perf_counter() - start)
    return max(0.0, seconds[0] - seconds[1])


def measure(
    solver: Solver,
    lam: float,
    ts: np.ndarray,
    rtol: float,
    budget: float,
    repeat: Callable[[Solved], bool] = lambda solved: True,
) -> Run:
    """One solve, and its median time over 7 repeats (3 above 0.3 s, none above 3 s or
    where `repeat` of the first says that it is not worth it)."""
    seconds, most = [], 1
    while len(seconds) < most:
        start = time.perf_counter()
        solved = solver.solve(lam, ts, rtol, budget)
        if solved.compiled:
            continue
        seconds.append(time.perf_counter() - start)
        if len(seconds) == 1 and solved.status == OK and repeat(solved):
            most = 7 if seconds[0] < 0.3 else 3 if seconds[0] <= 3 else 1
    return Run(solved, statistics.median(seconds), len(seconds))


class Gradflow:
    """`gf.simulate`, as a user calls it, checks and choice of the solver included.

    It has no limit of time: what it takes is measured, over the budget too.
    """

    def __init__(self, problem: Problem, solver: diffrax.AbstractSolver | None = None):
        self.problem = problem
        self.solver = solver
        self.compiled: set[str] = set()

    def _run(self, lam, ts, rtol) -> gf.Path:
        task = self.problem.task
        path = gf.simulate(
            task.flow,
            task.model,
            weight_decay=lam,
            ts=jnp.asarray(ts),
            solver=self.solver,
            rtol=rtol,
            throw=False,
        )
        return jax.block_until_ready(path)

    def warm(self, lam: float, ts: np.ndarray) -> None:
        self.compiled.add(self._run(lam, ts, 1e-3).stats.solver)

    def solve(self, lam: float, ts: np.ndarray, rtol: float, budget: float) -> Solved:
        path = self._run(lam, ts, rtol)
        reached = bool(path.succeeded)
        chosen = path.stats.solver
        compiled = chosen not in self.compiled
        self.compiled.add(chosen)
        return Solved(
            self.problem.flat(path.params) if reached else None,
            OK if reached else f"failed: {gf.RESULTS[path.result].split('.')[0]}",
            int(path.stats.steps),
            int(path.stats.rejected),
            compiled=compiled,
        )


def right_hand_side(problem: Problem) -> Callable:
    """−∇F(θ) − λθ of one vector."""
    gradient = jax.grad(problem.loss)
    return lambda theta, lam: -gradient(theta) - lam * theta


def hessian(problem: Problem) -> Callable:
    """Its Jacobian, −∇²F(θ) − λI."""
    exact = jax.hessian(problem.loss)
    eye = jnp.eye(problem.d)
    return lambda theta, lam: -exact(theta) - lam * eye


def gauss_newton(problem: Problem) -> Callable:
    """Its Jacobian on the critical manifold, −ℓ''JᵀJ − λI."""
    weight = problem.loss.composite.outer_curvature
    eye = jnp.eye(problem.d)

    def matrix(theta, lam):
        jac = problem.loss.jacobian(theta)
        return -weight * jac.T @ jac - lam * eye

    return matrix


class SciPy:
    """`solve_ivp` with a jitted right-hand side and a jitted Jacobian."""

    def __init__(self, problem: Problem, method: str, jacobian: Callable):
        self.problem = problem
        self.method = method
        self.rhs = jax.jit(right_hand_side(problem))
        self.jacobian = jax.jit(jacobian(problem))
        self.start = np.asarray(problem.theta)

    def warm(self, lam: float, ts: np.ndarray) -> None:
        jax.block_until_ready(
            (self.rhs(self.start, lam), self.jacobian(self.start, lam))
        )

    def solve(self, lam: float, ts: np.ndarray, rtol: float, budget: float) -> Solved:
        deadline = time.perf_counter() + budget

        def timed(fn):
            def call(_, theta):
                if time.perf_counter() > deadline:
                    raise OverBudget
                return np.asarray(fn(theta, lam))

            return call

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # LSODA's; success tells
                out = solve_ivp(
                    timed(self.rhs),
                    (0.0, ts[-1]),
                    self.start,
                    method=self.method,
                    t_eval=ts,
                    jac=timed(self.jacobian),
                    rtol=rtol,
                    atol=rtol * self.problem.scale,
                )
        except OverBudget:
            return Solved(None, OVER)
        if not out.success:
            return Solved(None, f"failed: {out.message}")
        return Solved(out.y.T, evaluations=out.nfev)


class StopAt(AbstractWrapped):
    """A controller that ends the run at a time of the clock. It looks every so many
    steps; the steps of an implicit solver differ too much in cost to be counted."""

    controller: diffrax.PIDController
    deadline: Any
    every: int = eqx.field(static=True)

    def init(self, *args):
        t1, state = self.controller.init(*args)
        return t1, (state, jnp.zeros((), int))

    def adapt_step_size(
        self, t0, t1, y0, y1_candidate, args, y_error, error_order, controller_state
    ):
        state, count = controller_state
        *out, state, result = self.controller.adapt_step_size(
            t0, t1, y0, y1_candidate, args, y_error, error_order, state
        )
        count = count + 1
        look = count % self.every == 0
        late = jax.lax.cond(
            look, lambda n: self._late(n), lambda _: jnp.array(False), count
        )
        stopped = diffrax.RESULTS.where(late, _STOPPED, diffrax.RESULTS.successful)
        result = diffrax.RESULTS.where(
            result == diffrax.RESULTS.successful, stopped, result
        )
        return *out, (state, count), result

    def _late(self, count):
        return jax.pure_callback(
            lambda end, _: np.array(time.perf_counter() > end),
            jax.ShapeDtypeStruct((), bool),
            self.deadline,
            count,  # so that it is asked anew each time
        )


_STOPPED = diffrax.RESULTS.max_steps_reached


class Diffrax:
    """`diffeqsolve`, jitted, with a PID controller; it lands on the saved times, which
    costs little and saves implicit solvers the error of their interpolation."""

    def __init__(self, problem: Problem, solver: diffrax.AbstractSolver):
        self.problem = problem
        implicit = isinstance(solver, diffrax.AbstractImplicitSolver)
        # So that the look at the clock costs explicit solvers nothing.
        self.every = 8 if implicit else max(32, 400_000 // problem.d)
        rhs = right_hand_side(problem)
        self._solve = eqx.filter_jit(
            lambda *args: self._diffeqsolve(solver, rhs, *args)
        )
        self.seconds_per_step = 1e-3

    def _diffeqsolve(self, solver, rhs, lam, ts, rtol, deadline) -> diffrax.Solution:
        controller = diffrax.PIDController(rtol, rtol * self.problem.scale)
        return diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, theta, lam: rhs(theta, lam)),
            solver,
            jnp.zeros_like(ts[0]),
            ts[-1],
            None,
            self.problem.theta,
            args=lam,
            saveat=diffrax.SaveAt(ts=ts),
            stepsize_controller=diffrax.ClipStepSizeController(
                StopAt(controller, deadline, self.every), step_ts=ts
            ),
            max_steps=None,
            throw=False,
        )

    def _run(self, lam, ts, rtol, budget) -> diffrax.Solution:
        deadline = time.perf_counter() + budget
        values = map(jnp.asarray, (float(lam), ts, rtol, deadline))
        return jax.block_until_ready(self._solve(*values))

    def warm(self, lam: float, ts: np.ndarray) -> None:
        self._run(lam, ts, 1e-4, 0.0)

    def solve(self, lam: float, ts: np.ndarray, rtol: float, budget: float) -> Solved:
        out = self._run(lam, ts, rtol, budget)
        reached = bool(out.result == diffrax.RESULTS.successful)
        over = bool(out.result == _STOPPED)
        reason = str(diffrax.RESULTS[out.result]).split(".")[0]
        return Solved(
            np.asarray(out.ys) if reached else None,
            OK if reached else OVER if over else f"failed: {reason}",
            int(out.stats["num_steps"]),
            int(out.stats["num_rejected_steps"]),
        )


class TorchDopri5:
    """`torchdiffeq.odeint` on a CPU tensor, the gradient by Torch's autograd."""

    def __init__(self, problem: Problem):
        import torch
        import torchdiffeq

        torch.set_num_threads(1)
        self.problem = problem
        self.torch = torch
        self.odeint = torchdiffeq.odeint
        self.start = torch.tensor(np.asarray(problem.theta))
        self.targets = torch.tensor(np.asarray(problem.task.loss.y))
        self.weight = problem.loss.composite.outer_curvature

    def gradient(self, theta):
        """∇F."""
        with self.torch.enable_grad():
            theta = theta.detach().requires_grad_()
            lack = self.problem.torch_outputs(theta) - self.targets
            loss = 0.5 * self.weight * (lack * lack).sum()
            return self.torch.autograd.grad(loss, theta)[0]

    def warm(self, lam: float, ts: np.ndarray) -> None:
        self.gradient(self.start)

    def solve(self, lam: float, ts: np.ndarray, rtol: float, budget: float) -> Solved:
        deadline = time.perf_counter() + budget
        count = 0

        def rhs(_, theta):
            nonlocal count
            count += 1
            if time.perf_counter() > deadline:
                raise OverBudget
            return -self.gradient(theta) - lam * theta

        times = self.torch.tensor(np.concatenate([[0.0], ts]))
        try:
            out = self.odeint(
                rhs,
                self.start,
                times,
                rtol=rtol,
                atol=rtol * self.problem.scale,
                method="dopri5",
                options={"step_t": times[1:]},
            )
        except OverBudget:
            return Solved(None, OVER, evaluations=count)
        return Solved(out[1:].numpy(), evaluations=count)


class Descent:
    """Optax's gradient descent with weight decay; t = step × iterations.

    What stands for the tolerance is c: the step is at most c/L, and such that the
    iterations fall on the saved times. L is the sharpness along the path, handed to it
    for free.
    """

    sharpness: ClassVar[dict[str, float]] = {}
    """The largest eigenvalue of ∇²F met on the path of a problem, by its name."""

    def __init__(self, problem: Problem):
        self.problem = problem
        self.advance = jax.jit(self._advance)
        self.seconds_per_step = 1e-3

    def _advance(self, theta, number, step, lam) -> Float[Array, " d"]:
        optimiser = optax.chain(optax.add_decayed_weights(lam), optax.sgd(step))
        state = optimiser.init(theta)

        def iterate(_, carry):
            theta, state = carry
            gradient = jax.grad(self.problem.loss)(theta)
            updates, state = optimiser.update(gradient, state, theta)
            return optax.apply_updates(theta, updates), state

        return jax.lax.fori_loop(0, number, iterate, (theta, state))[0]

    def _run(self, theta, number, step, lam) -> Float[Array, " d"]:
        start = time.perf_counter()
        theta = jax.block_until_ready(self.advance(theta, number, step, lam))
        if number >= 100:
            self.seconds_per_step = (time.perf_counter() - start) / number
        return theta

    def warm(self, lam: float, ts: np.ndarray) -> None:
        self._run(self.problem.theta, 100, 1e-6, lam)

    def solve(self, lam: float, ts: np.ndarray, rtol: float, budget: float) -> Solved:
        deadline = time.perf_counter() + budget
        largest = rtol / self.sharpness[self.problem.name]
        theta, saved, count, before = self.problem.theta, [], 0, 0.0
        for t in ts:
            left = max(1, int(np.ceil((t - before) / largest)))
            step, before = (t - before) / left, t
            while left:
                if time.perf_counter() > deadline:
                    return Solved(None, OVER, steps=count)
                # Half a second's worth, so that the clock is looked at.
                number = min(left, max(100, int(0.5 / self.seconds_per_step)))
                theta = self._run(theta, number, step, lam)
                left, count = left - number, count + number
            saved.append(np.asarray(theta))
        return Solved(np.stack(saved), steps=count)


@eqx.filter_jit
def _sharpness(loss, thetas: Float[Array, "n d"]) -> Float[Array, ""]:
    def at(theta):
        _, hvp = jax.linearize(jax.grad(loss), theta)
        grow = lambda _, v: hvp(v) / jnp.linalg.norm(hvp(v))
        v = jax.lax.fori_loop(0, 50, grow, jnp.cos(jnp.arange(theta.size, dtype=float)))
        return jnp.linalg.norm(hvp(v))

    return jnp.max(jax.lax.map(at, thetas))


def learn_sharpness(problem: Problem, thetas: np.ndarray) -> None:
    """Tells `Descent` how sharp the loss is along a path."""
    largest = _sharpness(problem.loss, jnp.asarray(thetas))
    known = Descent.sharpness.get(problem.name, 0.0)
    Descent.sharpness[problem.name] = max(known, float(largest))


@dataclasses.dataclass(frozen=True)
class Contender:
    """A method, and what to expect of it.

    - `make`: the solver for a problem.
    - `rtols`: the tolerances to try, from loose to tight.
    - `linear`: whether its cost is known to be proportional to 1/λ.
    - `dense`: whether it holds d × d matrices.
    """

    label: str
    family: str
    make: Callable[[Problem], Solver]
    rtols: tuple[float, ...]
    linear: bool = False
    dense: bool = False


_RTOLS = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 3e-6, 1e-6, 1e-7, 1e-8)
_EXPLICIT = _RTOLS[2:]  # where stability sets the step, a loose tolerance saves nothing


def _gradflow(label: str, solver: Callable[[], Any] | None = None) -> Contender:
    make = lambda problem: Gradflow(problem, solver() if solver else None)
    return Contender(label, "gradflow", make, _RTOLS)


def _scipy(method: str, name: str, jacobian: Callable) -> Contender:
    make = lambda problem: SciPy(problem, method, jacobian)
    return Contender(f"SciPy {method}, {name}", "SciPy", make, _RTOLS, dense=True)


def _diffrax(label: str, solver: Callable[[], Any], *, dense: bool) -> Contender:
    make = lambda problem: Diffrax(problem, solver())
    rtols = _RTOLS if dense else _EXPLICIT
    return Contender(
        f"Diffrax {label}", "Diffrax", make, rtols, linear=not dense, dense=dense
    )


def _newton_kvaerno5() -> diffrax.AbstractSolver:
    root_finder = diffrax.with_stepsize_controller_tols(optx.Newton)()
    return diffrax.Kvaerno5(root_finder=root_finder)


def contenders() -> dict[str, Contender]:
    """All that can run here, the fastest first."""
    out = {"gradflow": _gradflow("gradflow")}
    for solver in (KKT4, KKT5, RKC2):
        name = solver.__name__
        out[name.lower()] = _gradflow(f"gradflow {name}", solver)
    for method in ("LSODA", "BDF", "Radau"):
        low = method.lower()
        out[f"{low}-hessian"] = _scipy(method, "JAX Hessian", hessian)
        out[f"{low}-jtj"] = _scipy(method, "JᵀJ", gauss_newton)
    newton = ("Kvaerno5, Newton", _newton_kvaerno5)
    out["kvaerno5"] = _diffrax("Kvaerno5, default", diffrax.Kvaerno5, dense=True)
    out["kvaerno5-newton"] = _diffrax(*newton, dense=True)
    out["tsit5"] = _diffrax("Tsit5", diffrax.Tsit5, dense=False)
    out["dopri8"] = _diffrax("Dopri8", diffrax.Dopri8, dense=False)
    try:
        import torchdiffeq  # noqa: F401

        label, rtols = "torchdiffeq dopri5", _EXPLICIT
        out["torch-dopri5"] = Contender(
            label, "torchdiffeq", TorchDopri5, rtols, linear=True
        )
    except ImportError:
        pass
    steps = (0.5, 0.1, 0.02, 0.004, 0.0008)
    out["descent"] = Contender(
        "Optax gradient descent", "Optax", Descent, steps, linear=True
    )
    return out
