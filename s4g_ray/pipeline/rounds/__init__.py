"""Mining rounds between or beside the epochs.

schedule      when to mine and evaluate, and which graph an epoch uses (pure)
coordinator   the thread that does rounds beside training
mining_round  one round: embed, mine, evaluate
graphs        RunGraphs: the neighbor graphs of a run: where they lie, which exist
rotation      the places that a round of mining.refresh=rotate takes (pure)
miner         index and mine each collection of references
cell_search   exact search within geographic cells, without an index
"""
