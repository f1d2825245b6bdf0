"""A network on graphs, whose messages depend on the kind of edge."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Scalar

from ._checks import check_sizes


class Graph(eqx.Module):
    """A directed graph, or many of the same number of nodes and edges: filled up with
    nodes and edges that are not there, so that graphs of all sizes can be stacked."""

    nodes: Float[Array, "*graphs n f"]
    """Features of the nodes."""
    edges: Float[Array, "*graphs e g"]
    """Features of the edges."""
    senders: Int[Array, "*graphs e"]
    """The node from which an edge goes."""
    receivers: Int[Array, "*graphs e"]
    """The node to which it goes."""
    has_node: Bool[Array, "*graphs n"]
    """Whether a node is there."""
    has_edge: Bool[Array, "*graphs e"]
    """Whether an edge is there."""


class EdgeConvolution(eqx.Module):
    """xᵢ ↦ Wxᵢ + Σ_{j→i} A(eⱼᵢ)xⱼ + b, the matrix A(e) being the output of a ReLU
    network of one hidden layer (Gilmer et al., arXiv 1704.01212; NNConv in PyTorch
    Geometric)."""

    own: eqx.nn.Linear
    kernel: eqx.nn.MLP

    def __init__(
        self, inputs: int, outputs: int, edge: int, hidden: int, *, key: PRNGKeyArray
    ):
        own_key, kernel_key = jr.split(key)
        own = eqx.nn.Linear(inputs, outputs, key=own_key)
        self.own = eqx.tree_at(lambda m: m.bias, own, jnp.zeros(outputs))
        self.kernel = eqx.nn.MLP(edge, inputs * outputs, hidden, 1, key=kernel_key)

    def __call__(self, x: Float[Array, "n f"], graph: Graph) -> Float[Array, "n h"]:
        inputs, outputs = x.shape[1], self.own.out_features
        matrices = jax.vmap(self.kernel)(graph.edges).reshape(-1, inputs, outputs)
        messages = jnp.einsum("ef,efh->eh", x[graph.senders], matrices)
        messages = jnp.where(graph.has_edge[:, None], messages, 0)
        sums = jax.ops.segment_sum(messages, graph.receivers, x.shape[0])
        return jax.vmap(self.own)(x) + sums


class GraphNetwork(eqx.Module):
    """One number from a graph: two edge-conditioned convolutions with ReLUs, the sum
    over all nodes, and a ReLU network of one hidden layer.

    The network of Liu, Michaud, Tegmark, arXiv 2210.01117, figure 5. It does not depend
    on the order of nodes and edges, nor on those that are not there. Weights and biases
    start uniform within ±1/√(inputs of the layer), but for b, which starts at zero.
    """

    convolutions: tuple[EdgeConvolution, EdgeConvolution]
    readout: eqx.nn.MLP

    def __init__(
        self,
        *,
        node: int = 11,
        edge: int = 4,
        widths: tuple[int, int] = (32, 16),
        kernel: int = 32,
        hidden: int = 32,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `node`, `edge`: features of a node and of an edge.
        - `widths`: features of a node after each convolution.
        - `kernel`: neurons of the networks that make the matrices A(e).
        - `hidden`: neurons of the last network.
        - `key`: of the initial weights.

        **Raises:** `ValueError` where a size makes no sense.
        """
        first, second = widths
        check_sizes(
            node=node, edge=edge, widths=min(widths), kernel=kernel, hidden=hidden
        )
        keys = jr.split(key, 3)
        self.convolutions = (
            EdgeConvolution(node, first, edge, kernel, key=keys[0]),
            EdgeConvolution(first, second, edge, kernel, key=keys[1]),
        )
        self.readout = eqx.nn.MLP(second, "scalar", hidden, 1, key=keys[2])

    def __call__(self, graph: Graph) -> Scalar:
        """The number for one graph."""
        x = graph.nodes
        for convolution in self.convolutions:
            x = jax.nn.relu(convolution(x, graph))
        total = jnp.sum(jnp.where(graph.has_node[:, None], x, 0), axis=0)
        return self.readout(total)
