"""Single stages of the loop, as the commands s4g embed, mine and evaluate run them.

embed     embed_collection: a data set's images into an embedding table
mine      mine_table: an embedding table into a neighbor graph
evaluate  evaluate: a run, an export or weights on a data set
"""
