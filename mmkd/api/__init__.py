"""The Python interface: what `import mmkd` offers.

runs      a recipe from start to end
distill   one stage with models and records in memory, by the trainer that runs use
models    convert, evaluate and ask models
pieces    objectives and batches for a training loop of one's own
"""
