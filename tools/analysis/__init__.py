"""What tools.analyze measures on a trained model, one file per kind of measurement. Letters as in layers.py.

Layers are counted as they run: a block that runs three times is three layers, one that never runs is none.
"""
