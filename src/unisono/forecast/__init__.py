"""Foretell a run before it starts: time, memory, money, by counted work and a described machine.

hardware -> what a device can do      architecture -> what a model asks of it
network  -> what a collective costs   compute, memory -> what one device does and holds
cost     -> one optimizer step        search -> the best way for every number of devices
Nothing here imports torch, transformers or numpy; every global constant is in `constants.py`.
"""
