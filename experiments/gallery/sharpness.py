"""The sharpness of a small convolutional network along its flow, and what it means.

λ₁(∇²F) by Lanczos' process at each saved time; at the end gradient descent with a step
below 2/λ₁ stays where it is, and one above leaves (Cohen et al., arXiv 2103.00065).
"""

from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np

import gradflow as gf

gf.enable_float64()


class ConvNet(eqx.Module):
    first: eqx.nn.Conv2d
    last: eqx.nn.Linear

    def __init__(self, key):
        one, two = jr.split(key)
        self.first = eqx.nn.Conv2d(1, 4, 3, stride=2, padding=1, key=one)
        self.last = eqx.nn.Linear(64, 10, key=two)

    def __call__(self, image):
        hidden = jax.nn.gelu(self.first(image.reshape(1, 8, 8)))
        return self.last(hidden.reshape(-1))


def main(out=Path("results/gallery")):
    images, labels = gf.data.scikit_learn_digits()
    x = jnp.asarray(images[:100]).reshape(100, -1)
    loss = gf.SquaredError(x, jax.nn.one_hot(labels[:100], 10, dtype=float))
    flow, model = gf.GradientFlow(loss), ConvNet(jr.key(0))
    sharp = gf.metrics.Sharpness(loss)
    path = gf.simulate(
        flow, model, weight_decay=1e-3, t1=300.0, saves=25, metrics={"sharpness": sharp}
    )
    top = float(path.metrics["sharpness"][-1])

    moved = {}
    for share in (0.9, 1.1):
        h = 2 * share / top
        run = gf.descent(
            flow, path[-1], weight_decay=1e-3, learning_rate=h, steps=300, throw=False
        )
        moved[share] = float(np.nanmax(run.train_loss) / run.train_loss[0])
    assert moved[0.9] < 1.1 and moved[1.1] > 2, moved

    fig, ax = plt.subplots(layout="constrained")
    ax.semilogx(path.t, path.metrics["sharpness"], "o-")
    ax.set(xlabel="time t", ylabel="λ₁(∇²F)", title="sharpness along the flow")
    out.mkdir(parents=True, exist_ok=True)
    fig.savefig(out / "sharpness.png")
    print(path, moved, sep="\n")


if __name__ == "__main__":
    main()
