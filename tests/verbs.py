"""The three verbs of an experiment, one after the other, in memory."""

import jax


def verbs(config):
    """What is computed, judged and drawn, under JAX's own rules of promotion."""
    config = config.effective()
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        data = config.compute()
        return data, config.judge(data), config.draw(data)


def finished(store):
    """When each run of a store was written."""
    return {p: p.stat().st_mtime_ns for p in (store / "chunks").glob("*/zarr.json")}
