"""Plan which pairs meet in a batch, and find the nearest places on the ground.

    graph = geographic_graph(places, k=128)
    plan = plan_batches(pairs, graph, batch_size=128, seed=1, epoch=0)

In the order of use:

geographic_neighbors  the nearest places on the ground, exact
place_tree            a k-d tree over places, sorted along a Morton curve
compact_graph         CompactGraph: a neighbor graph as int32 row numbers
sampler               plan_batches: pairs and graph into a BatchPlan
visit_order           the order in which the planner visits pairs, and places that wait
greedy_kernels        the compiled greedy pass behind plan_batches
exclusion_table       exclusions in the flat form that the kernels read
hardness              count the hard negatives of batches
cells                 plans over a tree of geographic cells, for very many pairs
cell_tasks            the same, with cells as Ray tasks
hard_positives        the hardest queries of a place, preferred
gallery_negatives     references without a query, chosen for each batch
"""
