"""Which pairs meet in a batch.

geographic_neighbors  the nearest places on the ground, exact
place_tree            a k-d tree over places, sorted along a Morton curve
compact_graph         CompactGraph: a neighbor graph as int32 row numbers
sampler               plan_batches: pairs and graph into a BatchPlan
greedy_kernels        the compiled greedy pass behind plan_batches
exclusion_table       Exclusions in the flat form that the kernels read
cells                 plans over a tree of geographic cells, for very many pairs
cell_tasks            the same, with cells as Ray tasks
gallery_negatives     references without a query, chosen for each batch
"""
