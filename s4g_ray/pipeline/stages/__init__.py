"""Single stages of the loop, as the commands s4g embed, mine and evaluate run them.

embed           embed_collection: a data set's images into an embedding table
mine            mine_table: an embedding table into a neighbor graph
evaluate        evaluate: a run, an export or weights on a data set
mining_input    the rows of a table that are mined
table_job       the work of embed on a cluster
graph_job       the work of mine on a cluster
evaluation_job  the work of evaluate on a cluster

The first four check their input, and import torch, Ray and faiss with the last three only then.
"""
