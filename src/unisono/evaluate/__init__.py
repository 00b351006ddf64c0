"""How good a model is, and how safe: likelihood, generation, safety, and what changed between two.

The way of a figure: a suite (`text`, `preferences`, `choices`, `tasks`, `safety`) turns its data into
items, each with requests to the model; `ask` answers those over replicas and keeps them on disk; the
suite scores each item; `results` makes figures of the scores, and a verdict of two sets of them.
"""
