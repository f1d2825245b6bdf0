"""Random smooth flows, small enough for SciPy: `random_problem(seed, index)`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array

import gradflow as gf

DRAWS = 5  # problems that share a model and a loss, and so what is compiled for them
_INPUTS, _LENGTH = 3, 4  # numbers in a sample; where it is a sequence, of such vectors

ACTIVATIONS = {
    "tanh": jnp.tanh,
    "softplus": jax.nn.softplus,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "sine": jnp.sin,
}


class Perceptron(eqx.Module):
    """Layers with biases, with or without a LayerNorm before each activation."""

    weights: list[Array]
    biases: list[Array]
    out: Array
    norm: eqx.nn.LayerNorm | None
    act: Callable = eqx.field(static=True)

    def __call__(self, x):
        for w, b in zip(self.weights, self.biases, strict=True):
            x = w @ x + b
            x = self.act(x if self.norm is None else self.norm(x))
        return self.out @ x


class Gated(eqx.Module):
    gate: Array
    value: Array
    out: Array
    act: Callable = eqx.field(static=True)

    def __call__(self, x):
        return self.out @ (self.act(self.gate @ x) * (self.value @ x))


class Tied(eqx.Module):
    """An autoencoder whose decoder is the encoder transposed, twice."""

    w: Array
    out: Array
    act: Callable = eqx.field(static=True)

    def __call__(self, x):
        for _ in range(2):
            x = self.w.T @ self.act(self.w @ x)
        return self.out @ x


class Attention(eqx.Module):
    query: Array
    key: Array
    value: Array
    out: Array

    def __call__(self, x):
        score = (x @ self.query.T) @ (x @ self.key.T).T / len(self.query) ** 0.5
        seen = jax.nn.softmax(score, axis=-1) @ (x @ self.value.T)
        return self.out @ seen.mean(axis=0)


class Convolution(eqx.Module):
    kernel: Array  # channels, width, inputs
    bias: Array
    out: Array
    act: Callable = eqx.field(static=True)

    def __call__(self, x):
        width = self.kernel.shape[1]
        patches = jnp.stack([x[i : i + width] for i in range(len(x) - width + 1)])
        seen = jnp.einsum("tik,cik->tc", patches, self.kernel)
        return self.out @ self.act(seen + self.bias[None]).mean(axis=0)


class Recurrent(eqx.Module):
    inner: Array
    read: Array
    out: Array
    act: Callable = eqx.field(static=True)

    def __call__(self, x):
        h = jnp.zeros(len(self.inner), x.dtype)
        for step in x:
            h = self.act(self.inner @ h + self.read @ step)
        return self.out @ h


class Gru(eqx.Module):
    cell: eqx.nn.GRUCell
    out: Array

    def __call__(self, x):
        h = jnp.zeros(self.cell.hidden_size, x.dtype)
        for step in x:
            h = self.cell(step, h)
        return self.out @ h


class DeepLinear(eqx.Module):
    weights: list[Array]
    out: Array

    def __call__(self, x):
        for w in self.weights:
            x = w @ x
        return self.out @ x


class LogCosh(eqx.Module):
    """A function of the model of which gradflow knows nothing."""

    x: Array
    y: Array
    weight: float = eqx.field(static=True)

    def __call__(self, model):
        gap = jax.vmap(model)(self.x) - self.y
        return self.weight * jnp.sum(jax.nn.softplus(2 * gap) - gap)


def _first(model):
    return model.out


@dataclasses.dataclass(frozen=True)
class Kind:
    """What is compiled once: the structure of a problem, without its numbers."""

    model: str
    depth: int
    act: str
    loss: str
    reduction: str
    penalty: str
    samples: int
    dtype: str
    solver: str | None
    delta: float  # of the Huber loss, and half the zone of the Moreau envelope

    @property
    def sequence(self) -> bool:
        return self.model in ("attention", "conv", "rnn", "gru")

    @property
    def name(self) -> str:
        depth = self.depth if self.model in ("mlp", "layernorm", "linear") else ""
        act = self.act if self.model not in ("linear", "attention", "gru") else ""
        return (
            f"{self.model}{depth} {act} {self.loss}/{self.reduction} {self.penalty} "
            f"n={self.samples} {self.dtype}".replace("  ", " ")
        )


@dataclasses.dataclass(frozen=True)
class Problem:
    name: str
    kind: Kind
    flow: gf.GradientFlow
    model: Any
    weight_decay: float
    horizon: dict[str, float]  # t1 or slow_time
    rtol: float
    dtype: str
    solver: Any


def random_kind(rng: np.random.Generator) -> Kind:
    pick = lambda options: options[rng.integers(len(options))]
    model = pick(
        ["mlp"] * 6 + ["layernorm"] * 2 + ["gated", "tied", "attention", "attention"]
        + ["conv", "rnn", "gru", "linear", "linear"]
    )  # fmt: skip
    loss = pick(
        ["squared"] * 4 + ["huber", "logistic", "soft logistic", "cross-entropy"] * 2
        + ["opaque"]
    )  # fmt: skip
    penalty = pick(["L2"] * 6 + ["L2 of a part", "scaled L2", "Moreau", "Sobolev"])
    sequence = model in ("attention", "conv", "rnn", "gru")
    return Kind(
        model=model,
        depth=int(rng.integers(1, 5)),
        act=pick(sorted(ACTIVATIONS)),
        loss=loss,
        reduction="mean" if loss == "cross-entropy" else pick(["mean", "mean", "sum"]),
        penalty="L2" if sequence and penalty == "Sobolev" else penalty,
        samples=int(rng.integers(3, 25)),
        dtype=pick(["float64"] * 3 + ["float32"]),
        solver=pick([None] * 4 + ["KKT4", "KKT5"] * 2 + ["RKC2"]),
        delta=float(10 ** rng.uniform(-1.5, 0.5)),
    )


def random_problem(seed: int, index: int) -> Problem:
    """Problem `index` of those of `seed`; each is made without the others."""
    kind = random_kind(np.random.default_rng([seed, index // DRAWS]))
    rng = np.random.default_rng([seed, index // DRAWS, index % DRAWS])
    log_uniform = lambda low, high: float(10 ** rng.uniform(low, high))
    explicit, single = kind.solver == "RKC2", kind.dtype == "float32"

    kx, km, ky = jr.split(jr.key(int(rng.integers(2**31))), 3)
    size = (rng.uniform(-3, -0.5), rng.uniform(-0.5, 0.3), rng.uniform(0.3, 1))
    which = rng.choice(3, p=[0.3, 0.5, 0.2] if not explicit else [0.4, 0.6, 0])
    scale = 10 ** size[which]
    model = _cast(_model(kind, km), kind.dtype, scale)
    shape = (_LENGTH, _INPUTS) if kind.sequence else (_INPUTS,)
    x = jr.normal(kx, (kind.samples, *shape), float)
    far = log_uniform(-3, 3) if rng.uniform() < 0.2 else 1.0
    loss = _cast(_loss(kind, x, ky, far), kind.dtype)
    penalty = _cast(_penalty(kind, model, x), kind.dtype)

    weight_decay = 0.0 if rng.uniform() < 0.15 else log_uniform(-6, 1)
    slow, span, fraction = rng.uniform() < 0.6, log_uniform(0, 5), log_uniform(-1, 0.7)
    if weight_decay > 0:
        # To e^{-20}, where all decays; an explicit solver not for long.
        span = min(span, 20 / weight_decay)
        fraction = min(fraction, 1e3 * weight_decay) if explicit else fraction
    span = min(span, 1e3) if explicit else span
    horizon = dict(slow_time=fraction) if slow and weight_decay else dict(t1=span)
    tight = -4.0 if single else -6.0 if explicit else -9.0
    rtol = log_uniform(tight, -3)
    solver = None if kind.solver is None else getattr(gf, kind.solver)()
    told = ", ".join(f"{k}={v:.3g}" for k, v in horizon.items())
    name = (
        f"{kind.name} | scale {scale:.2g} targets {far:.2g} lambda {weight_decay:.2g} "
        f"{told} rtol {rtol:.1e} {kind.solver or 'default'}"
    )
    flow = gf.GradientFlow(loss, penalty=penalty)
    return Problem(
        name, kind, flow, model, weight_decay, horizon, rtol, kind.dtype, solver
    )


def _cast(tree, dtype: str, scale: float = 1.0):
    """Its arrays of real numbers, times `scale`, in the precision `dtype`."""
    cast = lambda a: (scale * a).astype(dtype) if eqx.is_inexact_array(a) else a
    return jax.tree.map(cast, tree)


def double(tree):
    """The same numbers in float64."""
    return _cast(tree, "float64")


def _model(kind: Kind, key):
    """At scale one: outputs of order one."""
    keys = iter(jr.split(key, 16))
    normal = lambda *s: jr.normal(next(keys), s, float) / np.sqrt(s[-1])
    act, k = ACTIVATIONS[kind.act], 3 if kind.loss == "cross-entropy" else 0
    out = lambda width: normal(k, width) if k else normal(width)
    if kind.model in ("mlp", "layernorm"):
        width = ([7, 4, 3, 3] if k else [10, 5, 4, 3])[kind.depth - 1]
        sizes = [_INPUTS] + [width] * kind.depth
        norm = eqx.nn.LayerNorm(width) if kind.model == "layernorm" else None
        weights = [normal(b, a) for a, b in zip(sizes, sizes[1:], strict=False)]
        biases = [0.3 * normal(width) for _ in weights]
        return Perceptron(weights, biases, out(width), norm, act)
    if kind.model == "gated":
        return Gated(normal(6, _INPUTS), normal(6, _INPUTS), out(6), act)
    if kind.model == "tied":
        return Tied(normal(8, _INPUTS), out(_INPUTS), act)
    if kind.model == "attention":
        return Attention(*(normal(3, _INPUTS) for _ in range(3)), out(3))
    if kind.model == "conv":
        return Convolution(normal(4, 2, _INPUTS), 0.3 * normal(4), out(4), act)
    if kind.model == "rnn":
        return Recurrent(normal(4, 4), normal(4, _INPUTS), out(4), act)
    if kind.model == "gru":
        return Gru(eqx.nn.GRUCell(_INPUTS, 3, key=next(keys)), out(3))
    return DeepLinear([normal(3, 3) for _ in range(kind.depth)], out(3))


def _loss(kind: Kind, x, key, far):
    """Targets that depend on the inputs, smoothly, and on chance."""
    ka, kb = jr.split(key)
    flat = x.reshape(len(x), -1)
    signal = jnp.sin(flat @ jr.normal(ka, (flat.shape[1],), float))
    noisy = signal + 0.3 * jr.normal(kb, signal.shape, float)
    how = dict(reduction=kind.reduction)
    if kind.loss == "squared":
        return gf.SquaredError(x, far * noisy, **how)
    if kind.loss == "huber":
        return gf.Huber(x, far * noisy, delta=kind.delta, **how)
    if kind.loss == "logistic":
        return gf.Logistic(x, jnp.where(noisy > 0, 1.0, 0.0), **how)
    if kind.loss == "soft logistic":
        return gf.Logistic(x, jax.nn.sigmoid(2 * noisy), **how)
    if kind.loss == "cross-entropy":
        return gf.CrossEntropy(x, jnp.digitize(noisy, jnp.array([-0.4, 0.4])))
    weight = 1.0 if kind.reduction == "sum" else 1.0 / len(x)
    return gf.Loss(LogCosh(x, far * noisy, weight))


def _penalty(kind: Kind, model, x):
    if kind.penalty == "L2 of a part":
        return gf.L2(where=_first)
    if kind.penalty == "scaled L2":
        return 0.5 * gf.L2()
    if kind.penalty == "Moreau":
        return gf.Moreau(gf.L1(), epsilon=kind.delta)
    if kind.penalty == "Sobolev":
        return gf.L2() + 0.3 * gf.Sobolev(model, x.astype(kind.dtype)[:4])
    return gf.L2()
