"""A classifier for your own text, with a bag of words in front and a promise about new text.

Dimension letters: N rows, T distinct texts, K exits (of which the bag of words, if there is one, is the first), C
classes, M thresholds. In what runs a model: B texts at once, T tokens, D hidden size.
"""
