"""Noise of a descent, against the stationary variances of linear regression."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import Linear

import gradflow as gf
from gradflow.runs.descent import prepare_descent
from gradflow.runs.noise import Noise
from gradflow.runs.steps import descend, descend_part

KEY = jr.key(3)
Q = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 3)))[0]
CURVATURES = np.array([4.0, 1.0, 0.25])
X = jnp.asarray(Q * np.sqrt(4 * CURVATURES))  # these are the eigenvalues of XᵀX/n
LOSS = gf.SquaredError(X, jnp.zeros(4))
H, DECAY, STEPS = 0.2, 0.1, 60_000


def run(loss=LOSS, model=None, **options):
    usual = dict(weight_decay=DECAY, learning_rate=H, steps=STEPS, key=KEY)
    model = Linear(jnp.zeros(3)) if model is None else model
    return gf.descent(gf.GradientFlow(loss), model, **(usual | options))


@pytest.mark.parametrize("kind", ["gradient_noise", "label_noise"])
def test_stationary_variance(kind):
    """θ ← (1 − hμ)θ − hsξ has the variance hs²/(μ(2 − hμ)), μ the curvature with λ;
    s = σ, or σ(κ/n)^½ where the labels are noisy. Samples 40 steps apart are hardly
    correlated, but for the flattest direction, and their variance is off by (2/N)^½."""
    sigma = 0.3
    at = np.arange(0, STEPS + 1, 40)
    path = run(at=at, steps=None, **{kind: sigma})
    samples = np.asarray(path.params.w)[5:]
    mu = CURVATURES + DECAY
    s = sigma * (np.sqrt(CURVATURES / 4) if kind == "label_noise" else 1.0)
    exact = H * s**2 / (mu * (2 - H * mu))
    found = samples.var(axis=0)
    # Correlations from sample to sample leave fewer of them.
    rho = (1 - H * mu) ** 80
    off = np.sqrt(2 / len(samples) * (1 + rho) / (1 - rho))
    assert (np.abs(found / exact - 1) < 4 * off).all() and off.max() < 0.06
    assert np.abs(samples.mean(axis=0)).max() < 0.05
    # The directions are independent.
    correlation = np.corrcoef(samples.T) - np.eye(3)
    assert np.abs(correlation).max() < 0.12


def test_the_same_key_and_the_same_noise():
    one = functools.partial(run, steps=30, label_noise=0.3, gradient_noise=0.1)
    path = one()
    assert np.array_equal(path.params.w, one().params.w)
    assert not np.allclose(path.params.w[-1], one(key=jr.key(4)).params.w[-1])
    # Each of them counts, and neither is the other's.
    alone = [run(steps=30, **{k: 0.1}) for k in ("label_noise", "gradient_noise")]
    slopes = [np.asarray(each.params.w[1]) for each in alone]
    assert abs(np.corrcoef(*slopes)[0, 1]) < 0.999 and not np.allclose(*slopes)
    none = run(steps=30, label_noise=0.0, gradient_noise=0.0)
    np.testing.assert_array_equal(none.params.w, run(steps=30, key=None).params.w)
    # Noise comes on top of that of minibatches, and takes nothing from their draws.
    few = run(steps=30, batch_size=2, model=Linear(jnp.ones(3)))
    both = run(steps=30, batch_size=2, model=Linear(jnp.ones(3)), label_noise=0.0)
    np.testing.assert_array_equal(few.params.w, both.params.w)


def test_in_parts_and_in_sweeps():
    """A run that is gone on with, and a lane, are the same run."""
    model = Linear(jnp.ones(3))
    whole = prepare_descent(
        gf.GradientFlow(LOSS), model, {}, weight_decay=DECAY, learning_rate=H,
        init_scale=1.0, steps=30, slow_time=None, t1=None, at=None, saves=9,
        method="subgradient", optimiser=None, batch_size=None, key=KEY,
        label_noise=0.3, gradient_noise=0.1,
    )  # fmt: skip
    path = descend(whole)
    state, ended = None, False
    while not ended:
        part, state, ended = descend_part(whole, state, jnp.asarray(7))
    np.testing.assert_array_equal(part.params.w, path.params.w)
    steps = gf.Descent(H, steps=30, label_noise=0.3, gradient_noise=0.1, key=KEY)
    lanes = gf.sweep(
        gf.GradientFlow(LOSS), model, weight_decay=[DECAY, 0.2], run=steps, saves=9,
        progress=False,
    )  # fmt: skip
    np.testing.assert_array_equal(lanes[0].params.w, path.params.w)


def test_labels_are_flipped():
    """As often as the probability says, into any other; a gradient is the mean."""
    labels = jnp.zeros(3000, int)
    loss = gf.CrossEntropy(jnp.ones((3000, 1)), labels)

    class Logits(Linear):
        def __call__(self, x):
            return self.w * x[0]

    path = run(loss, Logits(jnp.zeros(3)), steps=1, weight_decay=0.0, label_noise=0.3)
    # softmax − share of the labels, at logits of zero
    shares = 1 / 3 - np.asarray(-path.params.w[1] / H)
    assert np.abs(shares - [0.7, 0.15, 0.15]).max() < 0.03
    binary = gf.Logistic(jnp.ones((3000, 1)), jnp.ones(3000))
    path = run(binary, Linear(jnp.zeros(1)), steps=1, weight_decay=0.0, label_noise=0.2)
    assert abs(0.5 + path.params.w[1, 0] / H - 0.8) < 0.03


def test_too_large_a_step_is_told_from_noise():
    """Though it starts at the minimum."""
    path = run(steps=300, learning_rate=0.6, gradient_noise=0.1, throw=False)
    assert path.result == gf.RESULTS.overshot
    assert run(steps=300, learning_rate=0.4, gradient_noise=0.1).succeeded


def test_under_vmap():
    keys = jr.split(jr.key(0), 3)
    last = jax.vmap(lambda k: run(steps=5, gradient_noise=0.1, key=k).params.w[-1])
    each = [run(steps=5, gradient_noise=0.1, key=k).params.w[-1] for k in keys]
    np.testing.assert_allclose(last(keys), each, rtol=1e-12)


@pytest.mark.parametrize(
    "name, options",
    [
        ("key", dict(label_noise=0.1, key=None)),
        ("key", dict(gradient_noise=0.1, key=None)),
        ("label_noise", dict(label_noise=-0.1)),
        ("gradient_noise", dict(gradient_noise=-0.1)),
        ("label_noise", dict(label_noise=1.5, loss=gf.Logistic(X, jnp.ones(4)))),
        ("label_noise", dict(label_noise=0.1, loss=gf.Loss(lambda m: jnp.sum(m.w**2)))),
        ("method", dict(label_noise=0.1, method="projected")),
    ],
)
def test_what_noise_is_not(name, options):
    with pytest.raises(ValueError, match=f"^{name}: [^\n]*$"):
        run(**options)


def test_narrow_labels_do_not_overflow():
    """A flipped label is another one, any with the same chance."""
    labels = jnp.tile(jnp.arange(100, dtype=jnp.int8), 20)
    x, model = jnp.zeros((2000, 1)), eqx.nn.Linear(1, 100, key=jr.key(0))
    noise = Noise(jr.key(1), jnp.asarray(1.0), None)
    drawn = noise.loss(gf.CrossEntropy(x, labels), model, jnp.asarray(0)).labels
    assert drawn.dtype == jnp.int8 and (drawn != labels).all()
    assert np.abs(np.bincount(drawn, minlength=100) - 20).max() < 25
