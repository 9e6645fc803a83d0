"""Single stages: s4g embed, mine, evaluate.

embed     s4g embed: a collection into an embedding table
mine      s4g mine: an embedding table into a neighbor graph
evaluate  s4g evaluate: a run, export or weights on a data set
"""
