"""Measure a machine, its links and the user's own model, in about a minute: `unisono probe`.

rates -> products and memory      links -> collectives, fits, pairs of hosts
passes -> the user's model alone  sharing -> what communication takes from compute
measure -> all of it, as one forecast/probe.py value      show -> on the terminal
"""
