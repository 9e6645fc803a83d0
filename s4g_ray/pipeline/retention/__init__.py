"""Remove what a run no longer needs: embedding tables, graphs, plans and indexes.

rule         which versions may be removed, from the schedule and the state of a run (pure)
artefacts    list and remove the versions of a run folder
prune        `s4g prune`: the rule on a run that is not in progress
"""
