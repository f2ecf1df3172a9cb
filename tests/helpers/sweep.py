"""A small space of settings, for tests of `sweep`."""

SPACE = """
optim.lr: {low: 1e-4, high: 1e-2, log: true}
model.top_k: {low: 1, high: 3}
"""
