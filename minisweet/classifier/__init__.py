"""A classifier for your own text: a bag of words, a threshold and a model, with a promise about new text.

Dimension letters: N rows, U distinct texts, C classes, M thresholds. In what runs a model: B texts at once, T tokens, D
hidden size.
"""
