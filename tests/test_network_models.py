"""Transformer, LSTM, graph network and embedding-decoder against NumPy, and what each
of them must not depend on."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose

import gradflow as gf
from gradflow import models

is_shape = lambda x: isinstance(x, jax.ShapeDtypeStruct)


def shapes(make, **options):
    return eqx.filter_eval_shape(lambda key: make(**options, key=key), jr.key(0))


def size(make, **options):
    """The number of parameters."""
    leaves = jax.tree.leaves(eqx.filter(shapes(make, **options), is_shape))
    return sum(leaf.size for leaf in leaves)


def made(make, seed, **options):
    """A model with weights and biases from NumPy: biases that start at zero are not
    seen by a test."""
    rng = np.random.default_rng(seed)
    fill = lambda x: jnp.asarray(rng.normal(size=x.shape) / 2) if is_shape(x) else x
    return jax.tree.map(fill, shapes(make, **options))


call = eqx.filter_jit(lambda model, *x: model(*x))


sigmoid = lambda x: 1 / (1 + np.exp(-x))
relu = lambda x: np.maximum(x, 0)
numpy = lambda model: jax.tree.map(
    lambda leaf: np.asarray(leaf) if eqx.is_array(leaf) else leaf, model
)


def transformer_of(symbols):
    return made(
        models.Transformer, 0, symbols=symbols, length=4, layers=3, width=6, heads=2,
        hidden=5,
    )  # fmt: skip


@pytest.fixture(scope="module")
def transformer():
    return transformer_of(7)


def read_by_the_formulas(m, word, np=np):
    """The logits at every position; in NumPy, or in jax.numpy for its gradient."""
    x = [m.embedding[s] + m.positions[n] for n, s in enumerate(word)]
    for block in m.blocks:
        a, mixed = block.attention, []
        for n in range(len(word)):
            total = 0
            for h in range(2):
                scores = [
                    (a.query[h] @ x[n]) @ (a.key[h] @ x[k]) / 3**0.5
                    for k in range(n + 1)
                ]
                e = np.exp(np.array(scores))
                seen = sum(w * a.value[h] @ x[k] for k, w in enumerate(e / e.sum()))
                total = total + a.output[h] @ seen
            mixed.append(x[n] + total)
        x = [
            v + block.outer @ np.maximum(block.inner @ v + block.inner_bias, 0)
            + block.outer_bias
            for v in mixed
        ]  # fmt: skip
    return np.stack(x) @ m.unembedding.T


# Above 512 symbols the first projections are not those of all symbols.
@pytest.mark.parametrize("symbols", [7, 600])
@pytest.mark.parametrize("word", [[3, 0, 6], [5, 3, 3, 1]])
def test_transformer(symbols, word):
    model = transformer_of(symbols)
    expected = read_by_the_formulas(numpy(model), word)
    both = eqx.filter_jit(lambda m, s: (m.at_each(s), m(s)))
    every, last = both(model, jnp.array(word))
    assert_allclose(every, expected, rtol=1e-11)
    assert_allclose(last, expected[-1], rtol=1e-11)


@pytest.mark.slow
def test_gradient_of_a_transformer(transformer):
    words = [[3, 0, 6, 1], [2, 2, 0, 5]]
    by = jnp.asarray(np.random.default_rng(1).normal(size=7))

    def formulas(m):
        return sum(by @ jnp.tanh(read_by_the_formulas(m, w, jnp)[-1]) for w in words)

    def fast(m):
        return jnp.sum(jnp.tanh(jax.vmap(m)(jnp.array(words))) @ by)

    expected = eqx.filter_jit(eqx.filter_grad(formulas))(transformer)
    got = eqx.filter_jit(eqx.filter_grad(fast))(transformer)
    size = max(abs(p).max() for p in jax.tree.leaves(expected))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert_allclose(a, b, rtol=1e-9, atol=1e-11 * size)


def test_a_transformer_reads_no_more_than_its_length(transformer):
    with pytest.raises(ValueError, match="at most 4 are read, got 5"):
        transformer(jnp.zeros(5, int))


def test_no_symbol_sees_a_later_one(transformer):
    read = eqx.filter_jit(lambda m, s: m.at_each(s))
    one = np.asarray(read(transformer, jnp.array([1, 2, 3, 4])))
    other = np.asarray(read(transformer, jnp.array([1, 2, 5, 4])))
    assert_allclose(one[:2], other[:2], rtol=0, atol=0)
    assert (abs(one[2:] - other[2:]).max(axis=1) > 1e-3).all()


def test_transformer_of_the_paper():
    # 114·128 twice, 3·128, 4·128², 2·128·512 + 512 + 128; the paper's norm is "43".
    assert size(models.Transformer, symbols=114) == 226_816
    norm = lambda key: optax.tree.norm(
        eqx.filter(models.Transformer(symbols=114, key=key), eqx.is_array)
    )
    expected = (114 + 3 + 4 * 128 + 2 * 512 + 128) ** 0.5
    assert_allclose(jax.jit(norm)(jr.key(0)), expected, rtol=0.01)
    assert size(models.Transformer, symbols=98, layers=2) == (
        2 * 98 * 128 + 3 * 128 + 2 * (4 * 128**2 + 2 * 128 * 512 + 512 + 128)
    )


@pytest.fixture(scope="module")
def lstm():
    return made(models.LSTMClassifier, 2, words=9, embedding=3, state=4)


def test_lstm(lstm):
    m, word = numpy(lstm), [0, 0, 5, 8, 1]
    xs = [m.embedding[w] for w in word]
    for cell in m.cells:
        h, c, out = np.zeros(4), np.zeros(4), []
        for x in xs:
            gates = cell.weight_ih @ x + cell.weight_hh @ h + cell.bias
            i, f, g, o = np.split(gates, 4)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
            out.append(h)
        xs = out
    expected = m.readout.weight @ xs[-1] + m.readout.bias
    assert_allclose(call(lstm, jnp.array(word)), expected[0], rtol=1e-12)


def test_padding_counts_only_as_asked(lstm):
    skipping = made(
        models.LSTMClassifier, 2, words=9, embedding=3, state=4, skip_padding=True
    )
    short, long = jnp.array([5, 8, 1]), jnp.array([0, 0, 5, 8, 1])
    values = {
        (name, x.size): float(call(model, x))
        for name, model in (("skip", skipping), ("read", lstm))
        for x in (short, long)
    }
    assert_allclose(values["skip", 5], values["skip", 3], rtol=1e-14)
    assert_allclose(values["skip", 3], values["read", 3], rtol=1e-14)
    assert abs(values["read", 5] - values["read", 3]) > 1e-6


def test_lstm_of_the_paper():
    gates = 4 * 128 * (64 + 128 + 1) + 4 * 128 * (128 + 128 + 1)
    assert size(models.LSTMClassifier, words=1001) == 1001 * 64 + gates + 129


@pytest.fixture(scope="module")
def network():
    return made(
        models.GraphNetwork, 3, node=3, edge=2, widths=(4, 5), kernel=3, hidden=2
    )


@pytest.fixture(scope="module")
def graph():
    """Four nodes and six edges."""
    rng = np.random.default_rng(0)
    return models.Graph(
        jnp.asarray(rng.normal(size=(4, 3))),
        jnp.asarray(rng.normal(size=(6, 2))),
        jnp.array([0, 1, 1, 2, 2, 3]),
        jnp.array([1, 0, 2, 1, 3, 2]),
        jnp.ones(4, bool),
        jnp.ones(6, bool),
    )


def numpy_mlp(mlp, x):
    *first, last = numpy(mlp).layers
    for layer in first:
        x = relu(layer.weight @ x + layer.bias)
    return last.weight @ x + last.bias


def test_graph_network(network, graph):
    x = np.asarray(graph.nodes)
    for convolution in network.convolutions:
        own = numpy(convolution.own)
        new = x @ own.weight.T + own.bias
        along = map(np.asarray, (graph.edges, graph.senders, graph.receivers))
        for e, j, i in zip(*along, strict=True):
            matrix = numpy_mlp(convolution.kernel, e).reshape(x.shape[1], -1)
            new[i] += x[j] @ matrix
        x = relu(new)
    expected = numpy_mlp(network.readout, x.sum(axis=0))
    assert_allclose(call(network, graph), expected[0], rtol=1e-12)


def test_order_and_filling_do_not_matter(network, graph):
    value = call(network, graph)
    g = numpy(graph)
    new_place = np.array([2, 0, 3, 1])  # of each node
    order = np.array([4, 0, 5, 3, 1, 2])  # of the edges
    graph_of = lambda *arrays: models.Graph(*map(jnp.asarray, arrays))
    shuffled = graph_of(
        g.nodes[np.argsort(new_place)],
        g.edges[order],
        new_place[g.senders][order],
        new_place[g.receivers][order],
        g.has_node,
        g.has_edge,
    )
    assert_allclose(call(network, shuffled), value, rtol=1e-13)
    pad = lambda x, n, fill: np.concatenate(
        [x, np.full((n, *x.shape[1:]), fill, x.dtype)]
    )
    filled = graph_of(
        pad(g.nodes, 2, 7),
        pad(g.edges, 3, 7),
        pad(g.senders, 3, 5),
        pad(g.receivers, 3, 0),
        pad(g.has_node, 2, False),
        pad(g.has_edge, 3, False),
    )
    assert_allclose(call(network, filled), value, rtol=1e-13)
    other = eqx.tree_at(lambda g: g.edges, graph, graph.edges + 1)
    assert abs(call(network, other) - value) > 1e-6


def test_graph_network_of_the_paper():
    first = 11 * 32 + 32 + (4 * 32 + 32) + (32 * 11 * 32 + 11 * 32)
    second = 32 * 16 + 16 + (4 * 32 + 32) + (32 * 32 * 16 + 32 * 16)
    expected = first + second + (16 * 32 + 32) + 33
    assert size(models.GraphNetwork) == expected == 30_321


@pytest.mark.parametrize("activation, slope", [("relu", 0.0), ("leaky_relu", 0.2)])
def test_embedding_decoder(activation, slope):
    sizes = dict(embedding=jnp.zeros((5, 2)), outputs=3, width=4)
    model = made(models.EmbeddingDecoder, 5, activation=activation, **sizes)
    table = np.asarray(model.embedding)
    x = table[1] + table[3]
    *first, last = numpy(model.decoder).layers
    for layer in first:
        x = layer.weight @ x + layer.bias
        x = np.where(x > 0, x, slope * x)
    expected = last.weight @ x + last.bias
    assert_allclose(call(model, jnp.array([1, 3])), expected, rtol=1e-12)
    assert_allclose(call(model, jnp.array([3, 1])), expected, rtol=1e-12)


def test_embedding_decoder_of_the_paper():
    expected = 20 + (2 * 200 + 200) + (200 * 200 + 200) + (200 * 30 + 30)
    assert size(models.EmbeddingDecoder, embedding=jnp.zeros((10, 2))) == expected


def test_messiness_blends_a_line_with_noise():
    at = jax.jit(lambda m: models.messy_embedding(jr.key(6), messiness=m))
    line, noise, between = (np.asarray(at(m)) for m in (0.0, 1.0, 0.25))
    assert_allclose(line[:, 0], np.linspace(-1, 1, 10), atol=1e-15)
    assert abs(line[:, 1]).max() < 0.3 < abs(noise).max() <= 1
    assert_allclose(between, 0.25 * noise + 0.75 * line, rtol=1e-14)
    # Sums of symbols are sums of vectors: i + j tells the first coordinate.
    sums = line[:, None, 0] + line[None, :, 0]
    digits = np.add.outer(np.arange(10), np.arange(10))
    assert_allclose(sums, 2 * digits / 9 - 2, atol=1e-14)


def test_flow_and_descent_hold_the_decoder_and_the_embedding():
    sizes = dict(embedding=jnp.zeros((3, 2)), outputs=2, width=3)
    model = made(models.EmbeddingDecoder, 8, **sizes)
    pairs = jnp.array([[0, 0], [0, 1], [1, 2]])
    loss = gf.SquaredError(pairs, jnp.asarray(np.eye(3)[:, :2]))
    flow = gf.GradientFlow(loss, trainable=model.only_decoder(), hold_norm=True)
    norm = lambda m: sum(
        np.sum(np.square(leaf)) for layer in numpy(m.decoder).layers
        for leaf in (layer.weight, layer.bias)
    )  # fmt: skip
    path = gf.descent(
        flow, model, weight_decay=0.0, learning_rate=0.01, steps=5, optimiser=optax.adam
    )
    end = path[-1]
    assert_allclose(end.embedding, model.embedding, rtol=0)
    assert_allclose(norm(end), norm(model), rtol=1e-12)
    assert path.train_loss[-1] < path.train_loss[0]


@pytest.mark.slow
def test_every_model_runs_as_a_flow(transformer, lstm, network, graph):
    """One step of the flow: gradients that are finite, and downhill."""
    graphs = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), numpy(graph))
    graphs.nodes[1] *= 2
    text = jnp.array([[0, 2, 3], [0, 4, 1]])
    for model, loss in (
        (transformer, gf.CrossEntropy(text, jnp.array([1, 2]))),
        (lstm, gf.Logistic(text, jnp.array([0, 1]))),
        (network, gf.SquaredError(graphs, jnp.array([1.0, -1.0]))),
    ):
        flow = gf.GradientFlow(loss)

        @eqx.filter_jit
        def after(model, flow=flow, loss=loss):
            velocity = flow.velocity(model, 0.0)
            moved = eqx.apply_updates(model, jax.tree.map(lambda v: 1e-4 * v, velocity))
            return loss(model), loss(moved), optax.tree.norm(velocity) ** 2

        before, later, speed = after(model)
        assert speed > 0
        assert_allclose((before - later) / 1e-4, speed, rtol=0.05)


def test_sizes_that_make_no_sense():
    with pytest.raises(ValueError, match="heads: expected a divisor of 128, got 5"):
        models.Transformer(symbols=3, heads=5, key=jr.key(0))
    with pytest.raises(ValueError, match="words: expected an integer >= 1, got 0"):
        models.LSTMClassifier(words=0, key=jr.key(0))
    with pytest.raises(ValueError, match="widths"):
        models.GraphNetwork(widths=(3, 0), key=jr.key(0))
